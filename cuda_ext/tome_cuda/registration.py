"""The operators of the library: loading, launching, gradients."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .fakes import FAKES

NAMESPACE = "tome_cuda"
# From about this many elements on (64 MiB in half precision) a launch takes longer than allocating memory twice.
LARGE = 1 << 25
INDUCTOR_WRITES = torch.__version__ < "2.15"  # out the operators that it does not know
FAILED_CALL = "API call failed"  # what torch's stable interface says of any failure of torch, a lack of memory too
_registered: set[str] = set()  # the namespaces whose operators torch knows
_registering = threading.Lock()


def operators() -> Any:
    """The operators themselves, loaded and registered."""
    register()
    if torch.compiler.is_compiling() and INDUCTOR_WRITES:
        _make_fallbacks()
    return getattr(torch.ops, NAMESPACE)


def launch(name: str, *args: Any) -> Any:
    """Call an operator, in a way that a lack of memory is torch's own OutOfMemoryError.

    An operator that torch refuses memory can only say that a call of torch failed, and torch prints its stack of C++ on
    the way. So what is large is allocated here first, by torch's allocator, which keeps the memory for the operator.
    """
    if torch.compiler.is_compiling():
        return getattr(operators(), name)(*args)
    call = _overload(name)
    fake, elements = FAKES[name]
    count = elements(args)
    if count.__class__ is int and count >= LARGE:  # not a symbol of a trace
        fake(*args)
    try:
        return call(*args)
    except RuntimeError as error:
        if FAILED_CALL not in str(error):
            raise
    # What was small, or what the fake knows nothing of. If there is memory now, then it has become free in between.
    fake(*args)
    return call(*args)


@functools.cache
def _overload(name: str) -> Callable[..., Any]:
    overload: Callable[..., Any] = getattr(operators(), name).default
    return overload


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
    with _registering:  # first calls may come from several threads, and torch refuses a second fake
        if NAMESPACE not in _registered:
            for name, fake in FAKES.items():
                torch.library.register_fake(f"{NAMESPACE}::{name}", fake.make)
            for name, (backward, setup_context) in GRADIENTS.items():
                torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
            _registered.add(NAMESPACE)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _make_fallbacks() -> bool:
    """Tell inductor of the operators, as it tells itself when it meets one that it doesn't know.

    Before torch 2.15 it then also writes out, for a message that nobody reads, the arguments and all that led to them:
    minutes of work for an operator behind a dozen of blocks.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint  # takes seconds to import
    from torch._library.utils import get_layout_constraint_tag

    for name in FAKES:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        if overload not in lowerings:
            make_fallback(overload, tag_to_layout_constraint(get_layout_constraint_tag(overload)))
    return True


# A merge is linear in x, and so is each step back: the gradient of a gradient is the forward step again.


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, slot, _, size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(slot, size, output[1])


def _merge_grad(ctx: Any, grad: Tensor, _total_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    slot, size, total = ctx.saved_tensors
    return launch("merge_backward", grad, slot, size, total), None, None, None


def _merge_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, slot, size, _ = inputs
    ctx.tokens = grad.shape[1]
    ctx.save_for_backward(slot, size)


def _merge_grad_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slot, size = ctx.saved_tensors
    return launch("merge", grad, slot, ctx.tokens, size)[0], None, None, None


def _unmerge_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slot = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(slot)


def _unmerge_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (slot,) = ctx.saved_tensors
    return launch("unmerge_backward", grad, slot, ctx.tokens), None


def _unmerge_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slot, _ = inputs
    ctx.save_for_backward(slot)


def _unmerge_grad_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (slot,) = ctx.saved_tensors
    return launch("unmerge", grad, slot), None, None


def _rotate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, table, home, *ctx.numbers = inputs
    ctx.save_for_backward(table, home)


def _rotate_grad(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation is linear in q and k, and its transpose the rotation back."""
    table, home = ctx.saved_tensors
    prefix, is_half, is_back = ctx.numbers
    heads = (grad.transpose(1, 2) for grad in grads)
    q, k = (grad.transpose(1, 2) for grad in launch("rotate", *heads, table, home, prefix, is_half, not is_back))
    return q, k, None, None, None, None, None


def _linear_gelu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.is_tanh, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _linear_gelu_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What the GELU reads is computed once more: it was never written."""
    x, weight, bias = ctx.saved_tensors
    hidden = F.linear(x, weight, bias)
    inner = torch.ops.aten.gelu_backward(grad, hidden, approximate="tanh" if ctx.is_tanh else "none").flatten(0, 1)
    needs = ctx.needs_input_grad
    return (
        (inner @ weight).view(x.shape) if needs[0] else None,
        inner.T @ x.flatten(0, 1) if needs[1] else None,
        inner.sum(0) if needs[2] else None,
        None,
        None,
    )


def _merge_add_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, branch, slot, _, size, weight, bias, _, gamma, *_ = inputs
    merged, _, total, stats = output
    if branch is None:
        merged = x.contiguous()
    ctx.mark_non_differentiable(total, stats)
    ctx.set_materialize_grads(False)
    ctx.length, ctx.branch_dtype = x.shape[1], None if branch is None else branch.dtype
    ctx.skip = 0 if branch is None else x.shape[1] - branch.shape[1]
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, gamma)]
    factor = None if gamma is None or not ctx.needs_input_grad[8] else branch
    ctx.save_for_backward(merged, stats, slot, size, None if slot is None else total, weight, gamma, factor)


def _merge_add_norm_grad(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    merged, stats, *_, gamma, branch = saved
    grads: list[Tensor | None] = [None] * 11
    if needs[0] or needs[1] or needs[8]:
        dtype, has_branch = ctx.branch_dtype or merged.dtype, ctx.branch_dtype is not None
        ends = launch("merge_add_norm_backward", grad_x if has_branch else None, grad_y, *saved[:7], ctx.length, dtype)
        grads[0] = ends[0]
        if has_branch:
            grads[1] = (ends[0] if gamma is None and dtype == merged.dtype else ends[1])[:, ctx.skip :]
        if needs[8]:
            grads[8] = launch("column_sums", ends[0][:, ctx.skip :], branch, None)[1].to(ctx.dtypes[2])
    if grad_y is not None and (needs[5] or needs[6]):
        shift, scale = launch("column_sums", grad_y, merged, stats)
        grads[5] = scale.to(ctx.dtypes[0]) if needs[5] else None
        grads[6] = shift.to(ctx.dtypes[1]) if needs[6] else None
    return tuple(grads)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, size, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, size)


def _attention_grad(ctx: Any, grad: Tensor, _lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """All three at once. Of as many queries as keys they lie as a packed projection of q, k and v does."""
    q, k, v, out, lse, size = ctx.saved_tensors
    if grad.stride(3) != 1:  # of a sum, say: one number for all
        grad = grad.contiguous()
    grad_q, rest = launch(
        "attention_backward", grad.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, size, ctx.scale
    )
    heads = q.shape[1]
    if q.shape[2] == k.shape[2]:
        grads = split_packed(rest, heads)
    else:
        grads = (grad_q.unflatten(2, (heads, -1)).transpose(1, 2), *split_packed(rest, heads, 2))
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


def split_packed(packed: Tensor, heads: int, count: int = 3) -> tuple[Tensor, ...]:
    """What lies side by side in [B, N, count * H * D], each [B, H, N, D]."""
    parts: tuple[Tensor, ...] = packed.unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return parts


def _no_second_gradient(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{name} has no second derivative on the kernels; tome.use_backend('reference') has one"
        )

    return refuse


GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., None] | None]] = {
    "merge": (_merge_grad, _merge_context),
    "merge_backward": (_merge_grad_grad, _merge_backward_context),
    "unmerge": (_unmerge_grad, _unmerge_context),
    "unmerge_backward": (_unmerge_grad_grad, _unmerge_backward_context),
    "rotate": (_rotate_grad, _rotate_context),
    "linear_gelu": (_linear_gelu_grad, _linear_gelu_context),
    "merge_add_norm": (_merge_add_norm_grad, _merge_add_norm_context),
    "merge_add_norm_backward": (_no_second_gradient("merge_add_norm"), None),
    "column_sums": (_no_second_gradient("merge_add_norm"), None),
    "attention_training": (_attention_grad, _attention_context),
    "attention_backward": (_no_second_gradient("attention"), None),
}
