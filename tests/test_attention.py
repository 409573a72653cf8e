"""Laws of size-biased attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE, strided

import tome_reference
from tome import ops

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@st.composite
def attention_inputs(draw: st.DrawFn):
    batch, heads, n, d = (draw(st.integers(*limits)) for limits in ((0, 3), (1, 3), (1, 70), (1, 40)))
    dtype, layout = draw(st.sampled_from(HALF_AND_SINGLE)), draw(st.sampled_from(("contiguous", "packed")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = (strided(torch.randn(batch, heads, n, d, generator=generator).to(dtype), layout) for _ in range(3))
    size = torch.randint(1, 30, (batch, n), generator=generator).float() if draw(st.booleans()) else None
    return q, k, v, size


def explicit(q, k, v, size, scale=None):
    """The definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    score = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if size is not None:
        score = score + size.double().log()[:, None, None, :]
    return score.softmax(-1) @ v


@given(inputs=attention_inputs(), scale=st.sampled_from((None, 0.3)))
def test_attention_equals_its_definition(device, inputs, scale):
    q, k, v, size = inputs
    out = ops.attention(*(None if t is None else t.to(device) for t in inputs), scale=scale)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.cpu().double(), explicit(q, k, v, size, scale), rtol=0, atol=TOLERANCE[q.dtype])


@given(inputs=attention_inputs())
def test_a_size_stands_for_that_many_copies_of_a_key(device, inputs):
    q, k, v, size = (None if t is None else t.to(device) for t in inputs)
    if size is None:
        size = torch.ones(k.shape[0], k.shape[2], device=device)
    for b in range(len(q)):
        copies = size[b].long()
        many = [t[b : b + 1].repeat_interleave(copies, dim=2) for t in (k, v)]
        one = ops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], size[b : b + 1])
        expected = ops.attention(q[b : b + 1], *many)
        torch.testing.assert_close(one, expected, rtol=0, atol=2 * TOLERANCE[q.dtype])


def test_attention_gradients_of_the_reference():
    """Finite differences need float64, which the reference alone has: the others are held to its gradients."""
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    size = torch.randint(1, 9, (2, 7)).float()
    assert torch.autograd.gradcheck(lambda q, k, v: tome_reference.attention(q, k, v, size), (q, k, v))


@given(inputs=attention_inputs(), scale=st.sampled_from((None, 0.3)))
def test_attention_gradients_are_those_of_the_reference_in_float64(device, inputs, scale):
    *leaves, size = (None if t is None else t.to(device) for t in inputs)
    if leaves[0].numel() == 0:
        return
    grad = torch.randn(leaves[0].shape, device=device).to(leaves[0].dtype)
    found = []
    for module, dtype in ((ops, leaves[0].dtype), (tome_reference, torch.float64)):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in leaves)
        found.append(torch.autograd.grad(module.attention(q, k, v, size, scale), (q, k, v), grad.to(dtype)))
    for ours, exact in zip(*found, strict=True):
        atol = TOLERANCE[ours.dtype] * (1 + float(exact.abs().max()) if exact.numel() else 1)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_one_token_off_a_boundary(device, dtype):
    """Kernels of torch's own fail on this on a GPU."""
    leaf = torch.randn(1 + 2 * 3 * 64, device=device).to(dtype).requires_grad_()
    token = leaf[1:].view(2, 3, 1, 64)
    out = ops.attention(token, token, token, torch.ones(2, 1, device=device))
    torch.testing.assert_close(out, token, rtol=0, atol=TOLERANCE[dtype])
    out.sum().backward()
    assert bool(leaf.grad[1:].isfinite().all())


def test_dropout_drops(device):
    q = torch.randn(1, 1, 64, 8, device=device)
    assert not torch.equal(ops.attention(q, q, q, dropout_p=0.5), ops.attention(q, q, q))


def test_scale_default_is_one_over_root_d(device):
    q = torch.randn(1, 1, 5, 16, device=device)
    assert torch.equal(ops.attention(q, q, q), ops.attention(q, q, q, scale=1 / math.sqrt(16)))
