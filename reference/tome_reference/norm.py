"""The step between attention and MLP: residual add, merge, LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks
from tome_reference.merging import add, merge


def merge_add_norm(
    x: Tensor,
    branch: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """X := merge(x + gamma * branch); y = layer_norm(x). Without a branch the norm alone.

    Args:
        x: [B, N, C], the residual stream.
        branch: [B, N, C], the dtype of x, or any where x is float32 (autocast), or [B, n, C] with n < N, added to the
            last n tokens; None adds nothing, and then x is returned as it is, and ``slot`` and ``gamma`` must be None.
        slot: int32 [B, N], onto [0, tokens); None merges nothing, and ``tokens`` is then N.
        tokens: M, the number of tokens that remain.
        size: float32 [B, N] or None for one each; returned as it is where nothing is merged.
        weight: [C], the LayerNorm's scale, or None for 1.
        bias: [C], the LayerNorm's shift, or None for 0.
        eps: added to the variance.
        gamma: [C], LayerScale's factor, or None for 1.
        norm_dtype: the dtype of y, such as that of the linear layer behind it under autocast; None for that of x.

    Returns:
        x [B, M, C] in the dtype of x, y [B, M, C] in ``norm_dtype``, size float32 [B, M]. Gradients flow to x, branch,
        weight, bias and gamma.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or eps.

    """
    checks.merge_add_norm(x, branch, slot, tokens, size, weight, bias, eps, gamma, norm_dtype)
    x = add(x, branch, gamma)
    if slot is not None:
        x, size = merge(x, slot, tokens, size)
    norm_dtype = x.dtype if norm_dtype is None else norm_dtype
    dtypes = {norm_dtype, *(p.dtype for p in (weight, bias) if p is not None)}
    wide = x if dtypes == {x.dtype} else x.to(torch.promote_types(x.dtype, torch.float32))
    y = F.layer_norm(wide, (x.shape[2],), _to(weight, wide), _to(bias, wide), eps)
    return x, y.to(norm_dtype), size


def _to(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)
