"""Matching on a grid: one target in each cell, the most similar of all other tokens merge (arXiv 2303.17604).

No operation of its own: tokens are laid out so that :func:`tome.ops.match`, with its kernels, finds the sources at even
positions and the targets at odd ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome import ops

WORD = 0xFFFFFFFF


class Layout(NamedTuple):
    """Sources and targets of a grid of N tokens, and where they lie for matching."""

    order: Tensor  # int64 [2 max(S, T)], the token at each position; N where there is none
    position: Tensor  # int64 [N], the position of each token
    sources: int  # S
    targets: int  # T = N - S, one in each cell

    @property
    def absent(self) -> int:
        """At how many positions for sources there is none."""
        return self.order.shape[0] // 2 - self.sources


def cells(height: int, width: int, sx: int, sy: int) -> tuple[int, int]:
    """Rows and columns of cells of sy x sx tokens; the last ones are smaller where the grid does not divide."""
    return -(-height // sy), -(-width // sx)


def layout(height: int, width: int, sx: int, sy: int, drawn: Tensor | None, device: torch.device) -> Layout:
    """Which token of each cell is the target.

    Args:
        height: of the grid of tokens.
        width: likewise; token i stands in row i // width.
        sx: width of a cell.
        sy: height of a cell.
        drawn: int64 [cells], a number of zero or more for each, which chooses the token; None: the top left one.
        device: of the result.

    Returns:
        The layout; sources and targets each in the order of the grid.

    """
    rows, columns = cells(height, width, sx, sy)
    n, targets = height * width, rows * columns
    sources = n - targets
    cell = torch.arange(targets, device=device)
    y, x = cell // columns * sy, cell % columns * sx
    if drawn is not None:
        high, wide = (height - y).clamp(max=sy), (width - x).clamp(max=sx)
        inside = drawn % (high * wide)
        y, x = y + inside // wide, x + inside % wide
    token = torch.arange(n, device=device)
    is_target = torch.zeros_like(token).scatter(0, y * width + x, 1)
    by_set = (is_target * n + token).argsort()  # distinct keys: a stable sort does not export
    where = torch.cat([2 * token[:sources], 2 * token[:targets] + 1])
    order = torch.full((2 * max(sources, targets),), n, device=device).scatter(0, where, by_set)
    return Layout(order, torch.empty_like(token).scatter(0, by_set, where), sources, targets)


def match(metric: Tensor, where: Layout, r: int) -> Tensor:
    """The ``r`` sources that are most like their best target merge into it.

    Args:
        metric: [B, N, D], floating point; similarity is the cosine.
        where: sources and targets.
        r: how many merge, from 1 to ``where.sources``.

    Returns:
        slot, int32 [B, N], onto [0, N - r): the unmerged sources, then the targets, each in the order of the grid. Ties
        go to the first token, as in :func:`tome.ops.match`.

    """
    # A token that is not there is NaN, which scores below everything and comes behind all others.
    nobody = torch.full_like(metric[:, :1], torch.nan)
    slot = ops.match(torch.cat([metric, nobody], dim=1)[:, where.order], r, 0)[:, where.position]
    if where.absent:
        first = where.sources + where.absent - r  # the slot of the first target, absent sources before it
        slot = torch.where(slot < first, slot, slot - where.absent)
    return slot


def draws(seed: int, timestep: Tensor | float | None, count: int, device: torch.device) -> Tensor:
    """Random numbers int64 [count] that depend on seed and timestep alone: no generator moves, and no device waits.

    Args:
        seed: any integer.
        timestep: of which the first value counts; None for none.
        count: how many.
        device: of the result, which is the same on every device.

    """
    now = torch.as_tensor(0.0 if timestep is None else timestep, device=device).reshape(-1)[:1]
    now = now.to(torch.float32).view(torch.int32).to(torch.int64)
    return _mixed(_mixed(now + _word(seed)) + torch.arange(count, device=device))


def _word(seed: int) -> int:
    return (seed * 0x9E3779B1 + 0x7F4A7C15) & WORD


def _mixed(x: Tensor) -> Tensor:
    """Every bit of 32 reaches every other (Wellons' "lowbias32")."""
    x = x & WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        x = (x * factor) & WORD
    return x ^ (x >> 16)
