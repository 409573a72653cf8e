"""The source of matching's kernels, run on a CPU: agreement, borders, ends of memory, order of threads."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import assume, given
from hypothesis import strategies as st
from judge import judge, judge_match
from strategies import FEATURES, Case, cases
from torch import Tensor

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SEEDS = st.integers(0, 2**31 - 1)
# One block an image; tiles for a GPU with few multiprocessors or many, and with little shared memory.
FUSED = emulator.HOPPER
TILED = tuple(emulator.Gpu(shared << 10, 0, count) for shared, count in ((227, 1), (227, 132), (99, 1), (99, 132)))
PATHS = (FUSED, *TILED)


def small_cases(*features: str) -> st.SearchStrategy[Case]:
    """What fibres can match in no time."""
    return cases(
        features,
        batches=st.sampled_from([1, 2]),
        tokens=st.sampled_from([2, 3, 5, 15, 16, 17, 33, 64, 65, 130]),
        heads=(0, 1, 2, 3, 7),
        widths=st.sampled_from([1, 3, 8, 16, 17, 20, 40, 64, 72, 80]),
    )


def match(case: Case, path: emulator.Gpu, seed: int) -> tuple[Tensor, Tensor]:
    """Keys that end where memory ends, and their slot map."""
    value = at_the_end(case.keys("cpu"))
    return value, emulator.run("bipartite_match", value, case.merged, case.prefix, seed=seed, gpu=path)


@given(small_cases("exact"), st.sampled_from(PATHS), SEEDS)
def test_exact_keys_give_equal_slots(case: Case, path: emulator.Gpu, seed: int) -> None:
    assume(case.merged > 0)
    value, slot = match(case, path, seed)
    assert torch.equal(slot, tome_reference.match(value, case.r, case.prefix))


@given(small_cases(*FEATURES), st.sampled_from(PATHS), SEEDS)
def test_real_keys_give_right_slots(case: Case, path: emulator.Gpu, seed: int) -> None:
    assume(case.merged > 0)
    verdict = judge_match(*match(case, path, seed), case.r, case.prefix)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize("d", [200, 256])
@pytest.mark.parametrize("shared_bytes", [227 << 10, 163 << 10, 99 << 10])
def test_wide_metrics_take_smaller_tiles(d: int, shared_bytes: int) -> None:
    value = torch.randn(1, 70, d, generator=torch.Generator().manual_seed(d))
    slot = emulator.run("bipartite_match", value, 20, 1, gpu=emulator.Gpu(shared_bytes, 0))
    assert judge_match(value, slot, 20, 1).is_right()


@pytest.mark.parametrize("d", [16, 64, 80])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 10.0])
@pytest.mark.parametrize("path", [TILED[0], TILED[2]])
def test_long_images_of_like_tokens(d: int, noise: float, path: emulator.Gpu) -> None:
    """From one candidate a row to all targets within the bound, and NaN among them."""
    generator = torch.Generator().manual_seed(d)
    value = torch.randn(1, 1, d, generator=generator) + noise * torch.randn(1, 601, d, generator=generator)
    value[0, 7::50] = torch.nan
    value[0, 31] = value[0, 33]
    slot = emulator.run("bipartite_match", value, 300, 0, gpu=path)
    verdict = judge_match(value, slot, 300, 0)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "r", "path"), [(2101, 16, 300, TILED[0]), (577, 4, 100, FUSED)])
def test_ties_at_the_threshold_of_many_sources(n: int, d: int, r: int, path: emulator.Gpu, seed: int) -> None:
    """More sources than threads: the ones behind wait until what they counted has been read."""
    case = Case(1, n, d, 0, r, 0, torch.float32, "contiguous", "exact", 1)
    value, slot = match(case, path, seed)
    assert torch.equal(slot, tome_reference.match(value, r, 0))


@given(small_cases("normal"), st.integers(2, 9), st.sampled_from(PATHS), SEEDS)
def test_kth(case: Case, k: int, path: emulator.Gpu, seed: int) -> None:
    n, prefix = case.n, case.prefix
    k = min(k, n - prefix)
    assume(k >= 2)
    value = at_the_end(case.keys("cpu"))
    count = (n - prefix) // k
    others = n - prefix - count
    slot = emulator.run("kth_match", value, k, prefix, seed=seed, gpu=path)
    targets = prefix + k - 1 + k * torch.arange(count)
    is_other = torch.ones(n, dtype=torch.bool)
    is_other[:prefix] = False
    is_other[targets] = False
    sources = is_other.nonzero()[:, 0].expand(case.batch, -1)
    assert judge(value, slot, sources, targets.expand(case.batch, -1), others, prefix).is_right()


@given(small_cases("normal"), st.sampled_from(PATHS), SEEDS)
def test_listed(case: Case, path: emulator.Gpu, seed: int) -> None:
    n, prefix, r = case.n, case.prefix, case.merged
    assume(r > 0)
    value = at_the_end(case.keys("cpu"))
    order = torch.rand(case.batch, n - prefix, generator=torch.Generator().manual_seed(seed)).argsort(dim=1) + prefix
    sources, targets = order[:, :r].contiguous(), order[:, r:].sort(dim=1).values.contiguous()
    for merged in {r, (r + 1) // 2}:
        slot = emulator.run("listed_match", value, sources, targets, merged, prefix, seed=seed, gpu=path)
        assert judge(value, slot, sources, targets, merged, prefix).is_right()


def test_the_order_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 130, 24, generator=generator).half()
    runs = [(path, seed) for path in (FUSED, TILED[1]) for seed in range(5)]
    slots = [emulator.run("bipartite_match", value, 30, 1, seed=seed, gpu=path) for path, seed in runs]
    assert all(torch.equal(slot, slots[0]) for slot in slots)
