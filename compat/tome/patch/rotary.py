"""Rotary positions: a table with a row for each original token, read at the places in which merged tokens stand."""

from __future__ import annotations

import torch
from torch import Tensor

from tome.patch.row import Place


def rows(table: Tensor, place: Place, prefix: int) -> Tensor:
    """The rows of ``table`` for the tokens that are left: [B, 1 or H, N - P, 2 * D], or all of it."""
    if place.home is None:
        return table
    home = place.home[:, prefix:] - prefix
    if table.dim() == 2:
        return table[home][:, None]
    if table.dim() == 3:
        return table[:, home].transpose(0, 1)
    image = torch.arange(home.shape[0], device=home.device)[:, None]
    return table.transpose(1, 2)[image, home].transpose(1, 2)
