"""Judging a slot map by float64 scores: it is right when every choice in it was the best one, to rounding.

Two float32 computations of one score differ in the last bits, so on real-valued keys two right answers may
choose differently where scores nearly tie. What is exact (the structure of the map) is checked exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Rounding of the unit vectors (2^-23 relative) and of the score (3 * 2^-22, metric.cuh), on either side.
TOLERANCE = 2.0e-6


def error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute error, in float64; 0 of nothing."""
    return float((value.detach().double() - truth.detach()).abs().max()) if truth.numel() else 0.0


class Verdict(NamedTuple):
    """How far the choices were from the best ones, by float64 scores; 0 where no choice was wrong."""

    target_gap: float
    source_gap: float

    def is_right(self, tolerance: float = TOLERANCE) -> bool:
        return max(self) <= tolerance


def scores(keys: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Float64 cosines [B, S, T] of the tokens at positions [B, S] and [B, T]; NaN counts as -inf."""
    metric = keys.detach().double()
    if metric.dim() == 4:
        metric = metric.sum(dim=1)
    largest = metric.abs().amax(dim=-1, keepdim=True)
    metric = metric / largest.masked_fill(largest == 0, 1.0)
    norm = metric.norm(dim=-1, keepdim=True)
    metric = metric / norm.masked_fill(norm == 0, 1.0)

    def rows(index: Tensor) -> Tensor:
        return metric.gather(1, index[:, :, None].expand(-1, -1, metric.shape[2]))

    cosines = rows(sources) @ rows(targets).transpose(1, 2)
    return cosines.masked_fill(cosines.isnan(), -torch.inf)


def bipartite_positions(batch: int, n: int, prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of sets A and B, [B, S] and [B, T]."""
    free = torch.arange(prefix, n, device=device)
    sets = (free[free % 2 == 0], free[free % 2 == 1])
    return sets[0].expand(batch, -1), sets[1].expand(batch, -1)


def judge_match(keys: Tensor, slot: Tensor, r: int, prefix: int) -> Verdict:
    """Judge the map of ``match(keys, r, prefix)``; where nothing merges it must be the identity."""
    batch, n = slot.shape
    merged = min(r, (n - prefix) // 2)
    if merged == 0 or batch == 0:
        identity = torch.arange(n, dtype=torch.int32, device=slot.device).expand(batch, -1)
        assert torch.equal(slot, identity)
        return Verdict(0.0, 0.0)
    return judge(keys, slot, *bipartite_positions(batch, n, prefix, slot.device), merged, prefix)


def judge(keys: Tensor, slot: Tensor, sources: Tensor, targets: Tensor, merged: int, prefix: int) -> Verdict:
    """Check the structure of a slot map exactly (AssertionError), its choices by score."""
    batch = slot.shape[0]
    assert slot.dtype == torch.int32
    assert slot.device == keys.device
    first_target = prefix + sources.shape[1] - merged
    device = slot.device
    assert torch.equal(slot[:, :prefix].long(), torch.arange(prefix, device=device).expand(batch, -1))
    expected = torch.arange(first_target, first_target + targets.shape[1], device=device).expand(batch, -1)
    assert torch.equal(slot.gather(1, targets).long(), expected)
    slot_s = slot.gather(1, sources).long()
    is_merged = slot_s >= first_target
    assert torch.equal(is_merged.sum(dim=1), torch.full((batch,), merged, device=device))
    kept_order = prefix - 1 + (~is_merged).cumsum(dim=1)
    assert torch.equal(slot_s[~is_merged], kept_order[~is_merged])

    target = (slot_s - first_target).clamp(min=0)
    assert int(target.max()) < targets.shape[1]
    cosines = scores(keys, sources, targets)
    best = cosines.amax(dim=2)
    chosen = cosines.gather(2, target[:, :, None])[:, :, 0]
    # Equal infinities leave no gap: where nothing can be scored, any target in range is as good as another.
    target_gap = torch.where(best == chosen, 0.0, best - chosen)[is_merged].max()
    worst_merged = best.masked_fill(~is_merged, torch.inf).amin(dim=1)
    best_kept = best.masked_fill(is_merged, -torch.inf).amax(dim=1)
    source_gap = torch.where(best_kept <= worst_merged, 0.0, best_kept - worst_merged).max()
    return Verdict(float(target_gap), float(source_gap))
