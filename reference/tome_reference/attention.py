"""Attention that counts a merged token as often as it stands for (arXiv 2210.09461, "Tracking Token Size")."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks

SCALES = (2.0**-14, 2.0**13)  # whose inverses, as powers of two, half precision holds


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Proportional attention: softmax(q k^T scale + log size) v.

    Args:
        q: [B, H, Nq, D], floating point, any strides.
        k: [B, H, N, D], the dtype of q.
        v: [B, H, N, D], the dtype of q.
        size: float32 [B, N], positive: how many original tokens each key stands for; None is plain attention.
        scale: the factor of the scores; None is D ** -0.5.
        dropout_p: the probability of dropping an attention weight, in [0, 1).

    Returns:
        [B, H, Nq, D] in the dtype of q. Gradients flow to q, k and v; sizes are counts and get none. A size counts as
        exactly as float32 has it, whatever the dtype of q.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or probability.

    """
    checks.attention(q, k, v, size, scale, dropout_p)
    if q.numel() == 0:
        return q.clone()  # on a GPU torch's own function fails on an empty batch
    if size is None or q.dtype not in (torch.float16, torch.bfloat16):
        bias = None if size is None else size_bias(size).to(q.dtype)
        q, k, v = aligned(q), aligned(k), aligned(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    if not SCALES[0] <= scale <= SCALES[1]:
        wide = (q.float(), k.float(), v.float())
        out = F.scaled_dot_product_attention(*wide, attn_mask=size_bias(size), dropout_p=dropout_p, scale=scale)
        return out.to(q.dtype)
    q, k = _counted(q, k, size, scale)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), dropout_p=dropout_p, scale=scale)[..., :width]


def _counted(q: Tensor, k: Tensor, size: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Q and k with eight channels more, whose products are log sizes by the scale.

    A mask of torch's own function has the dtype of q, in which a log size is off by up to 1.6 % of a weight. Its
    products are summed in float32: three numbers of the dtype for each key, times a power of two, are as exact.
    """
    unit = 2.0 ** math.ceil(-math.log2(scale))
    rest, parts = size.detach().log() / (scale * unit), []
    for _ in range(3):
        parts.append(rest.to(q.dtype))
        rest = torch.where(rest.isinf(), 0.0, rest - parts[-1].float())  # not inf - inf
    columns = F.pad(torch.stack(parts, dim=-1), (0, 5))[:, None].expand(-1, k.shape[1], -1, -1)
    units = F.pad(q.new_full((*q.shape[:-1], 3), unit), (0, 5))
    return torch.cat([q, units], dim=-1), torch.cat([k, columns], dim=-1)


def aligned(x: Tensor) -> Tensor:
    """X, or a copy where it starts off a 16-byte boundary: on a GPU torch's own function fails on one such token."""
    if torch.compiler.is_compiling():  # which knows no offsets, and lays out its own tensors
        return x
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def size_bias(size: Tensor) -> Tensor:
    """Log sizes as an additive mask: [B, N] -> [B, 1, 1, N]."""
    return size.detach().log()[:, None, None, :]
