"""The two halves of a transformer block with a merge between them (arXiv 2210.09461, section 3 and figure 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import activation, checks
from tome_reference.attention import attention
from tome_reference.checks import Linear, Norm
from tome_reference.matching import match
from tome_reference.norm import merge_add_norm


def attend_half(
    x: Tensor,
    qkv: Sequence[Tensor],
    heads: int,
    size: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    prefix: int,
    is_weighted: bool,
    scale: float | None,
    qkv_linear: Linear | None,
    proj: Linear,
    gamma: Tensor | None,
    norm: Norm,
    norm_dtype: torch.dtype | None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """From queries, keys and values to the normalised input of the MLP: match, attend, project, add, merge, norm.

    Args:
        x: [B, N, C], the residual stream.
        qkv: (q, k, v), each [B, H, N, D]; or (packed,), [B, N, 3 * H * D] as a fused projection gives it (3, H, D);
            or with ``qkv_linear`` (y,), the normalised tokens [B, N, C'] that it projects to ``packed``.
        heads: H.
        size: float32 [B, N] or None for one each.
        slot: int32 [B, N], onto [0, tokens); None where :func:`match` of the keys makes it, or nothing merges.
        tokens: M, the number of tokens that remain: N, or without ``slot`` at least N - (N - prefix) // 2.
        prefix: how many leading tokens matching leaves untouched.
        is_weighted: whether attention weighs keys by ``size``.
        scale: the factor of the scores; None is D ** -0.5.
        qkv_linear: the projection to q, k and v, (weight, bias or None), where they are still to be made.
        proj: the projection behind attention, (weight [C, H * D], bias or None).
        gamma: [C], LayerScale's factor, or None for 1.
        norm: the LayerNorm behind the addition, (weight or None, bias or None, eps).
        norm_dtype: the dtype of y; None for that of x.
        drop: [B], floating point, what each image's branch is multiplied by (stochastic depth); None for 1.

    Returns:
        x [B, M, C] and y [B, M, C], its norm in ``norm_dtype``; size float32 [B, M] and the slot map of the merge, or,
        where nothing is merged, size as it is and None. Gradients flow to x, qkv and all parameters; the kernels have
        no second ones.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or eps.

    """
    checks.attend_half(
        *(
            x,
            qkv,
            heads,
            size,
            slot,
            tokens,
            prefix,
            is_weighted,
            scale,
            qkv_linear,
            proj,
            gamma,
            norm,
            norm_dtype,
            drop,
        )
    )
    q, k, v = split(qkv, heads, qkv_linear)
    if slot is None and tokens < x.shape[1]:
        slot = match(k, x.shape[1] - tokens, prefix)
    seen = attention(q, k, v, size if is_weighted else None, scale)
    branch = dropped(F.linear(seen.transpose(1, 2).flatten(2), *proj), drop)
    x, y, size = merge_add_norm(x, branch, slot, tokens, size, *norm, gamma, norm_dtype)
    return x, y, size, slot


def mlp_half(
    x: Tensor,
    y: Tensor,
    fc1: Linear,
    gelu: str,
    fc2: Linear,
    gamma: Tensor | None,
    norm: Norm,
    norm_dtype: torch.dtype | None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the normalised input of the MLP to that of the next block's attention: two linear layers, add, norm.

    Args:
        x: [B, N, C], the residual stream.
        y: [B, N, C'], what the MLP reads.
        fc1: the first linear layer, (weight [hidden, C'], bias or None).
        gelu: the GELU between the two: "erf", "tanh" (its approximation) or "quick" (:func:`quick_gelu`).
        fc2: the second, (weight [C, hidden], bias or None).
        gamma: [C], LayerScale's factor, or None for 1.
        norm: the LayerNorm behind the addition, (weight or None, bias or None, eps).
        norm_dtype: the dtype of the norm; None for that of x.
        drop: [B], floating point, what each image's branch is multiplied by (stochastic depth); None for 1.

    Returns:
        x [B, N, C] and its norm [B, N, C] in ``norm_dtype``. Gradients flow to x, y and all parameters; the
        kernels have no second ones.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or eps.

    """
    checks.mlp_half(x, y, fc1, gelu, fc2, gamma, norm, norm_dtype, drop)
    hidden = activation.hidden_layer(y, fc1, gelu)
    x, y, _ = merge_add_norm(x, dropped(F.linear(hidden, *fc2), drop), None, x.shape[1], None, *norm, gamma, norm_dtype)
    return x, y


def dropped(branch: Tensor, drop: Tensor | None) -> Tensor:
    """A branch [B, N, C] times what each image has of it."""
    return branch if drop is None else branch * drop[:, None, None].to(branch.dtype)


def split(qkv: Sequence[Tensor], heads: int, linear: Linear | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three forms of queries, keys and values as views [B, H, N, D]."""
    if len(qkv) == 3:
        return qkv[0], qkv[1], qkv[2]
    packed = qkv[0] if linear is None else F.linear(qkv[0], *linear)
    q, k, v = packed.unflatten(2, (3, heads, packed.shape[2] // (3 * heads))).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
