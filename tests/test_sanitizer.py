"""Every kernel and every path of it on small odd shapes: what compute-sanitizer runs on.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -m sanitizer --share 0/6

Without torch's cache every allocation ends where it is said to end. Values are held to the definitions elsewhere: here
as few kernels of torch's own as can be are launched.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from backends import NO_EXTENSION
from gpu import generator
from norm_cases import DTYPES, NormCase
from strategies import HEAD_DIMS, Case, Map, strided
from torch import Tensor

import tome_cuda

pytestmark = [NO_EXTENSION, pytest.mark.sanitizer]

HALF_DTYPES = (torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "packed", "misaligned", "stepped")
SHORT = product((3, 17, 197), (3, 16, 72), LAYOUTS)
LONG = product((577, 1030), (1, 64, 80, 200, 256), ("packed",))
LONGEST = product((2100,), (64, 72), ("packed",))
ROWS = (*product((2,), (1, 33, 197, 1100), (1, 8, 100, 264, 768, 1024, 1280)), *product((9,), (2100,), (8, 100)))
LENGTHS = (1, 16, 33, 70, 101, 197, 212, 256, 270, 400)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "layout"), [*SHORT, *LONG, *LONGEST])
def test_matching(n: int, d: int, layout: str, dtype: torch.dtype) -> None:
    keys = Case(2, n, d, 3, n // 3, 1, dtype, layout, "normal", n + d).keys("cuda")
    assert int(tome_cuda.match(keys, n // 3).max()) == n - n // 3 - 1
    if n < 200:
        assert int(tome_cuda.kth_match(keys, 2).max()) == (n - 1) // 2
        assert int(tome_cuda.random_match(keys, n // 3).max()) == n - n // 3 - 1


def parts(n: int) -> list[int]:
    """All tokens merged into one, half of them, and none."""
    return sorted({1, max(1, n // 2), n})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "channels"), ROWS)
def test_merging(batch: int, n: int, channels: int, dtype: torch.dtype) -> None:
    for tokens in parts(n):
        x, slot, size = Map(batch, n, tokens, channels, dtype, "contiguous", True, n).build("cuda")
        x.requires_grad_()
        tome_cuda.unmerge(tome_cuda.merge(x, slot, tokens, size)[0], slot).sum().backward()
        assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "channels"), ROWS)
def test_norms(batch: int, n: int, channels: int, dtype: torch.dtype) -> None:
    """With a map, without one, and without a branch; with gradients."""
    branch = torch.float16 if dtype is torch.float32 else dtype
    for tokens in parts(n):
        case = NormCase(
            *(batch, n, tokens, channels, tokens < n, tokens < n, dtype, branch, branch),
            parameters=(torch.float32, None, torch.float32),
            layouts=("dense", "dense"),
            crowded=False,
            skip=min(1, n - 1),
            seed=n,
        )
        call = case.build("cuda")
        leaves = [value.requires_grad_() for value in (call.x, call.branch, call.weight, call.gamma)]
        out, y, _ = tome_cuda.merge_add_norm(*call)
        (out.sum() + y.sum()).backward()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)
    y = tome_cuda.merge_add_norm(call.x.detach(), None, None, n, None, call.weight.detach(), None, 1e-5)[1]
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "channels"), ROWS)
def test_the_way_back(batch: int, n: int, channels: int, dtype: torch.dtype) -> None:
    maps = [
        Map(batch, before, after, 1, dtype, "contiguous", False, n) for before, after in ((n + 7, n + 2), (n + 2, n))
    ]
    steps = [case.build("cuda")[1] for case in maps]
    x, branch = torch.randn(2, batch, n, channels, device="cuda", generator=generator(n)).to(dtype)
    gamma = torch.ones(channels, device="cuda")
    assert int(tome_cuda.follow(steps).max()) == n - 1
    for arguments in ((branch, steps, gamma), (branch, steps), (None, steps), (branch, ())):
        assert bool(tome_cuda.restore(x, *arguments).isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["packed", "misaligned", "stepped"])
@pytest.mark.parametrize(("n", "d"), [*product((1, 33, 197), (2, 32, 64, 72, 80, 88, 128))])
def test_places(n: int, d: int, layout: str, dtype: torch.dtype) -> None:
    """Queries and keys turned there and back, by a table for all and one for each head and image; and homes."""
    q, k = (heads(n, d, dtype, layout, seed).requires_grad_() for seed in range(2))
    table = torch.randn(2, 3, n + 3, 2 * d, device="cuda", generator=generator(n))
    home = torch.arange(n, device="cuda").expand(2, n).add(3)
    for is_half, rows, place in ((True, table[0, 0, 3:], None), (False, table, home), (True, table.half(), home.int())):
        turned = tome_cuda.rotate(q, k, rows, place, 0, is_half)
        assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(turned, (q, k), turned))
    _, slot, _ = Map(2, n, max(1, n // 2), 1, torch.float32, "contiguous", False, n).build("cuda")
    assert int(tome_cuda.homes(slot, max(1, n // 2), home).min()) >= 3
    bias = strided(torch.randn(3, n + 3, n + 3, device="cuda", generator=generator(n)).to(dtype), "stepped")
    assert bool(tome_cuda.pair_bias(bias, home, home.float()).isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "channels"), ROWS)
def test_activations(batch: int, n: int, channels: int, dtype: torch.dtype) -> None:
    packed = torch.randn(batch, n, 2 * channels, device="cuda", generator=generator(n)).to(dtype)
    gate, x = packed.chunk(2, dim=2)
    normed = tome_cuda.swiglu_norm(gate, x, max(1, channels - 3), None, None, 1e-5)
    for found in (tome_cuda.quick_gelu(packed), tome_cuda.quick_gelu(x), tome_cuda.swiglu(gate, x), normed):
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("tile", range(-1, 3))
@pytest.mark.parametrize(("rows", "k", "j"), [*product((1, 127, 700), (8, 72, 264), (8, 200, 392))])
def test_linear_gelu(rows: int, k: int, j: int, tile: int, dtype: torch.dtype) -> None:
    """Where there are no products the operator is torch's own."""
    tile = tile if torch.cuda.get_device_capability() == (9, 0) else -1
    x, weight = (torch.randn(n, k, device="cuda", generator=generator(n)).to(dtype) for n in (rows, j))
    for bias in (weight[:, 0].contiguous(), None):
        found = tome_cuda.operators().linear_gelu(x[None], weight, bias, rows == 127, tile)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
@pytest.mark.parametrize(("n", "channels"), [*product((2, 17, 70), (64, 96))])
def test_halves_in_training(n: int, channels: int, gelu: str, dtype: torch.dtype) -> None:
    """Parameters that are cast, with LayerScale and stochastic depth."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator(n)).requires_grad_()

    x, y, drop = normal(3, n, channels), normal(3, n, channels), torch.tensor([0.0, 1.0, 2.0], device="cuda")
    vectors = [normal(channels) for _ in range(4)]
    gamma, norm = vectors[0], (vectors[1], vectors[2], 1e-5)
    qkv, proj = (normal(3 * channels, channels), normal(3 * channels)), (normal(channels, channels), vectors[3])
    fc1, fc2 = (normal(4 * channels, channels), normal(4 * channels)), (normal(channels, 4 * channels), None)
    with torch.autocast("cuda", dtype):
        left = n - (n - 1) // 4
        attend = x, (y.to(dtype),), channels // 32, None, None, left, 1, True, None, qkv, proj, gamma, norm, dtype, drop
        merged, normed, _, _ = tome_cuda.attend_half(*attend)
        outs = tome_cuda.mlp_half(merged, normed, fc1, gelu, fc2, gamma, norm, dtype, drop)
    sum(out.float().sum() for out in outs).backward()
    leaves = (x, y, *vectors, *qkv, *proj, *fc1, fc2[0])
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def heads(n: int, d: int, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    return strided(torch.randn(2, 3, n, d, device="cuda", generator=generator(seed)).to(dtype), layout)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("layout", ["packed", "misaligned"])
@pytest.mark.parametrize(("n", "d"), [*product(LENGTHS, HEAD_DIMS)])
def test_attention(n: int, d: int, layout: str, dtype: torch.dtype) -> None:
    q, k, v = (heads(n, d, dtype, layout, seed) for seed in range(3))
    size = torch.randint(0, 9, (2, n), device="cuda", generator=generator(n)).float()
    size[:, 0] = 1.0
    assert bool(tome_cuda.attention(q[:, :, : n - n // 3], k, v, size).isfinite().all())
    assert bool(tome_cuda.attention(q, k, v).isfinite().all())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("layout", ["packed", "misaligned"])
@pytest.mark.parametrize(("n", "d"), [*product(LENGTHS, HEAD_DIMS)])
def test_attention_in_training(n: int, d: int, layout: str, dtype: torch.dtype) -> None:
    """As many queries as keys, and fewer; a gradient that lies as the layout has it."""
    q, k, v, grad = (heads(n, d, dtype, layout, seed) for seed in range(4))
    size = torch.randint(0, 9, (2, n), device="cuda", generator=generator(n)).float()
    size[:, 0] = 1.0
    for queries, sizes in ((n, size), (n - n // 3, None)):
        leaves = [t.detach().requires_grad_() for t in (q[:, :, :queries], k, v)]
        with torch.enable_grad():
            out = tome_cuda.attention(*leaves, sizes)
            grads = torch.autograd.grad(out, leaves, grad[:, :, :queries])
        assert all(bool(t.isfinite().all()) for t in (out, *grads))
