"""The operators of the library, and what torch needs to know of them: fakes and gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tome_cuda import library


def operators() -> Any:
    """The operators themselves, loaded and registered."""
    register()
    return torch.ops.tome_cuda


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def register() -> bool:
    """Load the library and tell torch the fakes and gradients of its operators, once.

    Raises:
        LibraryError: there is no library, or it can't be loaded.

    """
    return _register()


@functools.cache
def _register() -> bool:
    library.info()
    torch.library.register_fake("tome_cuda::bipartite_match", _match_fake)
    torch.library.register_fake("tome_cuda::kth_match", _match_fake)
    torch.library.register_fake("tome_cuda::listed_match", _match_fake)
    torch.library.register_fake("tome_cuda::merge", _merge_fake)
    torch.library.register_fake("tome_cuda::merge_backward", _merge_backward_fake)
    torch.library.register_fake("tome_cuda::unmerge", _unmerge_fake)
    torch.library.register_fake("tome_cuda::unmerge_backward", _unmerge_backward_fake)
    torch.library.register_fake("tome_cuda::merge_add_norm", _merge_add_norm_fake)
    torch.library.register_fake("tome_cuda::attention", _attention_fake)
    torch.library.register_fake("tome_cuda::block", _block_fake)
    torch.library.register_fake("tome_cuda::merge_add_norm_backward", _merge_add_norm_backward_fake)
    torch.library.register_fake("tome_cuda::column_sums", _column_sums_fake)
    register_autograd = torch.library.register_autograd
    register_autograd("tome_cuda::merge", _merge_grad, setup_context=_merge_context)
    register_autograd("tome_cuda::merge_backward", _merge_grad_grad, setup_context=_merge_backward_context)
    register_autograd("tome_cuda::unmerge", _unmerge_grad, setup_context=_unmerge_context)
    register_autograd("tome_cuda::unmerge_backward", _unmerge_grad_grad, setup_context=_unmerge_backward_context)
    register_autograd("tome_cuda::merge_add_norm", _merge_add_norm_grad, setup_context=_merge_add_norm_context)
    register_autograd("tome_cuda::merge_add_norm_backward", _no_second_gradient)
    register_autograd("tome_cuda::column_sums", _no_second_gradient)
    return True


def _match_fake(keys: Tensor, *_: Any) -> Tensor:
    return keys.new_empty((keys.shape[0], keys.shape[-2]), dtype=torch.int32)


def _merge_fake(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    merged = x.new_empty((x.shape[0], tokens, x.shape[2]))
    return merged, x.new_empty((x.shape[0], tokens), dtype=torch.float32)


def _merge_backward_fake(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], slot.shape[1], grad.shape[2]))


def _unmerge_fake(x: Tensor, slot: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], slot.shape[1], x.shape[2]))


def _unmerge_backward_fake(grad: Tensor, slot: Tensor, tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], tokens, grad.shape[2]))


def _merge_add_norm_fake(
    x: Tensor,
    branch: Tensor,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    norm_dtype: torch.dtype,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], tokens, x.shape[2])
    total = x.new_empty((0 if slot is None else x.shape[0], tokens), dtype=torch.float32)
    stats = x.new_empty((x.shape[0] if training else 0, tokens, 2), dtype=torch.float32)
    return x.new_empty(shape), x.new_empty(shape, dtype=norm_dtype), total, stats


def _merge_add_norm_backward_fake(
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    merged: Tensor,
    stats: Tensor,
    slot: Tensor | None,
    size: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    length: int,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = merged.shape
    is_same = gamma is None and branch_dtype == merged.dtype
    branch = merged.new_empty((0 if is_same else batch, length, channels), dtype=branch_dtype)
    return merged.new_empty((batch, length, channels)), branch


def _column_sums_fake(a: Tensor, b: Tensor, stats: Tensor | None) -> Tensor:
    batch, rows, channels = a.shape
    slabs = max(1, min(-(-batch * rows // 64), max(1, 768 // (channels // 256 + 1))))  # norm.h's slabs()
    return a.new_empty((slabs, 2, channels), dtype=torch.float32)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim))


def _block_fake(x: Tensor, normed: Tensor, size: Tensor | None, r: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] - r, x.shape[2])
    total = x.new_empty((shape[0] if r > 0 else 0, shape[1]), dtype=torch.float32)
    return x.new_empty(shape), x.new_empty(shape, dtype=others[-1]), total


# A merge is linear in x, and so is each step back: the gradient of a gradient is the forward step again.


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, slot, _, size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(slot, size, output[1])


def _merge_grad(ctx: Any, grad: Tensor, _total_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    slot, size, total = ctx.saved_tensors
    return torch.ops.tome_cuda.merge_backward(grad, slot, size, total), None, None, None


def _merge_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, slot, size, _ = inputs
    ctx.tokens = grad.shape[1]
    ctx.save_for_backward(slot, size)


def _merge_grad_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slot, size = ctx.saved_tensors
    return torch.ops.tome_cuda.merge(grad, slot, ctx.tokens, size)[0], None, None, None


def _unmerge_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slot = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(slot)


def _unmerge_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (slot,) = ctx.saved_tensors
    return torch.ops.tome_cuda.unmerge_backward(grad, slot, ctx.tokens), None


def _unmerge_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slot, _ = inputs
    ctx.save_for_backward(slot)


def _unmerge_grad_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (slot,) = ctx.saved_tensors
    return torch.ops.tome_cuda.unmerge(grad, slot), None, None


def _merge_add_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, branch, slot, _, size, weight, bias, _, gamma, *_ = inputs
    merged, _, total, stats = output
    ctx.mark_non_differentiable(total, stats)
    ctx.set_materialize_grads(False)
    ctx.length, ctx.branch_dtype = branch.shape[1], branch.dtype
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, gamma)]
    factor = None if gamma is None or not ctx.needs_input_grad[8] else branch
    ctx.save_for_backward(merged, stats, slot, size, None if slot is None else total, weight, gamma, factor)


def _merge_add_norm_grad(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    merged, stats, slot, size, total, weight, gamma, factor = ctx.saved_tensors
    needs = ctx.needs_input_grad
    ops = torch.ops.tome_cuda
    grads: list[Tensor | None] = [None] * 11
    if needs[0] or needs[1] or needs[8]:
        grads[:2] = ops.merge_add_norm_backward(
            *(grad_x, grad_y, merged, stats, slot, size, total, weight, gamma, ctx.length, ctx.branch_dtype)
        )
        if gamma is None and ctx.branch_dtype == merged.dtype:
            grads[1] = grads[0]
    # Sums of rows: first in slabs, then over these, both in a fixed order.
    if needs[8]:
        grads[8] = ops.column_sums(grads[0], factor, None)[:, 1].sum(0).to(ctx.dtypes[2])
    if grad_y is not None and (needs[5] or needs[6]):
        shift, scale = ops.column_sums(grad_y, merged, stats).sum(0)
        grads[5] = scale.to(ctx.dtypes[0]) if needs[5] else None
        grads[6] = shift.to(ctx.dtypes[1]) if needs[6] else None
    return tuple(grads)


def _no_second_gradient(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "merge_add_norm has no second derivative on the kernels; tome.use_backend('reference') has one"
    )
