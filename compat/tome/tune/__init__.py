"""Find the schedule for a model, some images and this machine: as near to the unmerged model as the time allows.

:func:`tune` measures what blocks cost (:mod:`tome.tune.costs`), runs schedules on the images (:mod:`tome.tune.passes`),
searches (:mod:`tome.tune.search`) and proves in a run what it found (:mod:`tome.tune.proof`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from tome import cost, schedule
from tome.patch.model import patched_in
from tome.tune import costs, search
from tome.tune.hunt import Hunt
from tome.tune.outputs import pooled
from tome.tune.passes import Outputs, Passes
from tome.tune.proof import Row, proved
from tome.variants import patched

__all__ = ["Kind", "Row", "Tuned", "Wish", "tune"]

Kind: TypeAlias = Literal["speedup", "latency_ms", "max_drop", "agreement"]

TOLERANCE = 0.01  # of a time: as far as two measurements of the same may lie apart
PASSES = 200  # over the images that the search may take
ROUNDS = 3  # in which what was found is measured, and searched again for where the table was wrong


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
    outputs: Outputs = pooled,
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
        outputs: what gives pooled features [B, C] and logits [B, K], called with a model and images.
        autocast: makes the context that passes run under.
        passes: how many the search may take over the images; those that begin late count as parts.
        tell: called with the share of the work that is done, and with what is being done.

    Raises:
        UnsupportedModelError: the model cannot be patched.
        ValueError: too few images.

    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images are too few to compare schedules on")
    device = next(model.parameters()).device
    twin = patched(model)
    inner = patched_in(twin)
    assert inner is not None
    shape = len(inner._tome_blocks()), cost.tokens(model, tuple(images.shape[1:])), inner._tome_prefix()[0]
    x = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size].to(device)
    tell(0.0, "measuring blocks")
    table = costs.measured(model, x, lambda r: schedule.plan(r, *shape), autocast)

    def within(a_model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        with autocast():
            return outputs(a_model, batch)

    runs = Passes(twin, images, batch_size if device.type == "cpu" else max(batch_size, 64), within, labels)
    problem = search.Problem(*shape, table.total, lambda r: runs.errors(r).distances, runs.rebase, lambda: runs.work)
    limits = {"max_drop": lambda r: runs.errors(r).drop <= wish.value}
    limits["agreement"] = lambda r: 1 - runs.errors(r).distance >= wish.value

    def told(r: search.R) -> None:
        what = f"{table.unpatched / problem.seconds(r):.2f}x with 1 - cosine {runs.errors(r).distance:.2e}"
        tell(min(0.05 + 0.85 * runs.work / passes, 0.9), what)

    hunt = Hunt(problem, passes, told)
    wanted = {"speedup": lambda v: table.unpatched / v, "latency_ms": lambda v: v / 1e3}
    if wish.is_of_time:
        limit = wanted[wish.kind](wish.value)
        found = hunt.in_time(limit)
    else:
        limit = 0.0
        found = hunt.within(limits[wish.kind])
    tell(0.9, "proving")
    prove: Any = lambda r: proved(model, x, problem, runs, r, autocast)  # noqa: E731
    rows = prove(found)
    for _ in range(ROUNDS):
        error = rows[-1].seconds / limit - 1 if wish.is_of_time else 0.0
        if not hunt.is_in_reach or -2 * TOLERANCE < error < TOLERANCE / 2:
            break
        found = hunt.again(found, problem.seconds(found) / (1 + error))
        rows = prove(found)
    if wish.is_of_time:
        is_met = rows[-1].seconds <= limit * (1 + TOLERANCE)
    else:
        is_met = hunt.is_in_reach and any(found) and limits[wish.kind](found)
    tell(1.0, "done")
    return Tuned(list(found), is_met, rows, table, runs.work)
