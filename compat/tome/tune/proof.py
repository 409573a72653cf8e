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
RUNS = {"cpu": 9, "cuda": 25}

CONSTANT, FALLING, TUNED = "constant r", "(r, -1)", "tuned"


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


def proved(
    model: nn.Module, x: Tensor, problem: Problem, passes: Passes, r: R,
    autocast: Autocast,
) -> list[Row]:  # fmt: skip
    """Time them; constant r, in whole tokens that differ by one at most, and (r, -1) at the speed of ``r``."""
    depth = problem.depth
    shapes = {CONSTANT: [1.0] * depth, FALLING: [float(depth - 1 - i) for i in range(depth)]}
    goals = dict.fromkeys(shapes, problem.seconds(r))
    schedules: dict[str, R] = {"unpatched": (0,) * depth}
    for attempt in range(ROUNDS):
        for name, goal in goals.items():
            fit = in_time(problem, shapes[name], goal) if any(shapes[name]) else None
            if fit is not None:
                schedules[name] = fit
        schedules[TUNED] = schedules.pop(TUNED, r)  # the last
        calls = {
            name: whole(evaluate.twin(model, list(each)) if name != "unpatched" else model, x, autocast)
            for name, each in schedules.items()
        }
        timed = measure.time_calls(calls, x.device, 2, RUNS[x.device.type], progress=False)
        seconds = {name: statistics.median(times) for name, times in timed.items()}
        off = {name: seconds[TUNED] / seconds[name] for name in goals if name in schedules}
        if all(abs(ratio - 1) < SAME for ratio in off.values()) or attempt == ROUNDS - 1:
            break
        goals = {name: goals[name] * ratio for name, ratio in off.items()}
    return [
        Row(
            name,
            list(each),
            schedule.plan(list(each), depth, problem.tokens, problem.prefix).tokens,
            seconds[name],
            seconds["unpatched"] / seconds[name],
            passes.errors(each).distance,
            passes.errors(each).drop,
        )
        for name, each in schedules.items()
    ]
