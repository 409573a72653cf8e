"""Rotary positions: a table with a row for each original token, read at the places in which merged tokens stand."""

from __future__ import annotations

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from tome.patch.row import Place


def rotated(
    q: Tensor, k: Tensor, table: Tensor, place: Place, prefix: int, is_half: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys, each turned by its place; the leading tokens stand nowhere and stay as they are.

    Args:
        q: [B, H, N, D].
        k: [B, H', N, D].
        table: sines beside cosines for the original tokens behind the leading ones: [N0 - P, 2 * D]; for each head
            [H, N0 - P, 2 * D]; or for each image [B, 1 or H, N0 - P, 2 * D].
        place: where the tokens stand.
        prefix: P, how many leading tokens are not turned.
        is_half: whether a channel's partner is half the channels away; otherwise it is its neighbour.

    Returns:
        q and k in the dtype that timm's formula gives them.

    """
    table = rows(table, place, prefix)
    turned = (apply_rot_embed_cat(x[:, :, prefix:], table, half=is_half) for x in (q, k))
    q, k = (torch.cat([x[:, :, :prefix], y], dim=2) for x, y in zip((q, k), turned, strict=True))
    return q, k


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
