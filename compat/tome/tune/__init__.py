"""Find the schedule for a model, some images and this machine: as near to the unmerged model as the time allows.

:func:`tune` measures what blocks cost (:mod:`tome.tune.costs`), runs schedules on the images (:mod:`tome.tune.passes`),
searches (:mod:`tome.tune.search`) and proves in a run what it found (:mod:`tome.tune.proof`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from tome import cost, evaluate, patch, schedule
from tome.patch.model import patched_in
from tome.tune import costs, search
from tome.tune.hunt import Hunt
from tome.tune.passes import Passes
from tome.tune.proof import TUNED, UNPATCHED, Row, proved, seconds_of

__all__ = ["Kind", "Row", "Tuned", "Wish", "tune"]

Kind: TypeAlias = Literal["speedup", "latency_ms", "max_drop", "agreement"]

TOLERANCE = 0.01  # of a time: as far as two measurements of the same may lie apart
PASSES = 200  # over the images that the search may take
ROUNDS = 3  # in which what was found is measured, or proved, and searched again for where the table was wrong


class Wish(NamedTuple):
    """What is wanted: a speed at the least error, or the highest speed within an error.

    ``speedup`` against the unpatched model; ``latency_ms`` of a batch; ``max_drop`` in points of top-1 accuracy, or
    without labels of images that get another class than from the unmerged model; ``agreement`` is the mean cosine of
    the pooled features to the unmerged model's.
    """

    kind: Kind
    value: float

    @property
    def is_of_time(self) -> bool:
        """Whether it is the time that is given."""
        return self.kind in ("speedup", "latency_ms")


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found.

    ``rows`` are those of the proof run: the unpatched model, the tuned schedule, and at its measured speed constant r
    and (r, -1).
    """

    r: list[int]
    is_met: bool
    rows: list[Row]
    costs: costs.Costs
    passes: float

    @property
    def tuned(self) -> Row:
        """The row of the schedule."""
        return self.rows[-1]


def tune(
    model: nn.Module,
    images: Tensor,
    wish: Wish,
    batch_size: int = 16,
    labels: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    passes: int = PASSES,
    tell: Callable[[float, str], None] = lambda done, what: None,
) -> Tuned:
    """Find a schedule.

    Args:
        model: not patched, in eval mode on its device; it stays as it is.
        images: [N, 3, H, W] to compare on, in the model's dtype; at least two.
        wish: what is wanted.
        batch_size: of the batch whose time counts.
        labels: int64 [N], or None.
        autocast: makes the context that passes run under.
        passes: how many the search may take over the images; those that begin late count as parts.
        tell: called with the share of the work that is done, and with what is being done.

    Raises:
        UnsupportedModelError: the model cannot be patched.
        ValueError: too few images, or a drop is wanted of a model without a head.

    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images are too few to compare schedules on")
    device = next(model.parameters()).device
    x = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size].to(device)
    base = evaluate.Split(patch.unpatch(evaluate.twin(model, 0)), x[:1])
    if base.classes is None and wish.kind == "max_drop":
        raise ValueError("the model has no head, and so no classes that could change: ask for an agreement")
    twin = evaluate.twin(base, 0)
    inner = patched_in(twin)
    assert inner is not None
    shape = len(inner._tome_blocks()), cost.tokens(inner, _size(images)), inner._tome_prefix()[0]
    tell(0.0, "measuring blocks")
    table = costs.measured(base, x, lambda r: schedule.plan(r, *shape), autocast)
    at_once = batch_size if device.type == "cpu" else max(batch_size, 64)
    runs = Passes(twin, images, at_once, labels, autocast)
    problem = search.Problem(*shape, table.total, lambda r: runs.errors(r).distances, runs.rebase, lambda: runs.work)

    done = 0.05

    def told(r: search.R) -> None:
        nonlocal done
        done = max(done, min(0.05 + 0.85 * runs.work / passes, 0.9))
        tell(done, f"{table.unpatched / problem.seconds(r):.2f}x at 1 - cosine {runs.errors(r).distance:.2e}")

    def is_allowed(r: search.R) -> bool:
        errors = runs.errors(r)
        return errors.drop <= wish.value if wish.kind == "max_drop" else 1 - errors.distance >= wish.value

    runs.tell = told
    hunt = Hunt(problem, passes)
    limit = table.unpatched / wish.value if wish.kind == "speedup" else wish.value / 1e3
    found = hunt.in_time(limit) if wish.is_of_time else hunt.within(is_allowed)
    done = 0.9
    tell(done, "proving")
    for _ in range(ROUNDS if wish.is_of_time and hunt.is_in_reach else 0):
        seconds = seconds_of(base, x, {UNPATCHED: found, TUNED: found}, autocast)
        if wish.kind == "speedup":
            limit = seconds[UNPATCHED] / wish.value
        off = seconds[TUNED] / limit - 1
        if -2 * TOLERANCE < off < TOLERANCE / 2:
            break
        found = hunt.again(found, problem.seconds(found) / (1 + off))
    proofs: list[tuple[float, list[Row]]] = []
    while True:
        rows = proved(base, x, problem, runs, found, autocast)
        if wish.kind == "speedup":
            limit = rows[0].seconds / wish.value
        off = rows[-1].seconds / limit - 1 if wish.is_of_time else 0.0
        proofs.append((off, rows))
        if off <= TOLERANCE or not hunt.is_in_reach or len(proofs) == ROUNDS:
            break
        found = hunt.again(found, problem.seconds(found) / (1 + off))
    off, rows = min(proofs, key=lambda proof: proof[0])  # the nearest: all before the last took too long
    is_met = off <= TOLERANCE if wish.is_of_time else hunt.is_in_reach and rows[-1].speedup > 1
    tell(1.0, "done")
    return Tuned(rows[-1].r, is_met, rows, table, runs.work)


def _size(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width
