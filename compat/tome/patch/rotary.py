"""Rotary positions: a table with a row for each original token, read at the places in which merged tokens stand."""

from __future__ import annotations

from torch import Tensor

from tome.patch.row import Place
from tome_reference import position


def rows(table: Tensor, place: Place, prefix: int) -> Tensor:
    """The rows of ``table`` for the tokens that are left: [B, 1 or H, N - P, 2 * D], or all of it."""
    return table if place.home is None else position.rows(table, place.home[:, prefix:] - prefix)
