"""Laws of the activations: quick GELU and SwiGLU, wherever their channels lie."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EMULATOR, NO_EXTENSION
from cuda_emulator import begin, end
from cuda_emulator.guard import at_the_end
from gpu import assert_replays, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE, LAYOUTS, strided
from torch import Tensor

import tome
import tome_cuda
import tome_reference
from tome import ops

CHANNELS = st.sampled_from((1, 3, 8, 24, 64, 100, 264, 1028)) | st.integers(1, 40)
CASES = (
    st.sampled_from([(), (0,), (3,), (2, 5), (1, 33), (2, 0), (2, 3, 7)]),
    CHANNELS,
    st.sampled_from(HALF_AND_SINGLE),
    st.sampled_from((*LAYOUTS, "halves")),
    st.sampled_from((1.0, 100.0, 1e4)),
    st.integers(0, 2**31 - 1),
)


def build(shape, channels, dtype, layout, scale, seed, device="cpu"):
    """Two tensors: apart, or the halves of one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels):
        return (scale * torch.randn(*shape, channels, generator=generator)).to(dtype).to(device)

    if layout == "halves":
        return draw(2 * channels).chunk(2, dim=-1)
    if layout == "transposed" and not shape:
        layout = "contiguous"
    return strided(draw(channels), layout), strided(draw(channels), layout)


def exactly(gate, x=None):
    gate = gate.double()
    return gate * torch.sigmoid(1.702 * gate) if x is None else gate * torch.sigmoid(gate) * x.double()


def check(found, *args):
    """In float32, where the exponent's rounding counts the more the larger it is; rounded once.

    A sigmoid below 2^-124 may be zero.
    """
    value, limit = exactly(*args), torch.finfo(found.dtype)
    assert (found.shape, found.dtype) == (args[0].shape, args[0].dtype)
    value = torch.where(value.abs() > limit.max, value.sign() * torch.inf, value)
    relative = 0.501 * limit.eps + 2.0**-22 * (1.0 + 1.702 * args[0].double().abs())
    wide = found.double()
    slack = (relative * value.abs()).nan_to_num(0, 0, 0) + limit.tiny * limit.eps
    slack += 2.0**-124 * args[0].double().abs() * (1.0 if len(args) == 1 else args[1].double().abs())
    is_close = (wide == value) | ((wide - value).abs() <= slack)
    # What is largest may round to infinity.
    assert bool((is_close | (wide.isinf() & (value.abs() > 0.99 * limit.max))).all())


@given(*CASES)
def test_activations(device, shape, channels, dtype, layout, scale, seed):
    gate, x = build(shape, channels, dtype, layout, scale, seed, device)
    found = ops.quick_gelu(gate), ops.swiglu(gate, x)
    if tome.get_backend() == "reference" and dtype is not torch.float32:
        theirs = tome_reference.quick_gelu(gate), tome_reference.swiglu(gate, x)
        assert all(
            torch.equal(ours.nan_to_num(), other.nan_to_num()) for ours, other in zip(found, theirs, strict=True)
        )
    else:
        check(found[0], gate)
        check(found[1], gate, x)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_reference_has_the_bits_of_the_libraries_modules(dtype):
    from timm.layers import QuickGELU
    from transformers.activations import QuickGELUActivation

    gate, x = 3 * torch.randn(2, 2, 9, 40).to(dtype)
    assert torch.equal(tome_reference.quick_gelu(x), QuickGELU()(x))
    assert torch.equal(tome_reference.quick_gelu(x), QuickGELUActivation()(x))
    assert torch.equal(tome_reference.swiglu(gate, x), torch.nn.SiLU()(gate) * x)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_what_is_no_number_or_has_no_end(device, dtype):
    x = torch.tensor([[[torch.nan, torch.inf, 0.0, -0.0, 60.0, -60.0]]], dtype=dtype, device=device)
    one = torch.ones_like(x)
    for found in (ops.quick_gelu(x), ops.swiglu(x, one)):
        assert found.isnan().tolist() == [[[True, *[False] * 5]]]
        assert found[0, 0, 1:5].tolist() == [torch.inf, 0.0, 0.0, 60.0]
        assert 0.0 >= float(found[0, 0, 5]) >= -1e-24
    assert bool(ops.swiglu(one, x)[0, 0, 0].isnan())
    assert float(ops.swiglu(one, x)[0, 0, 1]) == torch.inf


def test_gradients(device):
    """Those of the formulas, computed by torch."""
    found = []
    for module in (ops, tome_reference):
        gate, x = (value.requires_grad_() for value in build((2, 9), 12, torch.float32, "contiguous", 1.0, 0, device))
        (module.quick_gelu(x) * module.swiglu(gate, x)).sum().backward()
        found.append((gate.grad, x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = [value.double().requires_grad_() for value in build((3,), 4, torch.float32, "contiguous", 1.0, 0)]
    assert torch.autograd.gradcheck(tome_reference.swiglu, leaves)
    assert torch.autograd.gradcheck(tome_reference.quick_gelu, leaves[:1])


@pytest.mark.filterwarnings("ignore:.*")
def test_compiles(device):
    torch._dynamo.reset()
    function = torch.compile(lambda gate, x: ops.swiglu(gate, ops.quick_gelu(x)), backend="eager", fullgraph=True)
    gate, x = build((2, 9), 12, torch.float32, "halves", 1.0, 0, device)
    torch.testing.assert_close(function(gate, x), ops.swiglu(gate, ops.quick_gelu(x)))


@NO_EMULATOR
@given(*CASES[1:])
def test_the_kernels_source(channels, dtype, layout, scale, seed):
    """Nothing is read behind the end of a tensor; one launch each."""
    for n in (1, 300):
        gate, x = map(at_the_end, build((2, n), channels, dtype, layout, scale, seed))
        begin(seed)
        check(torch.ops.tome_emulated.quick_gelu(x), x)
        check(torch.ops.tome_emulated.swiglu(gate, x), gate, x)
        assert end() == 2


@NO_EXTENSION
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_on_a_gpu(dtype):
    gate, x = build((4, 197), 3072, dtype, "halves", 4.0, 0, "cuda")
    check(tome_cuda.quick_gelu(x), x)
    check(tome_cuda.swiglu(gate, x), gate, x)
    assert_same_bits(lambda: [tome_cuda.quick_gelu(x), tome_cuda.swiglu(gate, x)])
    others: list[Tensor] = [torch.randn_like(gate), torch.randn_like(x)]
    assert_replays(lambda: [tome_cuda.quick_gelu(x), tome_cuda.swiglu(gate, x)], (gate, x), others)
    torch.library.opcheck(tome_cuda.operators().quick_gelu.default, (x,))
    torch.library.opcheck(tome_cuda.operators().swiglu.default, (gate, x))
