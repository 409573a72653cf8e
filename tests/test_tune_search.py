"""The search of schedules, on errors and costs that are known."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tome.tune import search
from tome.tune.costs import Costs
from tome.tune.hunt import Hunt

TOKENS = 65

FLAT = Costs(1, 10.0, 0.0, (2, TOKENS), (0.1, 2.5), (0.1, 2.6), (0.08, 2.1))


def problem(errors, table=FLAT, depth=4):
    count = [0]

    def work():
        count[0] += 1
        return count[0] / 50

    return search.Problem(depth, TOKENS, 1, table.total, errors, lambda r: None, work)


def harm(*weights):
    """Errors of three images that are sums over layers."""

    def errors(r):
        return torch.tensor([0.5, 1.0, 1.5]) * sum(w * n**1.5 for w, n in zip(weights, r, strict=True))

    return errors


@given(shape=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), share=st.floats(0.05, 1.2))
@settings(max_examples=200, deadline=None)
def test_a_fit_is_in_time_and_the_least(shape, share):
    task = problem(harm(1, 1, 1, 1))
    seconds = share * task.seconds((0,) * 4)
    r = search.in_time(task, shape, seconds)
    most = search.scaled(task, shape, 1e3)
    if r is None:
        assert task.seconds(most) > seconds
        return
    assert task.seconds(r) <= seconds
    assert task.effective(r) == r
    assert all(n == 0 for n, weight in zip(r, shape, strict=True) if weight == 0)
    fewer = [tuple(n - (i == j) for j, n in enumerate(r)) for i in range(4) if r[i] > 1]
    assert not fewer or min(map(task.seconds, fewer)) > seconds - 0.2


def test_harmful_layers_are_left_alone():
    task = problem(harm(1.0, 30.0, 30.0, 1.0, 1.0, 1.0), depth=6)  # no shape has both of them out and the first in
    seconds = 0.7 * task.seconds((0,) * 6)
    start = search.best_shape(task, seconds)
    found = search.improved(task, start, seconds, 100)
    assert max(found[1:3]) <= 1
    assert task.seconds(found) <= seconds
    assert task.error(found) < 0.8 * task.error(start)


def test_what_chance_may_have_done_is_no_improvement():
    def errors(r):
        return torch.tensor([0.3, 0.1]) if r[0] else torch.tensor([0.1, 0.31])

    task = problem(errors)
    assert task.error((1, 0, 0, 0)) < task.error((0, 0, 0, 0))
    assert not task.is_better((1, 0, 0, 0), (0, 0, 0, 0))
    assert problem(harm(1, 1, 1, 1)).is_better((1, 0, 0, 0), (2, 0, 0, 0))


def test_nothing_merges_where_nothing_need():
    assert Hunt(problem(harm(1, 1, 1, 1)), 100).in_time(1e3) == (0, 0, 0, 0)
