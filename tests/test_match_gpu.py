"""Matching on a GPU beyond the laws of every backend: long and wide inputs, registration, borders."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EXTENSION
from gpu import assert_writes_nothing_else, generator
from hypothesis import given
from judge import judge_match
from strategies import FEATURES, Case, long_cases

import tome_cuda
import tome_reference

pytestmark = NO_EXTENSION


@given(long_cases("exact"))
def test_exact_keys_give_equal_slots(case: Case) -> None:
    value, r, prefix = case.keys("cuda"), case.r, case.prefix
    assert torch.equal(tome_cuda.match(value, r, prefix), tome_reference.match(value, r, prefix))
    assert torch.equal(tome_cuda.kth_match(value, r + 1, prefix), tome_reference.kth_match(value, r + 1, prefix))
    ours = tome_cuda.random_match(value, r, prefix, generator(r))
    assert torch.equal(ours, tome_reference.random_match(value, r, prefix, generator(r)))


@given(long_cases(*FEATURES))
def test_real_keys_differ_in_near_ties_only(case: Case) -> None:
    value = case.keys("cuda")
    before = value.nan_to_num()
    slot = tome_cuda.match(value, case.r, case.prefix)
    assert torch.equal(value.nan_to_num(), before)
    verdict = judge_match(value, slot, case.r, case.prefix)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize(
    ("batch", "n", "d"),
    [(1, 4096, 64), (1, 2500, 72), (1, 2308, 80), (8, 4100, 64), (64, 577, 64), (32, 1369, 80), (2, 1030, 128)],
)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.3, 10.0])
def test_long_images_of_like_tokens(batch: int, n: int, d: int, noise: float) -> None:
    """From one candidate a row to all targets within the bound, NaN and equal tokens among them."""
    draw = torch.randn(1, 1, d, device="cuda", generator=generator(d))
    value = draw + noise * torch.randn(batch, n, d, device="cuda", generator=generator(n))
    value[0, 7::50] = torch.nan
    value[:, 31] = value[:, 33]
    slot = tome_cuda.match(value, n // 3, 0)
    some = torch.tensor([0, batch - 1], device="cuda")
    verdict = judge_match(value[some], slot[some], n // 3, 0)
    assert verdict.is_right(), verdict


@pytest.mark.parametrize("name", ["bipartite_match", "kth_match", "listed_match"])
def test_opcheck(name: str) -> None:
    value = torch.randn(2, 3, 9, 16, device="cuda")
    tome_cuda.match(value, 3)  # registers the operators
    positions = torch.arange(1, 9, device="cuda").repeat(2, 1)
    arguments = {
        "bipartite_match": (value, 3, 1),
        "kth_match": (value, 2, 1),
        "listed_match": (value, positions[:, :3].contiguous(), positions[:, 3:].contiguous(), 2, 1),
    }[name]
    torch.library.opcheck(getattr(tome_cuda.operators(), name).default, arguments)


def test_empty_tensors() -> None:
    assert tome_cuda.match(torch.empty(0, 9, 4, device="cuda"), 2).shape == (0, 9)
    assert tome_cuda.match(torch.empty(2, 0, 4, device="cuda"), 2, 0).shape == (2, 0)


@pytest.mark.parametrize("n", [64, 128])
def test_writes_nothing_else(n: int) -> None:
    keys = torch.randn(2, n, 64, device="cuda").half()
    assert_writes_nothing_else(lambda: tome_cuda.match(keys, n // 2, 0), 4 * 2 * n)
