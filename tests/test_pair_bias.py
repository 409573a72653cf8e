"""Laws of the mask of merged tokens, where each pair of original tokens has a bias."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EMULATOR, NO_EXTENSION
from cuda_emulator import begin, end
from cuda_emulator.guard import at_the_end
from gpu import assert_replays, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE, strided

import tome
import tome_cuda
from tome import ops

CASES = (
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from((1, 2, 9, 33, 130)),
    st.sampled_from((0, 1, 5, 8, 31, 130, 150)),
    st.sampled_from(HALF_AND_SINGLE),
    st.sampled_from(["contiguous", "stepped", "transposed"]),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)


def build(batch, heads, places, tokens, dtype, layout, has_key_bias, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    bias = strided(torch.randn(heads, places, places, generator=generator).to(dtype).to(device), layout)
    home = torch.randint(places, (batch, tokens), generator=generator).to(device)
    key_bias = torch.rand(batch, tokens, generator=generator).to(device) if has_key_bias else None
    return bias, home, key_bias


def check(found, bias, home, key_bias):
    """The sum in float32, rounded once; rows where kernels of attention read them without a copy."""
    batch, tokens = home.shape
    assert (found.shape, found.dtype) == ((batch, bias.shape[0], tokens, tokens), bias.dtype)
    assert not found.numel() or all(stride % 8 == 0 for stride in found.stride()[:-1])
    for b in range(batch):
        expected = bias[:, home[b]][:, :, home[b]]
        if key_bias is not None:
            expected = (expected.float() + key_bias[b].float()).to(bias.dtype)
        assert torch.equal(found[b], expected)


@given(*CASES)
def test_pair_bias(device, batch, heads, places, tokens, dtype, layout, has_key_bias, seed):
    args = build(batch, heads, places, tokens, dtype, layout, has_key_bias, seed, device)
    check(ops.pair_bias(*args), *args)


@NO_EMULATOR
@given(*CASES)
def test_the_kernels_source(batch, heads, places, tokens, dtype, layout, has_key_bias, seed):
    """Nothing is read behind the end of a tensor; one launch; zeros fill the rows."""
    args = build(batch, heads, places, tokens, dtype, layout, has_key_bias, seed)
    args = tuple(None if value is None else at_the_end(value) for value in args)
    begin(seed)
    found = torch.ops.tome_emulated.pair_bias(*args)
    assert end() == (1 if found.numel() else 0)
    assert not found[..., tokens:].any()
    check(found[..., :tokens], *args)


def test_a_place_that_the_bias_lacks_is_seen(device):
    for bad in (9, -1):
        bias, home, _ = build(2, 3, 9, 6, torch.float32, "contiguous", False, 0, device)
        home[0, 3] = bad
        if tome.get_backend() == "cuda":
            is_bad = torch.zeros(2, 3, 6, 6, dtype=torch.bool, device=device)
            is_bad[0, :, 3], is_bad[0, :, :, 3] = True, True
            assert torch.equal(ops.pair_bias(bias, home).isnan(), is_bad)
        elif device.type == "cpu":
            with pytest.raises((IndexError, RuntimeError)):
                ops.pair_bias(bias, home)


def test_gradients(device):
    bias, home, key_bias = build(2, 3, 9, 6, torch.float32, "contiguous", True, 0, device)
    leaf = bias.clone().requires_grad_()
    ops.pair_bias(leaf, home, key_bias).sum().backward()
    counts = torch.stack([row.bincount(minlength=9) for row in home]).float()
    torch.testing.assert_close(leaf.grad, (counts[:, :, None] * counts[:, None]).sum(0).expand_as(bias))


@pytest.mark.filterwarnings("ignore:.*")
def test_compiles(device):
    torch._dynamo.reset()
    args = build(2, 3, 9, 6, torch.float32, "contiguous", True, 0, device)
    function = torch.compile(ops.pair_bias, backend="eager", fullgraph=True)
    assert torch.equal(function(*args), ops.pair_bias(*args))


@NO_EXTENSION
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_on_a_gpu(dtype):
    args = build(4, 12, 197, 181, dtype, "contiguous", True, 0, "cuda")
    check(tome_cuda.pair_bias(*args), *args)
    assert_same_bits(lambda: [tome_cuda.pair_bias(*args)])
    bias, home, key_bias = args
    others = [torch.randn_like(bias), home.flip(1), torch.rand_like(key_bias)]
    assert_replays(lambda: [tome_cuda.pair_bias(*args)], args, others)
    torch.library.opcheck(tome_cuda.operators().pair_bias.default, args)
    q = torch.randn(4, 12, 181, 64, device="cuda").to(dtype)  # attention takes it
    seen = torch.nn.functional.scaled_dot_product_attention(q, q, q, tome_cuda.pair_bias(*args))
    assert bool(seen.isfinite().all())
