"""What merging does to a model's answers: accuracy, agreement with the unmerged model, speed, all in one run.

Every quantity is summed as an integer (of 2**-32), so that no order of images, batches, processes or interrupted runs
changes the last digit. What the images themselves give is as exact as the device computes it for its batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from tome import measure, patch, schedule
from tome.data import Batch

UNIT = 2.0**32
COLUMNS = ("finite", "labelled", "top1", "top5", "same_top1", "cosine", "kl")
TIMED = ("full_images", "full_seconds", "short_images", "short_seconds")
T = TypeVar("T")


class Outputs(NamedTuple):
    """What a model makes of a batch."""

    features: Tensor  # [B, C], pooled, as they enter the head
    logits: Tensor | None  # [B, K]


class Split(nn.Module):
    """A model whose head runs apart from it, so that one pass gives the pooled features as well as the logits.

    Its head is the linear layer that gives the model's output; the model is changed in place. A model that makes its
    output of several heads has its logits for features, one without a head its pooled output or its class token.

    Args:
        model: patched or not.
        x: an image or more [B, C, H, W] for one pass that tells where the head is.

    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        name, self.classes = _find_head(model, x)
        self.head = model.get_submodule(name) if name else None
        if name:
            model.set_submodule(name, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> Outputs:
        """Features and logits of images [B, C, H, W]."""
        features, _ = _tensor(self.model(x))
        logits = None if self.classes is None else features if self.head is None else self.head(features)
        return Outputs(features, logits)


def twin(model: nn.Module, r: schedule.Schedule) -> nn.Module:
    """A patched copy that shares the weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    variant: Any = patch.auto(copy.deepcopy(model, shared))
    variant.r = r
    return cast(nn.Module, variant)


def compare(base: Outputs, out: Outputs, label: Tensor) -> Tensor:
    """Sums over a batch, int64 in the order of COLUMNS; cosine and kl in units of 2**-32.

    Args:
        base: of the unmerged model.
        out: of the model that merges.
        label: int64 [B], -1 where there is none.

    Returns:
        Images of finite output; of these the labelled, those right at once, right within five, with the answer of
        ``base``; the cosine of the features with those of ``base``; the Kullback-Leibler divergence of the logits from
        those of ``base``, in nats. Others count as labelled only.

    """
    pairs = [(base.features, out.features)]
    if base.logits is not None and out.logits is not None:
        pairs.append((base.logits, out.logits))
    finite = torch.stack([part.isfinite().all(dim=1) for pair in pairs for part in pair]).all(dim=0)
    cosine = nn.functional.cosine_similarity(pairs[0][0].double(), pairs[0][1].double())
    none = torch.zeros_like(cosine)
    counts, values = [finite, label >= 0], [cosine, none]
    if len(pairs) == 2:
        old, new = (part.double() for part in pairs[1])
        top = new.topk(min(5, new.shape[1])).indices
        right = (top == label[:, None]) & finite[:, None]
        counts += [right[:, 0], right.any(dim=1), (top[:, 0] == old.argmax(dim=1)) & finite]
        logs = (old.log_softmax(dim=1), new.log_softmax(dim=1))
        values[1] = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=1)
    else:
        counts += [none.bool()] * 3
    whole = [(value.where(finite, none) * UNIT).round().long() for value in values]
    return torch.stack([column.long().sum() for column in (*counts, *whole)])


@dataclass
class Tally:
    """Sums over images; those of batches, of processes and of interrupted runs add up."""

    images: int = 0
    broken: list[str] = field(default_factory=list)
    sums: list[list[int]] = field(default_factory=list)  # for each variant, in the order of COLUMNS
    timed: list[list[float]] = field(default_factory=list)  # for each variant, in the order of TIMED
    seconds: float = 0.0  # of everything
    waited: float = 0.0  # of these, for images

    def add(self, other: Tally) -> None:
        """Add the sums of other images of the same variants."""
        self.images += other.images
        self.broken += other.broken
        self.sums = _added(self.sums, other.sums)
        self.timed = _added(self.timed, other.timed)
        self.seconds += other.seconds
        self.waited += other.waited

    def mean(self, variant: int, column: str) -> float:
        """A column of COLUMNS over the images of finite output, or over the labelled ones."""
        values = dict(zip(COLUMNS, self.sums[variant], strict=True))
        over = values["labelled" if column in ("top1", "top5") else "finite"]
        return values[column] / (UNIT if column in ("cosine", "kl") else 1) / over if over else float("nan")

    def rate(self, variant: int) -> float:
        """Images per second of the model alone, over batches of the full size where there are any."""
        full_images, full_seconds, images, seconds = self.timed[variant]
        return full_images / full_seconds if full_images else images / seconds if images else float("nan")

    def model_seconds(self) -> float:
        """Seconds of all variants together."""
        return sum(full + short for _, full, _, short in self.timed)


@dataclass(frozen=True)
class Result:
    """What came out for one variant; shares are of one."""

    top1: float | None
    top5: float | None
    same_top1: float | None
    cosine: float
    kl: float | None
    images_per_second: float
    speedup: float
    nonfinite: int


def results(tally: Tally, classes: int | None, labelled: bool) -> list[Result]:
    """The results of each variant, the first of which is the one that others are compared with.

    Args:
        tally: of all images.
        classes: what the head can tell apart; None without a head.
        labelled: whether accuracy means anything.

    """
    graded = labelled and classes is not None
    return [
        Result(
            top1=tally.mean(i, "top1") if graded else None,
            top5=tally.mean(i, "top5") if graded and classes is not None and classes > 5 else None,
            same_top1=None if classes is None else tally.mean(i, "same_top1"),
            cosine=tally.mean(i, "cosine"),
            kl=None if classes is None else tally.mean(i, "kl"),
            images_per_second=tally.rate(i),
            speedup=tally.rate(i) / tally.rate(0),
            nonfinite=tally.images - tally.sums[i][0],
        )
        for i in range(len(tally.sums))
    ]


def evaluate(
    variants: Mapping[str, Callable[[Tensor], Outputs]],
    batches: Iterable[Batch],
    batch_size: int,
    device: torch.device,
    padded: bool = False,
) -> Iterator[tuple[list[int], Tally]]:
    """Run all variants on each batch, one after the other, so that they share its conditions.

    Args:
        variants: what to run; the first is the unmerged model, with which the others are compared.
        batches: of :func:`tome.data.batches`.
        batch_size: images of a full batch.
        device: where they are.
        padded: run smaller batches at the full size, for what is compiled for that.

    Yields:
        The places of the images in the dataset, and their sums. The first batch is preceded by passes that nothing
        measures.

    """
    names, step, clock = list(variants), 0, time.perf_counter()
    for batch in batches:
        waited, spare, n = time.perf_counter() - clock, 0.0, len(batch.x)
        tally = Tally(n, batch.broken)
        if n:
            x = batch.x
            if padded:
                x = x[torch.arange(batch_size, device=device).clamp(max=n - 1)]
            if step == 0:
                begin = time.perf_counter()
                for name in names:
                    _run(variants[name], x, device)
                spare = time.perf_counter() - begin
            turn = step % len(names)  # none is always the first
            made = {name: _run(variants[name], x, device) for name in names[turn:] + names[:turn]}
            base = _rows(made[names[0]][1], n)
            sums = [compare(base, _rows(made[name][1], n), batch.label) for name in names]
            tally.sums = torch.stack(sums).tolist()
            timed = [(len(x), made[name][0]) for name in names]
            tally.timed = [[*one, 0, 0.0] if len(x) == batch_size else [0, 0.0, *one] for one in timed]
            step += 1
        now = time.perf_counter()
        tally.seconds, tally.waited, clock = now - clock - spare, waited, now
        yield batch.positions, tally


def largest_batch(run: Callable[[int], object], most: int, device: torch.device) -> int:
    """The largest power of two of images that leaves a fifth of the free memory free, up to ``most``.

    Args:
        run: runs whatever is to fit, with so many images; it raises ``torch.OutOfMemoryError`` where they don't.
        most: the largest to try.
        device: whose memory it is; a GPU.

    Raises:
        torch.OutOfMemoryError: not even one image fits.

    """
    size = 1
    run(1)
    while 2 * size <= most and _fits(run, 2 * size, device):
        size *= 2
    return size


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other is as good as in both coordinates and better in one, by the first, descending."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _fits(run: Callable[[int], object], size: int, device: torch.device) -> bool:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0]
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run(size)
    except torch.OutOfMemoryError:
        return False
    finally:
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    return peak - held <= 0.8 * free


@torch.inference_mode()
def _run(variant: Callable[[Tensor], Outputs], x: Tensor, device: torch.device) -> tuple[float, Outputs]:
    return measure.timed(lambda: variant(x), device)


def _rows(out: Outputs, n: int) -> Outputs:
    return Outputs(out.features[:n], None if out.logits is None else out.logits[:n])


def _added(a: list[list[T]], b: list[list[T]]) -> list[list[T]]:
    if not a or not b:
        return a or b
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]  # type: ignore[operator]


def _tensor(output: Any) -> tuple[Tensor, bool]:
    """[B, C] of what a model of any library returns, and whether that may be logits."""
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found, name == "logits"
    if not isinstance(output, Tensor):
        output = output[0]  # of transformers the last hidden state
    return (output, True) if output.ndim == 2 else (output[:, 0], False)


@torch.inference_mode()
def _find_head(model: nn.Module, x: Tensor) -> tuple[str | None, int | None]:
    """The name of the linear layer that gives the model's output, and how many classes that tells apart."""
    made: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: made.update({name: out}))
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear)
    ]
    try:
        output, may_be_logits = _tensor(model(x))
    finally:
        for hook in hooks:
            hook.remove()
    name = next((name for name, out in made.items() if out is output), None)
    several = may_be_logits and any(out.shape == output.shape for out in made.values())
    return name, output.shape[1] if name or several else None


__all__ = [
    "Outputs", "Result", "Split", "Tally", "compare", "evaluate", "largest_batch", "pareto", "results", "twin",
]  # fmt: skip
