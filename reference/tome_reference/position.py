"""Where tokens stand: the rotary embedding of queries and keys, biases of pairs, and the places of merged tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks


def rotate(
    q: Tensor, k: Tensor, table: Tensor, home: Tensor | None = None, prefix: int = 0, is_half: bool = False
) -> tuple[Tensor, Tensor]:
    """The rotary embedding: x * cos + turned(x) * sin, by the place in which each token stands.

    Args:
        q: [B, H, N, D], floating point, any strides; D is even.
        k: [B, H', N, D], the dtype of q.
        table: [P, 2 * D], sines and then cosines of the P places behind the prefix; or [H, P, 2 * D] for each head;
            or [B or 1, H or 1, P, 2 * D] for each image. Floating point. Where H' is not H it is for all heads alike.
        home: int64 or int32 [B, N], the original token in whose place each stands, prefix included, as :func:`homes`
            gives it; read behind the prefix only. None: each in its own, and P is N - prefix.
        prefix: how many leading tokens stay as they are.
        is_half: whether a channel's partner is D / 2 channels on, turned(x) = (-x2, x1), and not its neighbour,
            turned(x) = (-x1, x0, -x3, x2, ...).

    Returns:
        q and k turned, in their dtype: computed in the dtype that it and the table's promote to, and rounded to it
        behind. Gradients flow to q, k and the table.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.
        IndexError, RuntimeError: a place that the table does not have; the kernels give NaN.

    """
    checks.rotate(q, k, table, home, prefix, is_half)
    if home is not None:
        table = rows(table, home[:, prefix:].long() - prefix)
    sin, cos = table.chunk(2, dim=-1)
    return _rotated(q, sin, cos, prefix, is_half), _rotated(k, sin, cos, prefix, is_half)


def homes(slot: Tensor, tokens: int, home: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """The original token in whose place each stands after one more merge: that of the group's first member.

    Padding stands nowhere: among others its place is not the first.

    Args:
        slot: int32 [B, N], onto [0, tokens).
        tokens: M, the number of tokens that remain.
        home: int64 [B, N], the same before the merge; None: each of the N in its own place.
        valid: bool [B, N], false for padding; None: there is none.

    Returns:
        int64 [B, M].

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.

    """
    checks.homes(slot, tokens, home, valid)
    batch, n = slot.shape
    order = torch.arange(n, device=slot.device).expand(batch, n)
    if valid is not None:
        order = torch.where(valid, order, order + n)
    first = order.new_full((batch, tokens), 2 * n - 1).scatter_reduce(1, slot.long(), order, "amin")
    first = torch.where(first < n, first, first - n)
    return first if home is None else home.gather(1, first)


def pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """The mask of merged tokens where each pair of original tokens has a bias: that of the places of the two.

    Args:
        bias: [H, N, N], floating point, any strides, for the original tokens.
        home: int64 [B, M], the original token in whose place each stands, as :func:`homes` gives it.
        key_bias: [B, M], floating point, added to the column of each key: log sizes. None: nothing is.

    Returns:
        [B, H, M, M] in the dtype of bias: the sum, rounded once. Rows start at multiples of eight elements, as
        kernels of attention want to read them. Gradients flow to bias.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.
        IndexError, RuntimeError: a place that the bias does not have; the kernels give NaN.

    """
    checks.pair_bias(bias, home, key_bias)
    tokens = home.shape[1]
    home = torch.where(home < 0, bias.shape[1], home)  # out of range, and not counted from the end
    columns = F.pad(home, (0, -tokens % 8))
    mask = bias[:, home[:, :, None], columns[:, None, :]]  # [H, B, M, M and a few]: copied once
    if key_bias is not None:
        mask = mask.add_(F.pad(key_bias, (0, -tokens % 8))[:, None])  # in place, which takes no wider copy
    return mask[..., :tokens].transpose(0, 1)


def rows(table: Tensor, index: Tensor) -> Tensor:
    """The rows of a table [P, E], [H, P, E] or [B or 1, H or 1, P, E] at places int64 [B, M]: [B, H or 1, M, E]."""
    places = table.shape[-2]
    index = torch.where(index < 0, places, index)  # out of range, and not counted from the end
    table = table[(None,) * (4 - table.dim())]
    if table.shape[0] == 1:
        return table[0][:, index].transpose(0, 1)
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    return table.transpose(1, 2)[batch, index].transpose(1, 2)


def _rotated(x: Tensor, sin: Tensor, cos: Tensor, prefix: int, is_half: bool) -> Tensor:
    tokens = x[:, :, prefix:]
    if is_half:
        first, second = tokens.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-tokens[..., 1::2], tokens[..., ::2]], dim=-1).reshape(tokens.shape)
    tokens = (tokens * cos + turned * sin).to(x.dtype)
    return tokens if prefix == 0 else torch.cat([x[:, :, :prefix], tokens], dim=2)
