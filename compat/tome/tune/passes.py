"""Passes of a patched model over the same images with ever other schedules, each from the first block that differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tome.evaluate import Outputs
from tome.patch.model import patched_in
from tome.tune.costs import Autocast


class Errors(NamedTuple):
    """How far a merged model is from the unmerged one."""

    distances: Tensor  # [N], 1 - cosine of the pooled features
    drop: float  # points of top-1 accuracy lost, without labels of images that get another class; NaN without classes

    @property
    def distance(self) -> float:
        """The mean over the images."""
        return float(self.distances.mean())


class Passes:
    """The model on the images. What its blocks gave for one schedule, the base, is kept for those that begin alike."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        batch_size: int,
        labels: Tensor | None = None,
        autocast: Autocast = nullcontext,
        memory: int = 2**31,
    ) -> None:
        """Run the unmerged model.

        Args:
            model: a patched one in an :class:`tome.evaluate.Split`; its ``r`` changes.
            images: [N, 3, H, W] on any device, in the model's dtype.
            batch_size: images a pass.
            labels: int64 [N].
            autocast: makes the context that passes run under.
            memory: bytes that may be kept.

        """
        inner = patched_in(model)
        assert inner is not None
        self.model: Any = model
        self.blocks: list[nn.Module] = list(inner._tome_blocks().values())
        self.images = images
        self.device = next(model.parameters()).device
        self.autocast, self.memory = autocast, memory
        self.tell: Callable[[tuple[int, ...]], None] = lambda r: None  # called with every schedule
        self.batches = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]
        self.work = 0.0  # passes so far, those that began late as parts of one
        self.stride = 0  # of the blocks whose outputs are kept; 0: not known yet
        self.known: dict[tuple[int, ...], Errors] = {}
        self.base: tuple[int, ...] = ()
        self.kept: list[dict[int, Any]] = [{} for _ in self.batches]  # by batch and block
        features, logits = self._run((0,) * len(self.blocks), 0)
        self.features = nn.functional.normalize(features, dim=1)
        self.classes = None if logits is None else logits.argmax(dim=1)
        self.labels = None if labels is None else labels.to(self.device)

    def errors(self, r: Sequence[int]) -> Errors:
        """How far the schedule takes the model from its unmerged self."""
        key = tuple(r)
        if key not in self.known:
            features, logits = self._run(key, self._first(key))
            cosine = (nn.functional.normalize(features, dim=1) * self.features).sum(dim=1)
            self.known[key] = Errors((1 - cosine).cpu(), self._drop(logits))
            self.tell(key)
        return self.known[key]

    def _drop(self, logits: Tensor | None) -> float:
        if logits is None or self.classes is None:
            return math.nan
        classes = logits.argmax(dim=1)
        if self.labels is None:
            return 100 * float((classes != self.classes).double().mean())
        right = (self.classes == self.labels).double() - (classes == self.labels).double()
        return 100 * float(right.mean())

    def rebase(self, r: Sequence[int]) -> None:
        """Keep what the blocks give for this schedule from now on."""
        key = tuple(r)
        if key == self.base:
            return
        first = self._first(key)
        for kept in self.kept:
            for block in [block for block in kept if block >= first]:
                del kept[block]
        self._run(key, first, keep=True)
        self.base = key

    def _first(self, r: tuple[int, ...]) -> int:
        """The first block that must run."""
        alike = next((i for i, (a, b) in enumerate(zip(r, self.base, strict=False)) if a != b), len(self.base))
        alike = min(alike, len(r) - 1)
        return max((block + 1 for block in self.kept[0] if block < alike), default=0)

    def _run(self, r: tuple[int, ...], first: int, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        self.model.r = list(r)
        self.work += 1 - first / len(self.blocks)
        found: list[Outputs] = []
        with torch.inference_mode(), self.autocast():
            for batch, kept in zip(self.batches, self.kept, strict=True):
                with ExitStack() as stack:
                    for i, block in enumerate(self.blocks):
                        if i < first:
                            stack.enter_context(_forward(block, lambda *_, out=kept[first - 1], **__: out))
                        elif keep and i + 1 < len(self.blocks):
                            stack.enter_context(_forward(block, self._keeping(block, i, kept)))
                    found.append(self.model(self.images[batch].to(self.device)))
        logits = [each.logits for each in found if each.logits is not None]
        return torch.cat([each.features for each in found]).double(), torch.cat(logits) if logits else None

    def _keeping(self, block: nn.Module, i: int, kept: dict[int, Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = type(block).forward(block, *args, **kwargs)
            if self.stride == 0:
                tensors = [leaf for leaf in _pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
                needed = sum(t.nbytes for t in tensors) * len(self.batches) * len(self.blocks)
                self.stride = max(1, -(-needed // max(self.memory, 1)))
            if i % self.stride == 0:
                kept[i] = out
            return out

        return forward


@contextmanager
def _forward(block: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block be another function within this."""
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
