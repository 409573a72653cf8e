"""The halves of a block with gradients: one node of autograd each, of whose parts the host asks for one by one.

Autograd would keep a node for each part, and what they cost the host is more than what a GPU computes in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tome_cuda.predicates import Linear, Norm, linear_dtype
from tome_cuda.registration import NormGrads, attention_grads, launch

APPROXIMATE = {"erf": "none", "tanh": "tanh"}
Grads = tuple[Tensor | None, ...]


class Numbers(NamedTuple):
    """What attend_half is told beside tensors."""

    heads: int
    tokens: int
    prefix: int
    is_weighted: bool
    scale: float
    eps: float
    norm_dtype: torch.dtype


def attend_half(
    x: Tensor, qkv: Sequence[Tensor], size: Tensor | None, slot: Tensor | None, qkv_linear: Linear | None, proj: Linear,
    gamma: Tensor | None, norm: Norm, drop: Tensor | None, numbers: Numbers,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As ``tome_cuda.attend_half``."""
    q, k, v = qkv if len(qkv) == 3 else (qkv[0], None, None)
    weight, bias = (None, None) if qkv_linear is None else qkv_linear
    merged, y, total, made = _AttendHalf.apply(
        x, q, k, v, weight, bias, *proj, gamma, *norm[:2], size, slot, drop, numbers
    )
    return merged, y, size if made is None else total, made


def mlp_half(
    x: Tensor, y: Tensor, fc1: Linear, gelu: str, fc2: Linear, gamma: Tensor | None, norm: Norm, drop: Tensor | None,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``tome_cuda.mlp_half``."""
    return _MlpHalf.apply(  # type: ignore[no-any-return]
        x, y, *fc1, *fc2, gamma, *norm[:2], drop, gelu, norm[2], norm_dtype
    )


class _AttendHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        proj_weight: Tensor, proj_bias: Tensor | None, gamma: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, size: Tensor | None, slot: Tensor | None, drop: Tensor | None, numbers: Numbers,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            dtype = linear_dtype(q)
            given: Sequence[Tensor] = (q,) if k is None or v is None else (q, k, v)
            made_by = None if weight is None else weight.to(dtype)
            if made_by is not None:
                given = (F.linear(q.to(dtype), made_by, None if bias is None else bias.to(dtype)),)
            heads = _heads(given, numbers.heads)
            weights = size if numbers.is_weighted else None
            seen, lse = launch("attention_training", *heads, weights, numbers.scale)
            length = x.shape[1]
            if slot is None and numbers.tokens < length:
                slot = launch("bipartite_match", heads[1], length - numbers.tokens, numbers.prefix)
            cast = proj_weight.to(dtype)
            branch = _dropped(F.linear(seen.flatten(2), cast, None if proj_bias is None else proj_bias.to(dtype)), drop)
            merged, out, total, stats = launch(
                "merge_add_norm", x, branch, slot, numbers.tokens, size, norm_weight, norm_bias, numbers.eps, gamma,
                numbers.norm_dtype, True,
            )  # fmt: skip
        ctx.numbers, ctx.length, ctx.dtype, ctx.is_three = numbers, length, dtype, len(given) == 3
        ctx.parameters = weight, bias, proj_weight, proj_bias, gamma, norm_weight, norm_bias
        ctx.set_materialize_grads(False)
        total = None if slot is None else total
        ctx.mark_non_differentiable(*(t for t in (total, slot) if t is not None))
        kept = branch if gamma is not None and ctx.needs_input_grad[8] else None
        y = None if made_by is None else q
        ctx.save_for_backward(
            *(merged, stats, slot, size, total, norm_weight, gamma, kept, y, made_by, cast, seen, lse, drop), *given
        )
        return merged, out, total, slot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> Grads:
        numbers, needs = ctx.numbers, ctx.needs_input_grad
        tensors = ctx.saved_tensors  # once: a checkpoint gives them out once
        *norm, y, made_by, cast, seen, lse, drop = tensors[:14]
        given, saved = tensors[14:], NormGrads(*norm)
        weight, bias, proj_weight, proj_bias, gamma, norm_weight, norm_bias = ctx.parameters
        grads: list[Tensor | None] = [None] * 15
        if grad_x is None and grad_y is None:
            return tuple(grads)
        into, branch = saved.of_inputs(grad_x, grad_y, ctx.length, ctx.dtype)
        grads[0] = into
        grads[8], grads[9], grads[10] = _norm_grads(saved, into, grad_y, gamma, norm_weight, norm_bias, needs[8:11])
        branch = _dropped(branch, drop)
        into, grads[6], grads[7] = _linear_grads(branch, seen.flatten(2), cast, proj_weight, proj_bias, needs[6:8])
        batch, count = into.shape[:2]
        into = into.view(batch, count, numbers.heads, -1).transpose(1, 2)
        size = saved.size if numbers.is_weighted else None
        *three, packed = attention_grads(
            into, _heads(given, numbers.heads), seen.transpose(1, 2), lse, size, numbers.scale
        )
        if ctx.is_three:
            grads[1:4] = three
        elif weight is not None:
            grads[1], grads[4], grads[5] = _linear_grads(packed, y, made_by, weight, bias, needs[4:6])
        else:
            grads[1] = packed
        return tuple(grads)


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor,
        fc2_bias: Tensor | None, gamma: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
        drop: Tensor | None, gelu: str, eps: float, norm_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            dtype = linear_dtype(y)
            first, second = fc1_weight.to(dtype), fc2_weight.to(dtype)
            hidden = F.linear(y.to(dtype), first, None if fc1_bias is None else fc1_bias.to(dtype))
            active = _gelu(hidden, gelu)
            branch = _dropped(F.linear(active, second, None if fc2_bias is None else fc2_bias.to(dtype)), drop)
            merged, out, _, stats = launch(
                "merge_add_norm", x, branch, None, x.shape[1], None, norm_weight, norm_bias, eps, gamma, norm_dtype,
                True,
            )  # fmt: skip
        ctx.gelu, ctx.dtype = gelu, dtype
        ctx.parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, norm_weight, norm_bias
        ctx.set_materialize_grads(False)
        kept = branch if gamma is not None and ctx.needs_input_grad[6] else None
        ctx.save_for_backward(
            merged, stats, None, None, None, norm_weight, gamma, kept, y, hidden, active, first, second, drop
        )
        return merged, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None) -> Grads:
        *norm, y, hidden, active, first, second, drop = ctx.saved_tensors
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, norm_weight, norm_bias = ctx.parameters
        needs, saved = ctx.needs_input_grad, NormGrads(*norm)
        grads: list[Tensor | None] = [None] * 13
        if grad_x is None and grad_y is None:
            return tuple(grads)
        into, branch = saved.of_inputs(grad_x, grad_y, hidden.shape[1], ctx.dtype)
        grads[0] = into
        grads[6], grads[7], grads[8] = _norm_grads(saved, into, grad_y, gamma, norm_weight, norm_bias, needs[6:9])
        branch = _dropped(branch, drop)
        into, grads[4], grads[5] = _linear_grads(branch, active, second, fc2_weight, fc2_bias, needs[4:6])
        into = _gelu_grad(into, hidden, ctx.gelu)
        grads[1], grads[2], grads[3] = _linear_grads(into, y, first, fc1_weight, fc1_bias, needs[2:4])
        return tuple(grads)


def _heads(given: Sequence[Tensor], heads: int) -> Sequence[Tensor]:
    """Q, k and v [B, H, N, D] as they are, or slices of one tensor [B, N, 3 * H * D]."""
    if len(given) == 3:
        return given
    q, k, v = given[0].unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _dropped(branch: Tensor, drop: Tensor | None) -> Tensor:
    """A branch times what each image has of it."""
    return branch if drop is None else branch * drop[:, None, None].to(branch.dtype)


def _gelu(hidden: Tensor, kind: str) -> Tensor:
    if kind == "quick":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate=APPROXIMATE[kind])


def _gelu_grad(grad: Tensor, hidden: Tensor, kind: str) -> Tensor:
    if kind == "quick":
        share = torch.sigmoid(1.702 * hidden)
        return grad * (share + 1.702 * hidden * share * (1 - share))
    return torch.ops.aten.gelu_backward(grad, hidden, approximate=APPROXIMATE[kind])  # type: ignore[no-any-return]


def _linear_grads(
    grad: Tensor, x: Tensor, cast: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of a linear layer: of its input, its weight, which was computed with as ``cast``, and its bias."""
    rows = grad.flatten(0, 1)
    of_weight = rows.t().mm(x.flatten(0, 1).to(cast.dtype)).to(weight.dtype) if needs[0] else None
    of_bias = rows.sum(0, dtype=torch.float32).to(bias.dtype) if bias is not None and needs[1] else None
    return grad.matmul(cast), of_weight, of_bias


def _norm_grads(
    saved: NormGrads, grad: Tensor, grad_y: Tensor | None, gamma: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, needs: Sequence[bool],
) -> Grads:  # fmt: skip
    """Of gamma, and of the norm's weight and bias; ``grad`` is that of x."""
    of_gamma = saved.of_gamma(grad, gamma.dtype) if gamma is not None and needs[0] else None
    if grad_y is None or not (needs[1] or needs[2]):
        return of_gamma, None, None
    scale, shift = saved.of_norm(grad_y)
    of_weight = scale.to(weight.dtype) if weight is not None and needs[1] else None
    return of_gamma, of_weight, shift.to(bias.dtype) if bias is not None and needs[2] else None
