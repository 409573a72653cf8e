"""The proof: a run in which the schedules, brought to one measured speed, and the unpatched model take turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import Tensor, nn

from tome import evaluate, measure, schedule
from tome.tune.costs import Autocast, whole
from tome.tune.passes import Passes
from tome.tune.search import Problem, R, in_time

SAME = 0.01  # of a time: what counts as the same speed
ROUNDS = 3  # in which the others are brought to it
AIMING, PROVING = {"cpu": 5, "cuda": 15}, {"cpu": 9, "cuda": 31}  # runs

UNPATCHED, CONSTANT, FALLING, TUNED = "unpatched", "constant r", "(r, -1)", "tuned"


@dataclass(frozen=True)
class Row:
    """One schedule in the proof run; the first is the unpatched model."""

    name: str
    r: list[int]
    tokens: tuple[int, ...]  # that enter the blocks, and leave the last
    seconds: float  # of a batch, the median
    speedup: float
    distance: float  # mean of 1 - cosine
    drop: float  # points


def seconds_of(
    model: nn.Module, x: Tensor, schedules: dict[str, R], autocast: Autocast, runs: dict[str, int] = AIMING
) -> dict[str, float]:
    """The median time of a batch with each schedule; that of UNPATCHED is of the model as it is."""
    calls = {
        name: whole(model if name == UNPATCHED else evaluate.twin(model, list(r)), x, autocast)
        for name, r in schedules.items()
    }
    timed = measure.time_calls(calls, x.device, 1, runs[x.device.type], progress=False)
    return {name: statistics.median(times) for name, times in timed.items()}


def proved(model: nn.Module, x: Tensor, problem: Problem, passes: Passes, r: R, autocast: Autocast) -> list[Row]:
    """Time them; constant r, in whole tokens that differ by one at most, and (r, -1) at the speed of ``r``."""
    depth = problem.depth
    shapes = {CONSTANT: [1.0] * depth, FALLING: [float(depth - 1 - i) for i in range(depth)]}
    goals = {name: problem.seconds(r) for name, weights in shapes.items() if any(weights)}
    schedules: dict[str, R] = {UNPATCHED: (0,) * depth}
    for _ in range(ROUNDS):
        fits = {name: in_time(problem, shapes[name], goal) for name, goal in goals.items()}
        schedules |= {name: fit for name, fit in fits.items() if fit is not None}
        seconds = seconds_of(model, x, schedules | {TUNED: r}, autocast)
        off = {name: seconds[TUNED] / seconds[name] for name in goals if name in schedules}
        if all(abs(ratio - 1) < SAME for ratio in off.values()):
            break
        goals = {name: goals[name] * ratio for name, ratio in off.items()}
    schedules[TUNED] = r  # the last
    seconds = seconds_of(model, x, schedules, autocast, PROVING)
    return [
        Row(
            name,
            list(each),
            schedule.plan(list(each), depth, problem.tokens, problem.prefix).tokens,
            seconds[name],
            seconds[UNPATCHED] / seconds[name],
            passes.errors(each).distance,
            passes.errors(each).drop,
        )
        for name, each in schedules.items()
    ]
