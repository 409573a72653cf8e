"""The kernels of a linear layer with its GELU: every tile is as near to the truth as PyTorch's two steps, or nearer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits, assert_writes_nothing_else, compiled
from hypothesis import given
from hypothesis import strategies as st
from test_linear_gelu import HALVES, KINDS, build, exactly, two_steps

import tome
import tome_cuda
import tome_reference
from tome import ops
from tome_cuda import predicates

pytestmark = NO_EXTENSION

TILES = 3  # of csrc/product/product.cpp
HAS_PRODUCTS = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def check_no_worse(found, theirs, truth):
    """At most PyTorch's error in the largest and in the mean, where there are many numbers."""
    assert (found.shape, found.dtype) == (truth.shape, theirs.dtype)
    assert bool(found.isfinite().all())
    if found.numel() == 0:
        return
    ours, error = (found.double() - truth).abs(), (theirs.double() - truth).abs()
    unit = torch.finfo(found.dtype).eps * truth.abs() + torch.finfo(found.dtype).smallest_normal
    if found.numel() >= 1024:
        assert ours.max() <= 1.01 * error.max()  # sums in another order lie on another side of a tie
        assert ours.mean() <= 1.002 * error.mean()
    # Half a unit for the rounding, less than that for the formula, the rest for sums in float32.
    assert bool((ours <= 0.95 * unit + 2.0**-16 * (1.0 + truth.abs())).all())


@HAS_PRODUCTS
@given(
    *(st.integers(1, 700), st.integers(1, 60), st.integers(1, 60), st.sampled_from(HALVES), st.booleans()),
    *(st.sampled_from(KINDS), st.sampled_from((1.0, 4.0)), st.integers(0, TILES - 1)),
    st.integers(0, 2**31 - 1),
)
def test_every_tile(rows, j, k, dtype, has_bias, approximate, scale, tile, seed):
    x, weight, bias = build((1, rows), 8 * j, 8 * k, dtype, has_bias, scale, seed, "cuda")
    found = tome_cuda.operators().linear_gelu(x, weight, bias, approximate == "tanh", tile)
    args = x, weight, bias, approximate
    check_no_worse(found, two_steps(*args), exactly(*args))


@HAS_PRODUCTS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of opcheck
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch records one of its own first
@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("j", "k"), [(3072, 768), (4096, 1024)])
def test_on_a_gpu(j, k, dtype, approximate):
    x, weight, bias = build((32, 197), j, k, dtype, True, 2.0, 0, "cuda")
    with tome.use_backend("cuda"), torch.no_grad():
        assert predicates.remark("linear_gelu", x, weight, bias) is None
        args = x, weight, bias, approximate
        check_no_worse(ops.linear_gelu(*args), two_steps(*args), exactly(*args))
        padded = torch.cat([x, x], dim=2)[..., :k]
        assert torch.equal(ops.linear_gelu(padded, *args[1:]), ops.linear_gelu(*args))
        assert torch.equal(ops.linear_gelu(x.view(2, 16, 197, k), *args[1:]).flatten(0, 1), ops.linear_gelu(*args))
        assert_same_bits(lambda: ops.linear_gelu(*args))
        assert_replays(lambda: ops.linear_gelu(*args), (x, weight), (x.flip(0), weight.flip(0)))
        by_graph = compiled(lambda x: ops.linear_gelu(x, *args[1:]))
        assert torch.equal(by_graph(x), ops.linear_gelu(*args))
        with torch.autocast("cuda", dtype):
            wide = x.float(), weight.float(), bias.float(), approximate
            assert torch.equal(ops.linear_gelu(*wide), ops.linear_gelu(*args))
            fc2, norm = (weight.float().T.contiguous(), None), (None, None, 1e-5)
            kind = "tanh" if approximate == "tanh" else "erf"
            half = ops.mlp_half(x.float(), x, wide[1:3], kind, fc2, None, norm, dtype)
            branch = F.linear(ops.linear_gelu(*args), *fc2)
            parts = ops.merge_add_norm(x.float(), branch, None, 197, None, *norm, None, dtype)
            assert all(map(torch.equal, half, parts))
        unaligned = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(j, k)
        behind = ops.linear_gelu(x, unaligned, *args[2:])
        torch.testing.assert_close(behind, two_steps(x, unaligned, *args[2:]), rtol=torch.finfo(dtype).eps, atol=1e-6)
        theirs = tome_reference.linear_gelu(*args)
    operator = tome_cuda.operators().linear_gelu.default
    torch.library.opcheck(operator, (x, weight, bias, approximate == "tanh", -1))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    operator(*leaves, approximate == "tanh", -1).backward(torch.ones_like(theirs))
    expected = [t.clone().requires_grad_() for t in (x, weight, bias)]
    two_steps(*expected, approximate).backward(torch.ones_like(theirs))
    for ours, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=0.02, atol=0.01 * float(other.grad.abs().max()))


@HAS_PRODUCTS
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "j", "k"),
    [
        (16384, 2304, 768),
        (20001, 768, 768),
        (16385, 1152, 384),
        (16390, 3824, 24),
        (17000, 1024, 1024),
        (9000, 192, 64),
    ],
)
def test_a_product_without_gelu(rows, j, k, dtype):
    """By a kernel of ours where there are many rows: of the first four shapes."""
    x, weight, bias = build((1, rows), j, k, dtype, True, 1.0, 0, "cuda")
    for given_bias in (bias, None):
        found = tome_cuda.operators().linear_product(x, weight, given_bias)
        theirs = F.linear(x, weight, given_bias)
        truth = F.linear(x.double(), weight.double(), None if given_bias is None else given_bias.double())
        ours, error = (found.double() - truth).abs(), (theirs.double() - truth).abs()
        assert ours.max() <= 1.01 * error.max()
        assert ours.mean() <= 1.002 * error.mean()
    assert_same_bits(lambda: tome_cuda.operators().linear_product(x, weight, bias))
    torch.library.opcheck(tome_cuda.operators().linear_product.default, (x, weight, bias))


@HAS_PRODUCTS
@pytest.mark.parametrize(("rows", "j"), [(32, 8), (96, 200), (160, 392), (520, 3072)])
def test_a_product_with_gelu_writes_nothing_else(rows, j):
    """What a tile has beyond the last row or column is left out by the bulk copy that stores it."""
    x, weight, bias = build((1, rows), j, 72, torch.float16, True, 1.0, 0, "cuda")
    operator = tome_cuda.operators().linear_gelu
    for tile in range(TILES):
        assert_writes_nothing_else(lambda tile=tile: operator(x, weight, bias, False, tile), 2 * rows * j)


@HAS_PRODUCTS
def test_a_product_without_gelu_writes_nothing_else():
    x, weight, bias = build((1, 16416), 184, 72, torch.float16, True, 1.0, 0, "cuda")
    assert_writes_nothing_else(lambda: tome_cuda.operators().linear_product(x, weight, bias), 2 * 16416 * 184)


@HAS_PRODUCTS
def test_limits_on_a_gpu():
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 6e4, -6e4, 20.0, -20.0], device="cuda")
    for dtype in HALVES:
        x = torch.zeros(1, 8, 8, device="cuda", dtype=dtype)
        x[0, :, 0] = numbers
        weight = torch.zeros(8, 8, device="cuda", dtype=dtype)
        weight[:, 0] = 1
        for is_tanh in (False, True):
            found = tome_cuda.operators().linear_gelu(x, weight, None, is_tanh, 0)
            theirs = two_steps(x, weight, None, "tanh" if is_tanh else "none")
            torch.testing.assert_close(found, theirs, equal_nan=True, rtol=0, atol=1e-30)


def test_the_operator_refuses_tiles_that_it_lacks():
    x, weight, _ = build((1, 8), 8, 8, torch.float16, device="cuda")
    empty = tome_cuda.operators().linear_gelu(x[:, :0], weight, None, False, -1)
    assert empty.shape == (1, 0, 8)
    with pytest.raises(RuntimeError, match=r"tile must be in \[-1, 3\), got 3"):
        tome_cuda.operators().linear_gelu(x, weight, None, False, 3)
    with pytest.raises(RuntimeError, match="tile must be -1, got 0"):
        tome_cuda.operators().linear_gelu(x.float(), weight.float(), None, False, 0)
