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

FEW_ROWS = [(197, 2304, 768), (197, 768, 768), (101, 768, 3072), (1576, 768, 3072), (33, 40, 24), (7, 5, 3), (1, 3, 2)]


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


ASKING = """
import torch, tome_cuda
x, weight, bias = (torch.randn(*shape, device="cuda").half() for shape in [(2, 50, 64), (96, 64), (96,)])
for images in (x, x, x[:1], x):
    tome_cuda.operators().linear_product(images, weight, bias)
"""


def test_an_algorithm_is_looked_for_once():
    log = {**os.environ, "CUBLASLT_LOG_LEVEL": "5"}
    told = subprocess.run([sys.executable, "-c", ASKING], env=log, capture_output=True, text=True, check=True).stdout
    assert told.count("[Api][cublasLtMatmulAlgoGetHeuristic]") == 2
    assert told.count("[Api][cublasLtMatmul]") == 4


def test_products_of_few_rows_in_several_threads():
    """Each with a bias of its own, to which what they keep must not point for another."""

    def agrees(seed: int) -> bool:
        args = build((1, 50), 96, 64, torch.float16, True, 1.0, seed, "cuda")
        expected = F.linear(*args)
        return all(torch.equal(tome_cuda.operators().linear_product(*args), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, range(8)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_product_of_few_rows_on_a_second_gpu():
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        args = build((1, 50), 96, 64, torch.float16, True, 1.0, 0, device)
        assert torch.equal(tome_cuda.operators().linear_product(*args), F.linear(*args))


def test_a_graph_captured_without_a_pass_before_it():
    """Where nothing may be asked for yet the product is PyTorch's."""
    x, weight, bias = build((1, 61), 88, 72, torch.float16, True, 1.0, 0, "cuda")
    F.linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tome_cuda.operators().linear_product(x, weight, bias)
    graph.replay()
    assert torch.equal(out, F.linear(x, weight, bias))
