"""Attention on a GPU beyond the laws of every backend: agreement with float64 over lengths, widths and layouts,
borders, determinism, streams, graphs, compilation, registration, gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits, compiled, generator
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from strategies import HEAD_DIMS
from torch import Tensor

import tome
import tome_cuda
import tome_reference

pytestmark = NO_EXTENSION

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
SOME_LENGTHS = (
    *(1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 81, 101, 133, 149),
    *(197, 208, 225, 255, 256, 257, 376, 377, 577),
)
LENGTHS = st.one_of(st.sampled_from(SOME_LENGTHS), st.integers(1, 1500))
LAYOUTS = ("packed", "separate", "dense", "misaligned", "sparse")
SIZES = ("none", "ones", "small", "large", "some zero")


def lay(value: Tensor, layout: str) -> Tensor:
    """The same values [B, H, N, D], lying differently."""
    if layout == "packed":
        packed = torch.stack([value + 1, value, value + 2], dim=1).permute(0, 3, 1, 2, 4).contiguous()
        return packed[:, :, 1].transpose(1, 2)
    if layout == "separate":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "misaligned":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    if layout == "sparse":
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    return value


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """q [B, H, Nq, D], k and v [B, H, N, D], sizes; at most a few million numbers."""
    n, d, heads = draw(LENGTHS), draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from([1, 2, 3, 12]))
    queries = draw(st.one_of(st.just(n), LENGTHS))
    batch = min(draw(st.sampled_from([1, 2, 3, 64, 300])), max(1, 2_000_000 // (max(n, queries) * d * heads)))
    random, dtype = generator(draw(st.integers(0, 2**31 - 1))), draw(DTYPES)
    spread = draw(st.sampled_from([0.0, 1.0, 1.0, 6.0]))  # of the scores: all alike, usual, a few keys take all
    q, k, v = (
        torch.randn(batch, heads, rows, d, device="cuda", generator=random) * factor
        for rows, factor in ((queries, spread), (n, 1.0), (n, 1.0))
    )
    if draw(st.booleans()):  # scores that rise along the keys, so that the highest comes last
        k = k * torch.linspace(0.1, 3, n, device="cuda")[:, None]
    kind = draw(st.sampled_from(SIZES))
    size = None if kind == "none" else torch.ones(batch, n, device="cuda")
    if size is not None and kind != "ones":
        size = torch.randint(1, 300 if kind == "large" else 9, size.shape, device="cuda", generator=random).float()
        if kind == "some zero":
            size[:, 1:] *= torch.rand(size[:, 1:].shape, device="cuda", generator=random) < 0.5
        if draw(st.booleans()):
            size = size.repeat_interleave(2, dim=1)[:, ::2]
    return *(lay(t.to(dtype), draw(st.sampled_from(LAYOUTS))) for t in (q, k, v)), size


def explicit(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """The definition, in the dtype of q."""
    score = q @ k.transpose(-2, -1) * scale
    if size is not None:
        score = score + size.log().to(q.dtype)[:, None, None, :]
    return score.softmax(-1) @ v


@given(inputs(), st.sampled_from([None, 1e-5, 0.05, 1.0]))
def test_agrees_with_float64(drawn: Inputs, scale: float | None) -> None:
    """No further from the truth than the definition in the same dtype, but for the rounding of the result."""
    q, k, v, size = drawn
    before = [t.clone() for t in (q, k, v)]
    out = tome_cuda.attention(q, k, v, size, scale)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert all(map(torch.equal, before, (q, k, v)))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    truth = explicit(q.double(), k.double(), v.double(), None if size is None else size.double(), factor)
    plain = explicit(q, k, v, size, factor)
    assert error(out, truth) <= error(plain, truth) + ROUNDING[q.dtype] * float(v.abs().max())


@given(inputs())
def test_gradients_agree_with_float64(drawn: Inputs) -> None:
    q, k, v, size = drawn
    if q.numel() * k.shape[2] > 30_000_000:
        return
    grad = torch.randn(q.shape, device="cuda", generator=generator(q.shape[2])).to(q.dtype)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    ours = torch.autograd.grad(tome_cuda.attention(*leaves, size), leaves, grad)
    plain = torch.autograd.grad(tome_reference.attention(*leaves, size), leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    size = None if size is None else size.double()
    truths = torch.autograd.grad(explicit(*exact, size, q.shape[-1] ** -0.5), exact, grad.double())
    floor = 16 * ROUNDING[q.dtype] * max(float(truth.abs().max()) for truth in truths)  # of one key dq is zero
    for mine, theirs, truth in zip(ours, plain, truths, strict=True):
        assert error(mine, truth) <= 2 * error(theirs, truth) + floor


def layer(b: int, n: int, heads: int, d: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """q, k, v as slices of packed qkv, and sizes."""
    qkv = torch.randn(b, n, 3, heads, d, device="cuda").to(dtype)
    return *qkv.permute(2, 0, 3, 1, 4), torch.randint(1, 9, (b, n), device="cuda").float()


SHAPES = pytest.mark.parametrize("shape", [(64, 11, 12, 64), (4, 197, 12, 64), (2, 577, 16, 64), (1, 1369, 16, 80)])


@SHAPES
def test_the_same_bits_again_and_on_two_streams(shape: tuple[int, ...]) -> None:
    drawn = layer(*shape)
    assert_same_bits(lambda: tome_cuda.attention(*drawn))


@SHAPES
def test_a_graph_replays_on_new_inputs(shape: tuple[int, ...]) -> None:
    drawn = layer(*shape)
    assert_replays(lambda: tome_cuda.attention(*drawn), drawn, layer(*shape))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 17, 63, 197, 270, 577])
def test_reads_and_writes_nothing_else(n: int, d: int) -> None:
    """NaN around the inputs never shows, and what lies around the output stays."""
    wide = torch.full((2, n + 40, 3, 3, d), torch.nan, device="cuda", dtype=torch.float16)
    wide[:, 20 : 20 + n] = torch.randn(2, n, 3, 3, d, device="cuda").half()
    size = torch.full((2, n + 40), torch.nan, device="cuda")
    size[:, 20 : 20 + n] = 2.0
    q, k, v = wide[:, 20 : 20 + n].permute(2, 0, 3, 1, 4)
    filler = [torch.full((2, n, 3, d), 7.0, device="cuda", dtype=torch.float16) for _ in range(3)]
    del filler[1]  # most likely where the output goes
    out = tome_cuda.attention(q, k, v, size[:, 20 : 20 + n])
    assert bool(out.isfinite().all())
    assert all(bool((f == 7.0).all()) for f in filler)
    torch.testing.assert_close(out, tome_reference.attention(q, k, v), rtol=0, atol=6e-3)


@pytest.mark.parametrize("n", [40, 69, 197, 300, 577])
def test_bad_numbers_stay_where_softmax_leaves_them(n: int) -> None:
    q, k, v, size = layer(2, n, 2, 64)
    size[0] = 0.0  # no key counts
    size[1, 3] = 0.0
    out = tome_cuda.attention(q, k, v, size)
    assert bool(out[0].isnan().all())
    torch.testing.assert_close(out[1], tome_reference.attention(q, k, v, size)[1], rtol=0, atol=6e-3)
    for value in (torch.nan, torch.inf, -torch.inf):
        for index in range(3):
            drawn = [q.clone(), k.clone(), v.clone()]
            drawn[index][0, 0, 5, 7] = value
            ours, theirs = (module.attention(*drawn) for module in (tome_cuda, tome_reference))
            assert torch.equal(ours.isfinite(), theirs.isfinite()), (value, index)


# torch records an empty graph of its own first, and silences the warning only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_compiles_without_breaks_or_recompiles() -> None:
    def block(x: Tensor, size: Tensor) -> Tensor:
        q, k, v = (x * 2).permute(2, 0, 3, 1, 4)
        return tome_cuda.attention(q, k, v, size).transpose(1, 2).reshape(4, 197, -1).relu()

    function = compiled(block)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            x = torch.randn(4, 197, 3, 3, 64, device="cuda").half().requires_grad_()
            size = torch.randint(1, 9, (4, 197), device="cuda").float()
            out = function(x, size).clone()
            torch.testing.assert_close(out, block(x, size))
            (ours,) = torch.autograd.grad(out, x, out.detach())
            (eager,) = torch.autograd.grad(block(x, size), x, out.detach())
            # Eager gradients may be cuDNN's, those of a compiler never are: other roundings of the same sums.
            torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().max()))


@pytest.mark.parametrize("sized", [False, True])
def test_opcheck(sized: bool) -> None:
    q, k, v, size = layer(2, 37, 3, 64)
    arguments = (q, k, v, size if sized else None, 0.125)
    torch.library.opcheck(tome_cuda.operators().attention.default, arguments, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (2, 0, 5, 64), (2, 2, 0, 64)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    q = torch.empty(shape, device="cuda", dtype=torch.float16)
    assert tome_cuda.attention(q, q, q, torch.ones(shape[0], shape[2], device="cuda")).shape == shape


def test_float32_and_dropout_run_under_an_explicit_choice() -> None:
    """What has no kernel is torch's to compute: a float32 model merges all the same."""
    q, k, v, size = (t.float() for t in layer(2, 40, 3, 64))
    with tome.use_backend("cuda"):
        out = tome.ops.attention(q, k, v, size)
        dropped = tome.ops.attention(q.half(), k.half(), v.half(), size, dropout_p=0.5)
        wide = tome.ops.attention(*(F.pad(t.half(), (0, 100)) for t in (q, k, v)), size)
    assert torch.equal(out, tome_reference.attention(q, k, v, size))
    assert not torch.equal(dropped, out.half())
    assert wide.shape == (2, 3, 40, 164)


def test_autocast_rounds_as_torch_does() -> None:
    q, k, v, size = (t.float() for t in layer(2, 40, 3, 64))
    with torch.autocast("cuda", torch.bfloat16):
        assert tome_cuda.attention(q, k, v, size).dtype is torch.bfloat16


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_second_gpu() -> None:
    drawn = layer(2, 197, 12, 64)
    other = tome_cuda.attention(*(t.to("cuda:1") for t in drawn))
    assert other.device.index == 1
    assert torch.equal(tome_cuda.attention(*drawn), other.to("cuda:0"))
