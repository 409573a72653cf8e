"""Merging on a GPU beyond the laws of every backend: long and wide inputs, several layers, determinism, streams,
graphs, compilation, registration, borders.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits, assert_writes_nothing_else, compiled, generator
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from strategies import FEATURES, LAYOUTS, LONG_TOKENS, Case, long_cases, strided
from torch import Tensor

import tome_cuda
import tome_reference

pytestmark = NO_EXTENSION

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """x [B, N, C], a map onto [0, M), M, and sizes, above one as a rule."""
    batch, n = draw(st.sampled_from([1, 2, 5])), draw(LONG_TOKENS)
    channels = draw(st.one_of(st.sampled_from([8, 64, 384, 768, 1024, 1280]), st.integers(1, 1300)))
    tokens = draw(st.one_of(st.integers(1, n), st.sampled_from([1, n, max(1, n // 2)])))
    crowded = draw(st.sampled_from([1, tokens]))
    random = generator(draw(SEEDS))
    rest = torch.randint(crowded, (batch, n - tokens), device="cuda", generator=random)
    slot = torch.cat([torch.arange(tokens, device="cuda").expand(batch, -1), rest], dim=1)
    order = torch.rand(batch, n, device="cuda", generator=random).argsort(dim=1)
    x = torch.randn(batch, 1, n, channels, device="cuda", generator=random).to(draw(DTYPES))
    x = strided(x, draw(st.sampled_from(LAYOUTS)))[:, 0]
    size = torch.randint(1, 300, (batch, n), device="cuda", generator=random).float()
    return x, slot.gather(1, order).int(), tokens, draw(st.sampled_from([size, size, None]))


@pytest.mark.parametrize("channels", [8, 20, 640, 1300])
def test_merge_of_long_images(channels: int) -> None:
    """Many rows and much to scan: the blocks that are twice as large."""
    random = generator(channels)
    slot = torch.cat([torch.arange(1700), torch.randint(40, (400,))])[torch.randperm(2100)]
    slot = slot.int().cuda().repeat(5, 1)
    x = torch.randn(5, 2100, channels, device="cuda", generator=random).half()
    size = torch.randint(1, 300, (5, 2100), device="cuda", generator=random).float()
    merged, total = tome_cuda.merge(x, slot, 1700, size)
    expected, expected_total = tome_reference.merge(x, slot, 1700, size)
    truth, _ = tome_reference.merge(x.double(), slot, 1700, size)
    assert torch.equal(total, expected_total)
    assert error(merged, truth) <= error(expected, truth) + ROUNDING[x.dtype] * float(x.abs().max())


@given(groups(), SEEDS)
def test_merge_and_unmerge_agree(drawn: tuple[Tensor, Tensor, int, Tensor | None], seed: int) -> None:
    x, slot, tokens, size = drawn
    floor = ROUNDING[x.dtype]
    ours, theirs = (x.detach().requires_grad_() for _ in range(2))
    merged, total = tome_cuda.merge(ours, slot, tokens, size)
    expected, expected_total = tome_reference.merge(theirs, slot, tokens, size)
    truth, _ = tome_reference.merge(x.double(), slot, tokens, size)
    assert torch.equal(total, expected_total)
    # Sums round by their terms, which may cancel.
    assert error(merged, truth) <= error(expected, truth) + floor * float(x.abs().max())

    assert torch.equal(tome_cuda.unmerge(merged, slot), tome_reference.unmerge(merged, slot))

    random = generator(seed)
    grad = torch.randn(merged.shape, device="cuda", generator=random).to(x.dtype)
    (ours_grad,) = torch.autograd.grad(merged, ours, grad)
    (theirs_grad,) = torch.autograd.grad(expected, theirs, grad)
    assert error(ours_grad, theirs_grad.double()) <= 4 * floor * float(theirs_grad.abs().max())

    back = torch.randn(x.shape, device="cuda", generator=random).to(x.dtype)
    leaves = [merged.detach().clone().requires_grad_() for _ in range(2)]
    (ours_grad,) = torch.autograd.grad(tome_cuda.unmerge(leaves[0], slot), leaves[0], back)
    (theirs_grad,) = torch.autograd.grad(tome_reference.unmerge(leaves[1], slot), leaves[1], back)
    index = slot.long()[:, :, None].expand_as(x)
    zeros = torch.zeros(merged.shape, dtype=torch.float64, device="cuda")
    exact, terms = (zeros.scatter_add(1, index, value.double()) for value in (back, back.abs()))
    assert error(ours_grad, exact) <= error(theirs_grad, exact) + floor * float(terms.max())


@given(long_cases(*FEATURES), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_laws_over_several_layers(case: Case, schedule: list[int]) -> None:
    value = case.keys("cuda")
    value = value if case.heads else value[:, None]
    batch, heads, n, d = value.shape
    x = value.nan_to_num(0.0, 1.0, -1.0).float().clamp(-9, 9).transpose(1, 2).reshape(batch, n, heads * d)
    slots, size, mass = None, None, x.double().sum(dim=1)
    prefix = min(1, n)
    for r in schedule:
        metric = x.view(batch, x.shape[1], heads, d).transpose(1, 2)
        slot = tome_cuda.match(metric, r, prefix)
        tokens = x.shape[1] - min(r, tome_reference.max_r(x.shape[1], prefix))
        assert bool((slot.sort(dim=1).values.diff(dim=1) <= 1).all())
        assert bool((slot[:, :prefix] == 0).all())
        assert int(slot.max()) == tokens - 1
        x, size = tome_cuda.merge(x, slot, tokens, size)
        slots = slot if slots is None else slot.gather(1, slots.long())
        assert bool((size.sum(dim=1) == n).all())
    assert size is not None
    assert slots is not None
    counts = torch.zeros_like(size).scatter_add(1, slots.long(), torch.ones(slots.shape, device="cuda"))
    assert torch.equal(counts, size)
    total = (x.double() * size[:, :, None]).sum(dim=1)
    torch.testing.assert_close(total, mass, rtol=1e-4, atol=1e-3 * n)


def step(x: Tensor, value: Tensor, r: int, size: Tensor | None) -> list[Tensor]:
    slot = tome_cuda.match(value, r)
    merged, total = tome_cuda.merge(x, slot, x.shape[1] - r, size)
    return [slot, merged, total, tome_cuda.unmerge(merged, slot)]


def layer(b: int, n: int, c: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(b, n, 3, c // d, d, device="cuda").half()
    size = torch.randint(1, 9, (b, n), device="cuda").float()
    return torch.randn(b, n, c, device="cuda").half(), qkv[:, :, 1].transpose(1, 2), size


SHAPES = pytest.mark.parametrize(
    ("shape", "r"),
    [((4, 197, 768, 64), 16), ((2, 577, 1024, 64), 23), ((2, 1369, 1280, 80), 40), ((1, 4096, 640, 64), 1000)],
)


@SHAPES
def test_the_same_bits_again_and_on_two_streams(shape: tuple[int, int, int, int], r: int) -> None:
    x, value, size = layer(*shape)
    assert_same_bits(lambda: step(x, value, r, size))


@SHAPES
def test_a_graph_replays_on_new_inputs(shape: tuple[int, int, int, int], r: int) -> None:
    x, value, size = layer(*shape)
    assert_replays(lambda: step(x, value, r, size), (x, value, size), layer(*shape))


# torch records an empty graph of its own first, and silences the warning only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_compiles_without_breaks_or_recompiles() -> None:
    def block(x: Tensor, value: Tensor, size: Tensor) -> Tensor:
        return step(x * 2, value, 16, size)[3].relu()

    function = compiled(block)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            x, value, size = layer(4, 197, 768, 64)
            x.requires_grad_()
            out = function(x, value, size).clone()
            torch.testing.assert_close(out, block(x, value, size))
            out.sum().backward()


def test_autocast_leaves_dtypes_alone() -> None:
    x, value, size = layer(2, 33, 64, 16)
    with torch.autocast("cuda", torch.float16):
        outs = step(x.float(), value, 5, size)
    assert [out.dtype for out in outs] == [torch.int32, torch.float32, torch.float32, torch.float32]


def test_gradients_of_gradients() -> None:
    x = torch.randn(2, 7, 3, device="cuda", requires_grad=True)
    slot = tome_cuda.match(x, 2)
    size = torch.rand(2, 7, device="cuda") + 1
    merge: Callable[[Tensor], Tensor] = lambda x: tome_cuda.merge(x, slot, 5, size)[0]
    for function, leaf in (
        (merge, x),
        (lambda y: tome_cuda.unmerge(y, slot), merge(x).detach().requires_grad_()),
    ):
        seed = torch.randn_like(function(leaf)).requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, seed, create_graph=True)
        probe = torch.randn_like(grad)
        # Linear in the seed: the derivative by it is the forward step of the probe.
        (second,) = torch.autograd.grad(grad, seed, probe)
        torch.testing.assert_close(second, function(probe))


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("name", ["merge", "merge_backward", "unmerge", "unmerge_backward"])
def test_opcheck(name: str, sized: bool) -> None:
    x = torch.randn(2, 9, 24, device="cuda", requires_grad=True)
    slot = tome_cuda.match(torch.randn(2, 3, 9, 16, device="cuda"), 3)
    size = torch.rand(2, 9, device="cuda") + 1 if sized else None
    merged, total = tome_cuda.merge(x, slot, 6, size)
    y = merged.detach().requires_grad_()
    arguments = {
        "merge": (x, slot, 6, size),
        "merge_backward": (y, slot, size, total),
        "unmerge": (y, slot),
        "unmerge_backward": (x, slot, 6),
    }[name]
    torch.library.opcheck(getattr(tome_cuda.operators(), name).default, arguments)


def test_empty_tensors() -> None:
    for b, n, c, m in ((0, 4, 3, 2), (2, 0, 3, 0), (2, 4, 0, 3)):
        slot = (torch.arange(n, device="cuda").int() % max(1, m)).expand(b, n)
        merged, total = tome_cuda.merge(torch.empty(b, n, c, device="cuda"), slot, m)
        assert (merged.shape, total.shape) == ((b, m, c), (b, m))
        assert torch.equal(total, tome_reference.merge(torch.empty(b, n, c, device="cuda"), slot, m)[1])
        assert tome_cuda.unmerge(merged, slot).shape == (b, n, c)


@pytest.mark.parametrize(("n", "m", "c"), [(64, 32, 128), (192, 128, 256)])
def test_writes_nothing_else(n: int, m: int, c: int) -> None:
    x = torch.randn(4, n, c, device="cuda").half()
    slot = tome_cuda.match(x, n - m, 0)
    merged, _ = tome_cuda.merge(x, slot, m)
    assert_writes_nothing_else(lambda: tome_cuda.merge(x, slot, m), 2 * 4 * m * c, 4 * 4 * m)
    assert_writes_nothing_else(lambda: tome_cuda.unmerge(merged, slot), 2 * 4 * n * c)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_second_gpu() -> None:
    x, value, size = layer(2, 197, 768, 64)
    other = [t.to("cuda:1") for t in (x, value, size)]
    for ours, theirs in zip(step(x, value, 16, size), step(other[0], other[1], 16, other[2]), strict=True):
        assert theirs.device.index == 1
        assert torch.equal(ours, theirs.to(ours.device))
