"""What a schedule costs in time: a table of measured blocks by tokens, checked against passes of the whole model."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tome import evaluate, measure, schedule
from tome.patch.model import patched_in
from tome.tokens import Tokens

SHARES = (1.0, 0.8, 0.62, 0.48, 0.36, 0.25, 0.16, 0.09, 0.04)  # of the free tokens: where blocks are measured
CHECKED = (0.0, 0.35, 0.7)  # of the constant schedule that merges all: whole models that the table must agree with
Autocast: TypeAlias = Callable[[], AbstractContextManager[object]]

STEP = 1024  # costs are multiples of the dearest block's by one over this: what differs by less is noise


@dataclass(frozen=True)
class Costs:
    """Seconds of one batch."""

    prefix: int
    unpatched: float  # the whole model as it was
    rest: float  # of the patched model what is in no block
    tokens: tuple[int, ...]  # that enter a block, ascending
    plain: tuple[float, ...]  # of a block that merges nothing
    least: tuple[float, ...]  # that merges one token
    most: tuple[float, ...]  # that merges half of the free ones

    @property
    def waits_for_host(self) -> bool:
        """Whether a block of the fewest tokens takes half of the time of one of all: then it is not the GPU's."""
        return self.plain[0] > self.plain[-1] / 2

    def block(self, tokens: int, r: int) -> float:
        """One block that ``tokens`` enter and that merges r of them."""
        if r == 0:
            return self._at(tokens, self.plain)
        half = max((tokens - self.prefix) // 2, 2)
        share = (min(r, half) - 1) / (half - 1)
        return (1 - share) * self._at(tokens, self.least) + share * self._at(tokens, self.most)

    def total(self, plan: schedule.Plan) -> float:
        """A pass of the whole model."""
        return self.rest + sum(self.block(n, r) for n, r in zip(plan.tokens, plan.r, strict=False))

    def _at(self, tokens: int, column: tuple[float, ...]) -> float:
        if len(self.tokens) == 1:
            return column[0]
        right = min(max(bisect.bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        low, high = self.tokens[right - 1], self.tokens[right]
        share = max((tokens - low) / (high - low), 0.0)
        return (1 - share) * column[right - 1] + share * column[right]


def measured(
    model: nn.Module,
    x: Tensor,
    plan: Callable[[schedule.Schedule], schedule.Plan],
    autocast: Autocast = nullcontext,
    runs: int = 5,
) -> Costs:
    """Measure the table on this machine.

    Args:
        model: not patched, on its device; it stays as it is.
        x: the batch that time is measured with.
        plan: what a schedule does to the tokens of x.
        autocast: what passes run under.
        runs: of which the fastest counts.

    """
    twin = evaluate.twin(model, 0)
    inner = patched_in(twin)
    assert inner is not None
    prefix = inner._tome_prefix()[0]
    entered = _entered(twin, list(inner._tome_blocks().values()), x, plan, prefix, autocast)
    calls: dict[tuple[int, str], measure.Call] = {}
    repeats = 1 if x.device.type == "cpu" else 8  # on a GPU calls overlap, as they do in a pass
    for tokens, (block, args, kwargs) in entered.items():
        half = (tokens - prefix) // 2
        for kind, r in (("plain", 0), ("least", min(1, half)), ("most", half)):
            calls[tokens, kind] = _call(block, args, kwargs, r, repeats, autocast)
    seconds = _fastest(calls, x.device, runs)
    table = {
        kind: _rising([seconds[n, kind] / repeats for n in sorted(entered)]) for kind in ("plain", "least", "most")
    }
    models = {"": whole(model, x, autocast)}
    depth, free = len(inner._tome_blocks()), plan(0).tokens[0] - prefix
    schedules = {str(share): round(share * free / depth) for share in CHECKED}
    for name, r in schedules.items():
        models[name] = whole(evaluate.twin(model, r), x, autocast)
    real = _fastest(models, x.device, runs)
    raw = Costs(prefix, real[""], 0.0, tuple(sorted(entered)), **table)
    rest, scale = _line([raw.total(plan(r)) for r in schedules.values()], [real[name] for name in schedules])
    step = scale * table["plain"][-1] / STEP
    scaled = {kind: tuple(step * round(scale * value / step) for value in column) for kind, column in table.items()}
    return Costs(prefix, real[""], rest, raw.tokens, **scaled)


class _Entered(Exception):  # noqa: N818  # no error
    """A block was reached; the rest of the pass is not wanted."""


def _entered(
    model: Any, blocks: Sequence[Any], x: Tensor, plan: Callable[[schedule.Schedule], schedule.Plan], prefix: int,
    autocast: Autocast,
) -> dict[int, tuple[Any, Any, Any]]:  # fmt: skip
    """Blocks behind others that merge, with what they are called with, by the number of their tokens."""
    found: dict[int, tuple[Any, Any, Any]] = {}
    free = plan(0).tokens[0] - prefix
    for share in SHARES:
        r, left, wanted = [], free, max(round(share * free), 1)
        while left > wanted and left > 1:
            r.append(min(left // 2, left - wanted))
            left -= r[-1]
        number = min(max(len(r), len(blocks) // 2), len(blocks) - 1)
        if len(r) > number:
            continue
        model.r = r
        block = blocks[number]

        def reached(*args: Any, **kwargs: Any) -> Any:
            raise _Entered(args, kwargs)

        block.forward = reached
        with torch.inference_mode(), autocast():
            try:
                model(x)
            except _Entered as call:
                args, kwargs = call.args
                args = tuple(arg.added() if isinstance(arg, Tokens) else arg for arg in args)
                found.setdefault(left + prefix, (block, args, kwargs))
            finally:
                del block.forward
    return found


def _call(block: Any, args: Any, kwargs: Any, r: int, repeats: int, autocast: Autocast) -> measure.Call:
    settings = block._tome._replace(ratio=(r, 1))

    def call() -> None:
        block._tome = settings
        with autocast():
            for _ in range(repeats):
                out = block(*args, **kwargs)
                if isinstance(out, Tokens):
                    out.added()

    return call


def whole(model: nn.Module, x: Tensor, autocast: Autocast) -> measure.Call:
    """A pass of a whole model."""

    def call() -> None:
        with autocast():
            model(x)

    return call


def _fastest(calls: dict[Any, measure.Call], device: torch.device, runs: int) -> dict[Any, float]:
    """The fastest of some runs: what disturbs one only slows it."""
    timed = measure.time_calls(calls, device, 1, runs, progress=False)
    return {name: min(times) for name, times in timed.items()}


def _rising(values: list[float]) -> tuple[float, ...]:
    """More tokens take no less time, whatever noise says."""
    return tuple(accumulate(values, max))


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """The offset and the slope, neither below zero, that take x to y with the least squared error."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 1.0
    offset = mean_y - slope * mean_x
    if slope <= 0 or offset < 0:
        return 0.0, mean_y / mean_x
    return offset, slope
