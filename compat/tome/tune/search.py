"""The search: from a few shapes of schedules to the best of them, which then trades tokens between layers.

A trade lets one layer merge more and another fewer, in the same time. Which trades are worth a pass is told by what the
error and the time do when each layer alone merges more or fewer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from torch import Tensor

from tome import schedule

R: TypeAlias = tuple[int, ...]

STARTS = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3)  # of the depth: the first layer that merges
CHANCE = 1.0  # standard errors that the images' mean distance must fall by
SLOPES = (-1.0, 0.0, 1.0)  # falling to nothing, even, rising from nothing


@dataclass
class Problem:
    """A model's layers, and what schedules do to it."""

    depth: int
    tokens: int
    prefix: int
    time: Callable[[schedule.Plan], float]
    errors: Callable[[R], Tensor]  # of each image 1 - cosine
    rebase: Callable[[R], None]
    work: Callable[[], float]  # passes so far
    seen: dict[R, Tensor] = field(default_factory=dict)

    def effective(self, r: Sequence[int]) -> R:
        """What layers really merge, none more than half of its free tokens."""
        return schedule.plan(list(r), self.depth, self.tokens, self.prefix).r

    def seconds(self, r: Sequence[int]) -> float:
        """A pass with that schedule, by the table."""
        return self.time(schedule.plan(list(r), self.depth, self.tokens, self.prefix))

    def chords(self, r: R) -> Tensor:
        """Of each image the distance between the features, as unit vectors; measured once."""
        if r not in self.seen:
            self.seen[r] = (2 * self.errors(r).double().clamp(min=0)).sqrt()
        return self.seen[r]

    def error(self, r: R) -> float:
        """Between the mean distance and the root of the mean square.

        In the latter, which is the mean of 1 - cosine, a few images would drown the rest; the former forgets them.
        """
        chords = self.chords(r)
        return float((chords.mean() * chords.square().mean().sqrt()).sqrt())

    def is_better(self, new: R, old: R) -> bool:
        """Whether the error fell, and the images agree by so much that it is not chance."""
        change = self.chords(new) - self.chords(old)
        chance = float(change.std()) / len(change) ** 0.5
        return bool(float(change.mean()) < -CHANCE * chance and self.error(new) < (1 - 1e-3) * self.error(old))


class Shape(NamedTuple):
    """Weights of layers in three numbers."""

    start: int  # the first layer that merges
    slope: float  # from there on they fall (-1), stay (0) or rise (1)
    stride: int = 1  # only every so many layers merge: matching takes time too

    def weights(self, depth: int) -> list[float]:
        """One a layer."""
        left = depth - self.start
        found = [1 + self.slope * (2 * (i + 0.5) / left - 1) for i in range(left)]
        return [0.0] * self.start + [w if i % self.stride == 0 else 0.0 for i, w in enumerate(found)]

    def near(self, by: int, bend: float) -> list[Shape]:
        """Those that differ in one number."""
        moved = [self._replace(start=self.start + step) for step in (-by, by)]
        bent = [self._replace(slope=self.slope + step) for step in (-bend, bend)]
        return [*moved, *bent, self._replace(stride=3 - self.stride)]


def scaled(problem: Problem, weights: Sequence[float], factor: float) -> R:
    """So many times the weights, in whole tokens; what rounding takes from a layer the next one gets."""
    r, carried = [], 0.0
    for weight in weights:
        wanted = factor * weight + carried
        r.append(max(int(wanted + 0.5), 0) if weight else 0)
        carried = wanted - r[-1] if weight else carried
    return problem.effective(r)


def fitted(problem: Problem, weights: Sequence[float], enough: Callable[[R], bool]) -> R | None:
    """The least multiple of a shape that is enough, where more of it is always enough too; None: none is."""
    low, high = 0.0, 1.0
    free = problem.tokens - problem.prefix
    top = free / min((weight for weight in weights if weight > 0), default=1.0)
    while not enough(scaled(problem, weights, high)):
        if high > top:
            return None
        low, high = high, 2 * high
    while high - low > 0.25 / max(weights) / problem.depth:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(scaled(problem, weights, middle)) else (middle, high)
    return scaled(problem, weights, high)


def in_time(problem: Problem, weights: Sequence[float], seconds: float) -> R | None:
    """The least multiple of a shape that takes no longer than that."""
    return fitted(problem, weights, lambda r: problem.seconds(r) <= seconds)


def best_shape(problem: Problem, seconds: float) -> R | None:
    """The shape with the least error in that time: the best of a few, then of its neighbours."""
    depth = problem.depth
    fits: dict[Shape, R] = {}

    def best(shapes: Iterable[Shape]) -> Shape | None:
        for each in shapes:
            if each not in fits and 0 <= each.start < depth and abs(each.slope) <= 1:
                fit = in_time(problem, each.weights(depth), seconds)
                if fit is not None:
                    fits[each] = fit
        return min(fits, key=lambda each: problem.error(fits[each]), default=None)

    found = best(Shape(int(start * depth), slope) for start in STARTS for slope in SLOPES)
    by, bend = max(depth // 12, 1), 0.5
    while found is not None and bend > 0.2:
        better = best(found.near(by, bend))
        if better == found:
            bend /= 2
        found = better
    return None if found is None else fits[found]


def fastest(problem: Problem) -> R:
    """The schedule of least time."""
    free = problem.tokens - problem.prefix
    found = [problem.effective([0] * start + [free] * (problem.depth - start)) for start in range(problem.depth + 1)]
    even = [Shape(0, slope).weights(problem.depth) for slope in SLOPES]
    found += [scaled(problem, weights, free / 2**k) for weights in even for k in range(8)]
    return min(found, key=problem.seconds)


def improved(problem: Problem, r: R, seconds: float, until: float) -> R:
    """Move tokens between layers, in ever smaller amounts, as long as the error falls.

    Args:
        problem: what is searched.
        r: takes ``seconds`` or less.
        seconds: what a pass may take.
        until: how many passes there may have been.

    """
    step = max((problem.tokens - problem.prefix) // 10, 1)
    while step and problem.work() < until:
        better = _moved(problem, r, seconds, step, until)
        if problem.is_better(better, r):
            r = better
        else:
            step //= 2
    return r


def _moved(problem: Problem, r: R, seconds: float, step: int, until: float) -> R:
    """Look at what each layer alone does to the error, and go where the sum of that is least."""
    problem.rebase(r)
    curves = []
    for i in range(problem.depth):
        curves.append({r[i]: problem.error(r)})
        for change in (-step, -(step // 2), step, 2 * step):
            changed = _changed(problem, r, {i: change})
            if changed[i] not in curves[i]:
                curves[i][changed[i]] = problem.error(changed)
        if problem.work() >= until:
            return r
    guess = _Guess(problem, seconds, [_rising(curve) for curve in curves])
    goal = guess.best(r, step)
    best = r
    for share in (1.0, 0.5, 0.25):  # the sum is nearer to the truth for less of a change
        way = [share * b + (1 - share) * a for a, b in zip(r, goal, strict=True)]
        between = in_time(problem, way, seconds)
        if between is not None and problem.work() < until:
            best = min(best, between, key=problem.error)
    return best


@dataclass
class _Guess:
    """The error as a sum over layers, and the true time."""

    problem: Problem
    seconds: float
    curves: list[list[tuple[int, float]]]  # of each layer: tokens merged and the error, ascending

    def error(self, r: R) -> float:
        """The sum."""
        return sum(_between(curve, count) for curve, count in zip(self.curves, r, strict=True))

    def best(self, r: R, step: int) -> R:
        """Trade between two layers, in ever smaller amounts, as long as the sum falls."""
        while step:
            trades = ((self.error(trade), trade) for trade in self._trades(r, step))
            error, trade = min(trades, default=(0.0, r))
            if trade != r and error < self.error(r) * (1 - 1e-6):
                r = trade
            else:
                step //= 2
        return r

    def _trades(self, r: R, step: int) -> Iterator[R]:
        for giver in range(self.problem.depth):
            for taker in (None, *range(self.problem.depth)):
                change = {} if taker is None else {taker: step}
                low, high = 0, min(r[giver], 4 * step)
                while taker != giver and low < high:  # as many fewer as the time allows
                    middle = (low + high + 1) // 2
                    trade = _changed(self.problem, r, {**change, giver: -middle})
                    is_in_time = self.problem.seconds(trade) <= self.seconds
                    low, high = (middle, high) if is_in_time else (low, middle - 1)
                if low:
                    yield _changed(self.problem, r, {**change, giver: -low})


def _changed(problem: Problem, r: R, changes: dict[int, int]) -> R:
    return problem.effective([max(count + changes.get(i, 0), 0) for i, count in enumerate(r)])


def _rising(curve: dict[int, float]) -> list[tuple[int, float]]:
    """In ascending order; more tokens do no less harm, whatever chance says."""
    counts = sorted(curve)
    return list(zip(counts, accumulate((curve[count] for count in counts), max), strict=True))


def _between(curve: list[tuple[int, float]], count: int) -> float:
    """Interpolated; beyond the last point as steep as before it, and steeper."""
    right = min(max(bisect.bisect_left(curve, (count,)), 1), len(curve) - 1)
    if len(curve) == 1:
        return curve[0][1] if count == curve[0][0] else math.inf
    (low, a), (high, b) = curve[right - 1], curve[right]
    share = (count - low) / (high - low)
    return a + (b - a) * max(share, 0.0) if share <= 1 else math.inf
