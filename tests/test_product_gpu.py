"""Linear layers of few rows, by cuBLASLt without PyTorch: the same bits, by an algorithm that is looked for once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits
from test_linear_gelu import HALVES, build

import tome_cuda

pytestmark = NO_EXTENSION

FEW_ROWS = [
    *((197, 2304, 768), (197, 768, 768), (101, 768, 3072), (25, 768, 3072), (10, 768, 3072)),
    *((1576, 768, 3072), (33, 40, 24), (7, 5, 3), (1, 3, 2)),
]


@pytest.fixture(autouse=True)
def exact_sums(monkeypatch):
    """PyTorch may not add parts of a sum in 16 bits, as these products never do."""
    matmul = torch.backends.cuda.matmul
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        monkeypatch.setattr(matmul, name, False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "j", "k"), FEW_ROWS)
def test_a_product_of_few_rows(rows, j, k, dtype):
    """By cuBLASLt itself, with the algorithm that PyTorch has it take."""
    x, weight, bias = build((1, rows), j, k, dtype, True, 1.0, 0, "cuda")
    product = tome_cuda.operators().linear_product
    others = build((1, rows), j, k, dtype, True, 1.0, 1, "cuda")
    assert torch.equal(product(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(product(*others), F.linear(*others))
    shifted = torch.cat([bias[:1], bias])[1:]  # PyTorch's, by another algorithm
    assert torch.equal(product(x, weight, shifted), F.linear(x, weight, shifted))
    assert_same_bits(lambda: product(x, weight, bias))
    assert_replays(lambda: product(x, weight, bias), (x, weight, bias), others)
    torch.library.opcheck(product.default, (x, weight, bias))


PREPARED = """
import torch, torch.nn.functional as F, tome_cuda
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
x, weight, bias = (torch.randn(*shape, device="cuda").half() for shape in [(2, 50, 64), (96, 64), (96,)])
product = tome_cuda.operators().linear_product
"""
REPEATED = """
for images in (x, x, x[:1], x):
    product(images, weight, bias)
"""
CAPTURED = """
for images in (x, x[:1]):
    expected = F.linear(images, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(images, weight, bias)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(product(images, weight, bias), expected)
"""


@pytest.mark.skipif((torch.version.cuda or "")[:3] != "13.", reason="the library that was built with is CUDA 13's")
@pytest.mark.parametrize(
    ("program", "environment", "searches", "products"),
    [
        (REPEATED, {}, 2, 4),  # one for each shape
        (REPEATED, {"DISABLE_ADDMM_CUDA_LT": "1"}, 0, 0),
        # Of the first shape PyTorch's two, as no handle may be asked for in a capture, and ours; then one of each.
        (CAPTURED, {}, 5, 6),
    ],
)
def test_how_often_an_algorithm_is_looked_for(program, environment, searches, products):
    log = {name: value for name, value in os.environ.items() if not name.startswith("CUBLASLT_LOG")}
    log |= {"CUBLASLT_LOG_LEVEL": "5", **environment}
    command = [sys.executable, "-c", PREPARED + program]
    told = subprocess.run(command, env=log, capture_output=True, text=True, check=True).stdout
    assert told.count("[Api][cublasLtMatmulAlgoGetHeuristic]") == searches
    assert told.count("[Api][cublasLtMatmul]") == products


def test_products_of_few_rows_in_several_threads():
    """Each with a bias of its own, to which what they keep must not point for another."""

    def agrees(seed: int) -> bool:
        args = build((1, 50), 96, 64, torch.float16, True, 1.0, seed, "cuda")
        expected = F.linear(*args)
        return all(torch.equal(tome_cuda.operators().linear_product(*args), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, range(8)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_products_on_a_second_gpu():
    product = tome_cuda.operators().linear_product
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        few, many = (build((1, rows), 192, 64, torch.float16, True, 1.0, 0, device) for rows in (50, 16384))
        assert torch.equal(product(*few), F.linear(*few))
        torch.testing.assert_close(product(*many), F.linear(*many))
