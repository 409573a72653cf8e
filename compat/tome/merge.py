"""Merging under the names that existing scripts use, over slot maps.

Each matching function returns a pair of functions, ``merge(x, mode="mean")`` and ``unmerge(x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tome import ops

__all__ = [
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]

Merge: TypeAlias = Callable[..., Tensor]
Unmerge: TypeAlias = Callable[[Tensor], Tensor]


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Unmerge]:
    """Bipartite soft matching with :func:`tome.ops.match`.

    Args:
        metric: [B, N, D].
        r: tokens to merge, at most half of the unprotected ones; 0 or less gives the identity.
        class_token: the first token is protected.
        distill_token: one more leading token is protected.

    Returns:
        (merge, unmerge): merge takes x [B, N, C] and a mode among mean, sum and amax (over each group, target
        included) and returns [B, M, C]; unmerge takes [B, M, C] and returns [B, N, C].

    """
    return _functions(ops.match(metric, max(r, 0), int(class_token) + int(distill_token)))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Unmerge]:
    """Of each run of k tokens the last is kept and all others merge into their best kept one: N // k remain.

    Args:
        metric: [B, N, D].
        k: the length of a run; 1 or less gives the identity.

    Returns:
        (merge, unmerge), see :func:`bipartite_soft_matching`.

    """
    return _functions(ops.kth_match(metric, max(k, 1), 0))


def random_bipartite_soft_matching(metric: Tensor, r: int) -> tuple[Merge, Unmerge]:
    """R random tokens merge into their best among the others, which stay in ascending order.

    Args:
        metric: [B, N, D].
        r: tokens to merge, at most half; 0 or less gives the identity.

    Returns:
        (merge, unmerge), see :func:`bipartite_soft_matching`.

    """
    return _functions(ops.random_match(metric, max(r, 0), 0))


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of each group, weighted by size.

    Args:
        merge: from a matching function.
        x: [B, N, C].
        size: [B, N, 1]; None for one each.

    Returns:
        x [B, M, C] and size [B, M, 1].

    """
    if size is None:
        size = torch.ones_like(x[..., :1], dtype=torch.float32)
    total = merge(size, mode="sum")
    return (merge(x * size, mode="sum") / total).to(x.dtype), total


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """The adjacency matrix [B, M, N0] after one more merge; None stands for the identity before the first.

    Args:
        merge: from a matching function.
        x: [B, N, C], for its shape and device.
        source: [B, N, N0].

    """
    if source is None:
        n = x.shape[1]
        source = torch.eye(n, device=x.device).expand(x.shape[0], n, n)
    return merge(source, mode="amax")


def _functions(slot: Tensor) -> tuple[Merge, Unmerge]:
    tokens = int(slot.max()) + 1 if slot.numel() else slot.shape[1]

    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        if mode not in ("mean", "sum", "amax"):
            raise ValueError(f"mode must be mean, sum or amax, got {mode!r}")
        if tokens == slot.shape[1]:
            return x
        if mode == "amax":
            index = slot.long()[:, :, None].expand_as(x)
            lowest = x.new_full((x.shape[0], tokens, x.shape[2]), -torch.inf)
            return lowest.scatter_reduce(1, index, x, "amax")
        mean, size = ops.merge(x, slot, tokens)
        return mean if mode == "mean" else mean * size[:, :, None].to(x.dtype)

    def unmerge(x: Tensor) -> Tensor:
        return x if tokens == slot.shape[1] else ops.unmerge(x, slot)

    return merge, unmerge
