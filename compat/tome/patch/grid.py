"""The cells of a grid, and one token in each into which others may merge (arXiv 2303.17604)."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def cells(height: int, width: int, sx: int, sy: int) -> tuple[int, int]:
    """Rows and columns of cells of sy x sx tokens; the last ones are smaller where the grid does not divide."""
    return -(-height // sy), -(-width // sx)


def sets(
    height: int, width: int, sx: int, sy: int, drawn: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which tokens may merge, and into which: of each cell one token is a target, and all others are sources.

    Args:
        height: of the grid of tokens.
        width: likewise; token i stands in row i // width.
        sx: width of a cell.
        sy: height of a cell.
        drawn: int64 [cells], a number of zero or more for each, which chooses the token; None: the top left one.
        device: of the result.

    Returns:
        Sources int64 [S] and targets int64 [T], the cells; each in the order of the grid.

    """
    rows, columns = cells(height, width, sx, sy)
    n, targets = height * width, rows * columns
    cell = torch.arange(targets, device=device)
    y, x = cell // columns * sy, cell % columns * sx
    if drawn is not None:
        high, wide = (height - y).clamp(max=sy), (width - x).clamp(max=sx)
        inside = drawn % (high * wide)
        y, x = y + inside // wide, x + inside % wide
    token = torch.arange(n, device=device)
    is_target = torch.zeros_like(token).scatter(0, y * width + x, 1)
    by_set = (is_target * n + token).argsort()  # distinct keys: a stable sort does not export
    return by_set[: n - targets], by_set[n - targets :]


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


def check(ratio: float, max_downsample: int | None, sx: int, sy: int, merges: dict[str, bool]) -> None:
    """Refuse arguments of :func:`tome.patch.diffusers` that are out of range."""
    for name, value in merges.items():
        wanted = name == "merge_attn"
        if value is not wanted:
            raise ValueError(f"{name} must be {wanted}, got {value!r}: tokens merge around self-attention alone")
    for name, least in (("sx", sx), ("sy", sy), ("max_downsample", 1 if max_downsample is None else max_downsample)):
        if not isinstance(least, int) or least < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {least!r}")
    if not 0 <= ratio <= 1 - 1 / (sx * sy):
        raise ValueError(f"ratio must be in [0, {1 - 1 / (sx * sy):g}] for cells of {sx} x {sy}, got {ratio!r}")


def share(ratio: float) -> tuple[int, int]:
    """Numerator and denominator, of which a product with a count of tokens is an integer, and no symbol."""
    return Fraction(ratio).limit_denominator(1000).as_integer_ratio()
