"""What torch computes where the kernels don't, so that every model runs under an explicit "cuda".

Attention in float32, with dropout, of rare head dimensions and keys with gaps; with gradients or under torch.compile
what is for inference. ``tome_reference`` has the same functions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (2.0**-14, 2.0**13)  # whose inverses, as powers of two, half precision holds


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    """What ``tome_reference.attention`` says, as it says it."""
    if size is None or q.dtype not in (torch.float16, torch.bfloat16):
        bias = None if size is None else _bias(size, q.dtype)
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    if not SCALES[0] <= scale <= SCALES[1]:
        wide = (q.float(), k.float(), v.float())
        bias = _bias(size, torch.float32)
        out = F.scaled_dot_product_attention(*wide, attn_mask=bias, dropout_p=dropout_p, scale=scale)
        return out.to(q.dtype)
    q, k = _counted(q, k, size, scale)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), dropout_p=dropout_p, scale=scale)[..., :width]


def pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None) -> Tensor:
    """What ``tome_reference.pair_bias`` says."""
    tokens = home.shape[1]
    home = torch.where(home < 0, bias.shape[1], home)
    mask = bias[:, home[:, :, None], F.pad(home, (0, -tokens % 8))[:, None, :]]
    if key_bias is not None:
        mask = mask.add_(F.pad(key_bias, (0, -tokens % 8))[:, None])
    return mask[..., :tokens].transpose(0, 1)


def swiglu_norm(gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """What ``tome_reference.swiglu_norm`` says."""
    hidden = (F.silu(gate) * x)[..., :width]
    weight, bias = (None if p is None else p.to(hidden.dtype) for p in (weight, bias))
    return F.pad(F.layer_norm(hidden, (width,), weight, bias, eps).to(hidden.dtype), (0, gate.shape[-1] - width))


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


def _bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Log sizes as an additive mask: [B, N] -> [B, 1, 1, N]."""
    return size.detach().log()[:, None, None, :].to(dtype)


def _aligned(x: Tensor) -> Tensor:
    """X, or a copy where it starts off a 16-byte boundary: torch's own function fails on one such token."""
    if torch.compiler.is_compiling():  # which knows no offsets, and lays out its own tensors
        return x
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x
