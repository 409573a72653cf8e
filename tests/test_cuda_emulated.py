"""The kernels' own source, run on a CPU: agreement with the reference, borders, ends of memory, order of threads."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from cuda_emulator.judge import bipartite_positions, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

DTYPES = st.sampled_from(list(emulator.DTYPES))
SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.sampled_from([2, 3, 5, 15, 16, 17, 33, 64, 65, 130])
WIDTHS = st.sampled_from([1, 3, 8, 16, 17, 20, 40, 64, 72, 80])
# Which kernel, and how much shared memory the imagined GPU has.
PATHS = st.sampled_from([(False, 227 << 10), (True, 227 << 10), (True, 99 << 10)])
SLOW = settings(deadline=None, max_examples=60)


@st.composite
def keys(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[Tensor, str]:
    """Keys [B, H, N, D] with features that matter, in one of three layouts."""
    shape = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 7])), draw(LENGTHS), draw(WIDTHS))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind, dtype = draw(st.sampled_from(kinds)), draw(DTYPES)
    value = torch.randn(shape, generator=generator)
    if kind == "signs":
        value = value.sign()[:, :1, :, : {1: 1, 3: 1, 8: 4, 20: 16, 40: 16}.get(shape[3], 16)]
    elif kind == "duplicates":
        value = value[:, :, torch.randint(max(1, shape[2] // 3), (shape[2],), generator=generator)]
    elif kind == "hostile":
        chance = torch.rand(shape[:-1], generator=generator)
        value[chance < 0.1] = torch.nan
        value[(chance > 0.1) & (chance < 0.2)] = 0.0
        value[(chance > 0.2) & (chance < 0.25)] = torch.inf
    elif kind == "tiny":
        value = value * (1e-4 if dtype is torch.float16 else 1e-38)
    elif kind == "huge":
        value = value * (1e3 if dtype is torch.float16 else 1e30)
    value = value.to(dtype)
    layout = draw(st.sampled_from(["dense", "packed", "sparse"]))
    if layout == "packed":
        value = torch.stack([value, value, value], dim=1).permute(0, 3, 1, 2, 4).contiguous()[:, :, 1].transpose(1, 2)
    elif layout == "sparse":
        value = value.repeat_interleave(2, dim=-1)[..., ::2]
    return at_the_end(value), kind


def sets(n: int, prefix: int) -> tuple[int, int]:
    a, b = bipartite_positions(1, n, prefix, torch.device("cpu"))
    return a.shape[1], b.shape[1]


@SLOW
@given(keys(("signs",)), st.integers(0, 40), st.integers(0, 3), PATHS, SEEDS)
def test_exact_keys_give_equal_slots(
    drawn: tuple[Tensor, str], r: int, prefix: int, path: tuple[bool, int], seed: int
) -> None:
    value, _ = drawn
    n = value.shape[2]
    prefix = min(prefix, n)
    r = min(r, tome_reference.max_r(n, prefix))
    if r == 0:
        return
    slot = emulator.match(value, *sets(n, prefix), r, prefix, tiled=path[0], shared_bytes=path[1], seed=seed)
    assert torch.equal(slot, tome_reference.match(value, r, prefix))


@SLOW
@given(
    keys(("real", "duplicates", "hostile", "tiny", "huge")),
    st.integers(1, 65),
    st.integers(0, 3),
    PATHS,
    SEEDS,
)
def test_real_keys_give_right_slots(
    drawn: tuple[Tensor, str], r: int, prefix: int, path: tuple[bool, int], seed: int
) -> None:
    value, _ = drawn
    n = value.shape[2]
    prefix = min(prefix, n)
    r = min(r, tome_reference.max_r(n, prefix))
    if r == 0:
        return
    slot = emulator.match(value, *sets(n, prefix), r, prefix, tiled=path[0], shared_bytes=path[1], seed=seed)
    verdict = judge(value, slot, *bipartite_positions(value.shape[0], n, prefix, value.device), r, prefix)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize("d", [200, 256])
@pytest.mark.parametrize("path", [(True, 227 << 10), (True, 163 << 10), (True, 99 << 10)])
def test_wide_metrics_take_smaller_tiles(d: int, path: tuple[bool, int]) -> None:
    value = torch.randn(1, 70, d, generator=torch.Generator().manual_seed(d))
    slot = emulator.match(value, *sets(70, 1), 20, 1, tiled=path[0], shared_bytes=path[1])
    assert judge(value, slot, *bipartite_positions(1, 70, 1, value.device), 20, 1).is_right()


@SLOW
@given(keys(("real",)), st.integers(2, 9), st.integers(0, 3), PATHS, SEEDS)
def test_kth(drawn: tuple[Tensor, str], k: int, prefix: int, path: tuple[bool, int], seed: int) -> None:
    value, _ = drawn
    n = value.shape[2]
    prefix = min(prefix, n)
    k = min(k, n - prefix)
    if k < 2:
        return
    count = (n - prefix) // k
    others = n - prefix - count
    slot = emulator.match(
        *(value, others, count, others, prefix, emulator.RUNS, k),
        tiled=path[0],
        shared_bytes=path[1],
        seed=seed,
    )
    targets = prefix + k - 1 + k * torch.arange(count)
    is_other = torch.ones(n, dtype=torch.bool)
    is_other[:prefix] = False
    is_other[targets] = False
    sources = is_other.nonzero()[:, 0].expand(value.shape[0], -1)
    assert judge(value, slot, sources, targets.expand(value.shape[0], -1), others, prefix).is_right()


@SLOW
@given(keys(("real",)), st.integers(1, 40), st.integers(0, 3), PATHS, SEEDS)
def test_listed(drawn: tuple[Tensor, str], r: int, prefix: int, path: tuple[bool, int], seed: int) -> None:
    value, _ = drawn
    batch, _, n, _ = value.shape
    prefix = min(prefix, n)
    r = min(r, tome_reference.max_r(n, prefix))
    if r == 0:
        return
    order = torch.rand(batch, n - prefix, generator=torch.Generator().manual_seed(seed)).argsort(dim=1) + prefix
    sources, targets = order[:, :r].contiguous(), order[:, r:].sort(dim=1).values.contiguous()
    slot = emulator.match(
        *(value, r, n - prefix - r, r, prefix, emulator.LISTED),
        lists=(sources, targets),
        tiled=path[0],
        shared_bytes=path[1],
        seed=seed,
    )
    assert judge(value, slot, sources, targets, r, prefix).is_right()


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """x [B, N, C], a map onto [0, M), M, and sizes."""
    batch, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 31, 32, 33, 65, 197, 600]))
    channels = draw(st.sampled_from([1, 3, 7, 8, 16, 24, 96, 256, 264, 520] + ([768, 1032, 1280] if n < 100 else [])))
    tokens = draw(st.sampled_from([1, n, max(1, n // 2), max(1, n - 1)]))
    crowded = draw(st.sampled_from([1, tokens]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    rows = []
    for _ in range(batch):
        rest = torch.randint(crowded, (n - tokens,), generator=generator)
        row = torch.cat([torch.arange(tokens), rest])
        rows.append(row[torch.randperm(n, generator=generator)])
    x = torch.randn(batch, n, channels, generator=generator).to(draw(DTYPES))
    layout = draw(st.sampled_from(["dense", "wide", "transposed"]))
    if layout == "wide":
        x = torch.cat([x, x[:, :, :1]], dim=2)[:, :, :channels]
    elif layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    size = torch.randint(1, 300, (batch, n), generator=generator).float() if draw(st.booleans()) else None
    return (
        at_the_end(x),
        at_the_end(torch.stack(rows).int()),
        tokens,
        None if size is None else at_the_end(size),
    )


ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max())


@SLOW
@given(groups(), st.sampled_from([8, 32]), SEEDS)
def test_merge(drawn: tuple[Tensor, Tensor, int, Tensor | None], block_outputs: int, seed: int) -> None:
    x, slot, tokens, size = drawn
    out, total = emulator.gather(x, slot, tokens, size, block_outputs=block_outputs, seed=seed)
    expected, expected_total = tome_reference.merge(x, slot, tokens, size)
    truth, _ = tome_reference.merge(x.double(), slot, tokens, size)
    assert torch.equal(total, expected_total)
    assert error(out, truth) <= error(expected, truth) + ROUNDING[x.dtype] * float(truth.abs().max())
    counts = torch.zeros(total.shape).scatter_add(1, slot.long(), torch.ones(slot.shape))
    alone = counts.gather(1, slot.long()) == 1
    back = out.gather(1, slot.long()[:, :, None].expand_as(x))
    assert torch.equal(back[alone], x[alone])


@SLOW
@given(groups(), st.sampled_from([8, 32]), SEEDS)
def test_the_other_three(drawn: tuple[Tensor, Tensor, int, Tensor | None], block_outputs: int, seed: int) -> None:
    x, slot, tokens, size = drawn
    _, total = tome_reference.merge(x, slot, tokens, size)
    generator = torch.Generator().manual_seed(seed)
    y = at_the_end(torch.randn(x.shape[0], tokens, x.shape[2], generator=generator).to(x.dtype))
    assert torch.equal(emulator.spread(y, slot, None, None, seed=seed), tome_reference.unmerge(y, slot))

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(tome_reference.merge(leaf, slot, tokens, size)[0], leaf, y)
    torch.testing.assert_close(emulator.spread(y, slot, size, total, seed=seed), expected)

    leaf = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(tome_reference.unmerge(leaf, slot), leaf, x)
    ours, _ = emulator.gather(x, slot, tokens, None, weighted=False, block_outputs=block_outputs, seed=seed)
    index = slot.long()[:, :, None].expand_as(x)
    truth = torch.zeros(y.shape, dtype=torch.float64).scatter_add(1, index, x.double())
    assert error(ours, truth) <= error(expected, truth) + ROUNDING[x.dtype] * float(truth.abs().max())


def test_a_bad_map_reads_and_writes_nothing_out_of_range() -> None:
    x = at_the_end(torch.randn(1, 40, 24))
    slot = torch.full((1, 40), 2**31 - 1, dtype=torch.int32)
    slot[0, ::2] = -(2**31)
    slot[0, 7] = 3
    out, total = emulator.gather(x, slot, 5, None)
    assert torch.equal(out[0, 3], x[0, 7])
    assert torch.equal(total, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]))
    restored = emulator.spread(at_the_end(torch.randn(1, 5, 24)), slot, None, None)
    assert bool(restored[0, 6].isnan().all())
    assert not bool(restored[0, 7].isnan().any())


def test_the_order_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 130, 24, generator=generator).half()
    slots = [
        emulator.match(value, *sets(130, 1), 30, 1, tiled=tiled, seed=seed) for tiled in (0, 1) for seed in range(5)
    ]
    assert all(torch.equal(slot, slots[0]) for slot in slots)
    x = torch.randn(2, 130, 40, generator=generator)
    merged = [emulator.gather(x, slots[0], 100, None, seed=seed)[0] for seed in range(5)]
    assert all(torch.equal(value, merged[0]) for value in merged)
