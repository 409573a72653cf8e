"""Schedules: the published tables, validation, plans, FLOPs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import HOSTS, images, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tome
from tome import schedule
from tome.patch import timm_cost
from tome.utils import parse_r

PUBLISHED = [
    (12, 8, [8] * 12),
    (12, (8, 0.0), [8] * 12),
    (12, (8, -1.0), [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
    (12, (16, -1.0), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
    (12, (8, 1.0), [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
    (24, (8, 0), [8] * 24),
    (4, [3, 2], [3, 2, 0, 0]),
    (4, [], [0, 0, 0, 0]),
    (1, (8, -1.0), [8]),
]


@pytest.mark.parametrize(("depth", "r", "expected"), PUBLISHED, ids=str)
def test_parse_r_gives_the_published_schedules(depth, r, expected):
    assert parse_r(depth, r) == expected


def test_parse_r_refuses_a_ratio():
    with pytest.raises(TypeError, match=r"use tome\.schedule\.plan"):
        parse_r(12, 0.1)


@given(depth=st.integers(1, 48), r=st.integers(0, 64), inflection=st.floats(-1, 1))
def test_inflected_schedules_follow_the_formula(depth, r, inflection):
    result = parse_r(depth, (r, inflection))
    assert len(result) == depth
    assert all(0 <= entry <= 2 * r for entry in result)
    assert abs(sum(result) - depth * r) <= depth + 1
    assert result == sorted(result, reverse=inflection < 0) or r == 0


# Tokens per layer and the speed-up that the saved arithmetic allows, ViT-B/16 at 224 pixels.
ALLOWED = {8: (101, 1.34), (8, -1.0): (106, 1.49), 16: (11, 2.00), (16, -1.0): (10, 3.00)}


@pytest.mark.parametrize(("r", "expected"), ALLOWED.items(), ids=str)
def test_plan_and_flops_of_vit_base(r, expected):
    cost = schedule.Cost.vit(768, fixed=2 * 196 * 768 * 768 + 2 * 768 * 1000)
    full = schedule.flops(schedule.plan(0, 12, 197).tokens, cost)
    plan = schedule.plan(r, 12, 197)
    assert plan.tokens[0] == 197
    assert plan.tokens[-1] == expected[0]
    assert full / schedule.flops(plan.tokens, cost) == pytest.approx(expected[1], abs=0.006)


@given(
    r=st.one_of(st.integers(0, 300), st.floats(0.01, 0.99), st.lists(st.integers(0, 99), max_size=12)),
    tokens=st.integers(0, 300),
    prefix=st.integers(0, 5),
)
def test_plans_never_merge_more_than_half_of_the_free_tokens(r, tokens, prefix):
    if prefix > tokens:
        with pytest.raises(ValueError, match="prefix must be in"):
            schedule.plan(r, 12, tokens, prefix)
        return
    plan = schedule.plan(r, 12, tokens, prefix)
    assert len(plan.tokens) == 13
    for i, merged in enumerate(plan.r):
        assert plan.tokens[i] - plan.tokens[i + 1] == merged
        assert 0 <= merged <= (plan.tokens[i] - prefix) // 2


def test_a_ratio_is_of_the_free_tokens_without_rounding_traps():
    assert schedule.plan(0.29, 1, 101).r == (29,)
    assert schedule.plan(0.1, 3, 101).tokens == (101, 91, 82, 74)
    assert schedule.plan(0.9, 1, 101).r == (50,)


WRONG = [
    (-1, ValueError, "r must not be negative, got -1"),
    (True, TypeError, "must be an int, got True"),
    (None, TypeError, "r must be an int, .*, got None"),
    (0.0, ValueError, r"ratio must be in \(0, 1\), got 0.0"),
    (1.0, ValueError, r"ratio must be in \(0, 1\), got 1.0"),
    (float("nan"), ValueError, "got nan"),
    ((8,), ValueError, "use a list for one r per layer"),
    ((8, 1, 2), ValueError, r"must be \(r, inflection\)"),
    ((8.5, 1), TypeError, "r must be an int, got 8.5"),
    ((8, "x"), TypeError, "inflection must be a number"),
    ((8, float("nan")), ValueError, "inflection must be in"),
    ([1] * 13, ValueError, "r has 13 entries for a model of 12 layers"),
    ([1, -1], ValueError, r"r\[1\] must not be negative"),
    ([0.5], TypeError, r"r\[0\] must be an int, got 0.5"),
]


@pytest.mark.parametrize(("r", "error", "message"), WRONG, ids=str)
def test_wrong_schedules(r, error, message):
    with pytest.raises(error, match=message):
        schedule.plan(r, 12, 197)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("r", [0, (6, -1.0)], ids=str)
def test_flops_agree_with_those_counted_in_a_run(host, r):
    model = tome.patch.timm(make(host)).requires_grad_(False)  # else the counter looks for gradient functions
    model.r = r
    tokens, cost = timm_cost.cost(model)
    plan = schedule.plan(r, 4, tokens, model.num_prefix_tokens)
    # torch counts the products of plain attention on every version; its fused CPU kernel only on newer ones.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, tome.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(images(1))
    matching = sum(
        2 * ((n - model.num_prefix_tokens) // 2) * ((n - model.num_prefix_tokens + 1) // 2) * 16
        for n, merged in zip(plan.tokens, plan.r, strict=False)
        if merged
    )
    assert schedule.flops(plan.tokens, cost) == pytest.approx(counter.get_total_flops() - matching, rel=1e-3)
