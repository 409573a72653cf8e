"""The kernels' own source, run on a CPU: agreement with the reference, borders, ends of memory, order of threads."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judge import bipartite_positions, judge, judge_match
from strategies import FEATURES, Case, cases
from torch import Tensor

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

DTYPES = st.sampled_from(list(emulator.DTYPES))
SEEDS = st.integers(0, 2**31 - 1)
# Which kernel, and how much shared memory the imagined GPU has.
PATHS = st.sampled_from([(False, 227 << 10), (True, 227 << 10), (True, 99 << 10)])
SLOW = settings(deadline=None, max_examples=60)


def small_cases(*features: str) -> st.SearchStrategy[Case]:
    """What fibres can match in no time."""
    return cases(
        features,
        batches=st.sampled_from([1, 2]),
        tokens=st.sampled_from([2, 3, 5, 15, 16, 17, 33, 64, 65, 130]),
        heads=(0, 1, 2, 3, 7),
        widths=st.sampled_from([1, 3, 8, 16, 17, 20, 40, 64, 72, 80]),
    )


def sets(n: int, prefix: int) -> tuple[int, int]:
    a, b = bipartite_positions(1, n, prefix, torch.device("cpu"))
    return a.shape[1], b.shape[1]


def match(case: Case, path: tuple[bool, int], seed: int) -> tuple[Tensor, Tensor]:
    """Keys that end where memory ends, and their slot map."""
    value = at_the_end(case.keys("cpu"))
    args = (*sets(case.n, case.prefix), case.merged, case.prefix)
    return value, emulator.match(value, *args, tiled=path[0], shared_bytes=path[1], seed=seed)


@SLOW
@given(small_cases("exact"), PATHS, SEEDS)
def test_exact_keys_give_equal_slots(case: Case, path: tuple[bool, int], seed: int) -> None:
    assume(case.merged > 0)
    value, slot = match(case, path, seed)
    assert torch.equal(slot, tome_reference.match(value, case.r, case.prefix))


@SLOW
@given(small_cases(*FEATURES), PATHS, SEEDS)
def test_real_keys_give_right_slots(case: Case, path: tuple[bool, int], seed: int) -> None:
    assume(case.merged > 0)
    verdict = judge_match(*match(case, path, seed), case.r, case.prefix)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize("d", [200, 256])
@pytest.mark.parametrize("path", [(True, 227 << 10), (True, 163 << 10), (True, 99 << 10)])
def test_wide_metrics_take_smaller_tiles(d: int, path: tuple[bool, int]) -> None:
    value = torch.randn(1, 70, d, generator=torch.Generator().manual_seed(d))
    slot = emulator.match(value, *sets(70, 1), 20, 1, tiled=path[0], shared_bytes=path[1])
    assert judge_match(value, slot, 20, 1).is_right()


@pytest.mark.parametrize("d", [16, 64, 80])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 10.0])
@pytest.mark.parametrize("shared_bytes", [227 << 10, 99 << 10])
def test_long_images_of_like_tokens(d: int, noise: float, shared_bytes: int) -> None:
    """From one candidate a row to all targets within the bound, and NaN among them."""
    generator = torch.Generator().manual_seed(d)
    value = torch.randn(1, 1, d, generator=generator) + noise * torch.randn(1, 601, d, generator=generator)
    value[0, 7::50] = torch.nan
    value[0, 31] = value[0, 33]
    slot = emulator.match(value, *sets(601, 0), 300, 0, tiled=True, shared_bytes=shared_bytes)
    verdict = judge_match(value, slot, 300, 0)
    assert verdict.is_right(), verdict


def test_ties_at_the_threshold_of_many_sources() -> None:
    case = Case(1, 2101, 16, 0, 300, 0, torch.float32, "contiguous", "exact", 1)
    _, slot = match(case, (True, 227 << 10), 0)
    assert torch.equal(slot, tome_reference.match(case.keys("cpu"), 300, 0))


@SLOW
@given(small_cases("normal"), st.integers(2, 9), PATHS, SEEDS)
def test_kth(case: Case, k: int, path: tuple[bool, int], seed: int) -> None:
    n, prefix = case.n, case.prefix
    k = min(k, n - prefix)
    assume(k >= 2)
    value = at_the_end(case.keys("cpu"))
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
    sources = is_other.nonzero()[:, 0].expand(case.batch, -1)
    assert judge(value, slot, sources, targets.expand(case.batch, -1), others, prefix).is_right()


@SLOW
@given(small_cases("normal"), PATHS, SEEDS)
def test_listed(case: Case, path: tuple[bool, int], seed: int) -> None:
    n, prefix, r = case.n, case.prefix, case.merged
    assume(r > 0)
    value = at_the_end(case.keys("cpu"))
    order = torch.rand(case.batch, n - prefix, generator=torch.Generator().manual_seed(seed)).argsort(dim=1) + prefix
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
@given(groups(), st.sampled_from([8, 32, 64]), SEEDS)
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


@pytest.mark.parametrize("n", [1541, 2052, 2100])
def test_merge_of_a_long_image(n: int) -> None:
    """Slots that no block reads in one go, four at a time or one by one."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(1, n, 8, generator=generator)
    tokens = n // 2
    slot = torch.cat([torch.arange(tokens), torch.randint(tokens, (n - tokens,), generator=generator)])
    slot = slot[torch.randperm(n, generator=generator)][None].int()
    size = torch.randint(1, 300, (1, n), generator=generator).float()
    expected, expected_total = tome_reference.merge(x, slot, tokens, size)
    every_other = slot.repeat_interleave(2, dim=1)[:, ::2]
    for slots in (at_the_end(slot), every_other):
        out, total = emulator.gather(at_the_end(x), slots, tokens, at_the_end(size), seed=n)
        assert torch.equal(total, expected_total)
        torch.testing.assert_close(out, expected)


def test_one_warp_may_have_outputs_far_apart() -> None:
    """A warp takes 32 outputs at a time; groups too long to be listed lie between these two."""
    counts = torch.tensor([1] + [17] * 50 + [1] * 13)
    slot = torch.arange(64).repeat_interleave(counts)[None].int()
    x = torch.randn(1, slot.shape[1], 40, generator=torch.Generator().manual_seed(0))
    out, total = emulator.gather(x, slot, 64, None, block_outputs=64)
    expected, expected_total = tome_reference.merge(x, slot, 64)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected)


@SLOW
@given(groups(), st.sampled_from([8, 32, 64]), SEEDS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [8, 776, 2120])
@pytest.mark.parametrize("members", [2, 3, 16, 17, 60])
def test_how_rows_lie_changes_no_bit(dtype: torch.dtype, channels: int, members: int) -> None:
    """Rows that move 16 bytes at a time or one by one, in registers or pack by pack: the same sums."""
    x = torch.randn(1, members + 5, channels).to(dtype)
    slot = torch.cat([torch.zeros(1, members), torch.arange(1, 6)[None]], dim=1).int()
    size = torch.randint(1, 9, (1, members + 5)).float()
    for sizes in (None, size):
        merged, _ = emulator.gather(x, slot, 6, sizes)
        for other in (x.repeat_interleave(2, dim=2)[..., ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(emulator.gather(other, slot, 6, sizes)[0], merged)


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
