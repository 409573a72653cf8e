"""Laws of the norm of SwiGLU's first channels, wherever they lie, and of the MLP that fills its rows for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EMULATOR, NO_EXTENSION
from cuda_emulator import begin, end
from cuda_emulator.guard import at_the_end
from gpu import assert_replays, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE
from test_activation import build

import tome
import tome_cuda
import tome_reference
from tome import backend, ops, tokens
from tome.tokens import GatedParts, Norm

CASES = (
    st.sampled_from([(), (0,), (3,), (2, 5), (2, 0), (2, 3, 7)]),
    st.sampled_from((1, 3, 8, 64, 100, 264, 1032, 2736, 3000, 4104)) | st.integers(1, 40),
    st.sampled_from((0.0, 0.3, 0.99, 1.0)),
    st.sampled_from(HALF_AND_SINGLE),
    st.sampled_from(["contiguous", "misaligned", "stepped", "halves"]),
    st.sampled_from([None, torch.float32, torch.float16]),
    st.integers(0, 2**31 - 1),
)


def arguments(shape, channels, share, dtype, layout, affine, seed, device="cpu"):
    """Of the norm, too."""
    gate, x = build(shape, channels, dtype, layout, 1.0, seed, device)
    width = max(1, round(share * channels))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, width, generator=generator).to(affine or dtype).to(device)
    weight, bias = (None, None) if affine is None else drawn
    return gate, x, width, weight, bias, 1e-6


def check(found, gate, x, width, weight, bias, eps):
    """In float32, where what is nearly constant is divided by nearly nothing; rounded once. Zeros behind."""
    hidden = (F.silu(gate.double()) * x.double())[..., :width]
    weight, bias = (None if p is None else p.double() for p in (weight, bias))
    truth = F.layer_norm(hidden, (width,), weight, bias, eps)
    assert (found.shape, found.dtype) == (gate.shape, gate.dtype)
    assert not found[..., width:].any()
    scale = (
        hidden.abs().amax(-1, keepdim=True)
        / ((hidden - hidden.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).sqrt()
    )
    scale = scale * (1.0 if weight is None else weight.abs()) + (0.0 if bias is None else bias.abs())
    slack = 0.501 * torch.finfo(found.dtype).eps * truth.abs() + 2.0**-19 * scale + torch.finfo(found.dtype).tiny
    assert bool(((found[..., :width].double() - truth).abs() <= slack).all())


@given(*CASES)
def test_swiglu_norm(device, shape, channels, share, dtype, layout, affine, seed):
    args = arguments(shape, channels, share, dtype, layout, affine, seed, device)
    if tome.get_backend() == "reference" and dtype is not torch.float32:
        assert torch.equal(ops.swiglu_norm(*args), tome_reference.swiglu_norm(*args))
    else:
        check(ops.swiglu_norm(*args), *args)


@NO_EMULATOR
@given(*CASES[1:])
def test_the_kernels_source(channels, share, dtype, layout, affine, seed):
    """Nothing is read behind the end of a tensor; one launch."""
    for n in (1, 5):
        gate, x, width, *others = arguments((2, n), channels, share, dtype, layout, affine, seed)
        args = (*map(at_the_end, (gate, x)), width, *(at_the_end(p) if torch.is_tensor(p) else p for p in others))
        begin(seed)
        check(torch.ops.tome_emulated.swiglu_norm(*args), *args)
        assert end() == 1


def test_gradients(device):
    gate, x, width, weight, bias, eps = arguments(
        (2, 9), 12, 0.8, torch.float32, "contiguous", torch.float32, 0, device
    )
    found = []
    for module in (ops, tome_reference):
        leaves = [value.clone().requires_grad_() for value in (gate, x, weight, bias)]
        out = module.swiglu_norm(*leaves[:2], width, *leaves[2:], eps)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("is_gate_last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_filled_with_zeros_change_nothing(is_packed, is_gate_last, biased, normed, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def layer(rows, columns):
        bias = torch.randn(rows, generator=generator).double() if biased else None
        return torch.randn(rows, columns, generator=generator).double(), bias

    first = (layer(2 * 13, 6),) if is_packed else (layer(13, 6), layer(13, 6))
    norm = Norm(torch.randn(13).double(), torch.randn(13).double(), 1e-5) if normed else None
    parts = GatedParts(first, is_gate_last, norm, layer(6, 13))
    y = torch.randn(2, 9, 6, generator=generator).double()
    expected = parts.value(y)
    monkeypatch.setattr(backend, "takes_kernels", lambda x: True)
    assert torch.equal(parts.value(y), expected)  # few rows
    monkeypatch.setattr(tokens, "MANY_ROWS", 18)
    seen = []
    name = "swiglu_norm" if normed else "swiglu"
    monkeypatch.setattr(ops, name, lambda *args: seen.append(args[0].shape[2]) or getattr(tome_reference, name)(*args))
    torch.testing.assert_close(parts.value(y), expected)
    assert seen == [16]


@pytest.mark.filterwarnings("ignore:.*")
def test_compiles(device):
    torch._dynamo.reset()
    args = arguments((2, 9), 12, 0.8, torch.float32, "halves", torch.float32, 0, device)
    function = torch.compile(ops.swiglu_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(function(*args), ops.swiglu_norm(*args))


@NO_EXTENSION
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_on_a_gpu(dtype):
    gate, x, *others = arguments((4, 197), 2736, 2730 / 2736, dtype, "halves", torch.float32, 0, "cuda")
    check(tome_cuda.swiglu_norm(gate, x, *others), gate, x, *others)
    assert_same_bits(lambda: [tome_cuda.swiglu_norm(gate, x, *others)])
    new = [torch.randn_like(gate), torch.randn_like(x)]
    assert_replays(lambda: [tome_cuda.swiglu_norm(gate, x, *others)], (gate, x), new)
    torch.library.opcheck(tome_cuda.operators().swiglu_norm.default, (gate, x, *others))
    with tome.use_backend("cuda"):
        check(ops.swiglu_norm(gate, x, *others), gate, x, *others)
