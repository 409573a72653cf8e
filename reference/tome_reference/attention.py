"""Attention that counts a merged token as often as it stands for (arXiv 2210.09461, "Tracking Token Size")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks


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
        [B, H, Nq, D] in the dtype of q. Gradients flow to q, k and v.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or probability.

    """
    checks.attention(q, k, v, size, scale, dropout_p)
    if q.numel() == 0:
        return q.clone()  # on a GPU torch's own function fails on an empty batch
    bias = None if size is None else size_bias(size).to(q.dtype)
    q, k, v = aligned(q), aligned(k), aligned(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def aligned(x: Tensor) -> Tensor:
    """X, or a copy where it starts off a 16-byte boundary: on a GPU torch's own function fails on one such token."""
    if torch.compiler.is_compiling():  # which knows no offsets, and lays out its own tensors
        return x
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def size_bias(size: Tensor) -> Tensor:
    """Log sizes as an additive mask: [B, N] -> [B, 1, 1, N]."""
    return size.detach().log()[:, None, None, :]
