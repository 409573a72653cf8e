"""The halves of a block with gradients: an operator each way, and one node of autograd.

The nodes cost the host least; under torch.compile there are none, and what the operators have registered is traced: the
same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import registration
from .registration import launch, split_packed

Grads = tuple[Tensor | None, ...]
# A half's parameters are its first layer's weight and bias, its second's, gamma, and the norm's weight and bias. The
# gradients of vectors come one behind the other:
VECTORS = (6, 5, 4, 3, 1)


def attend_half(*args: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of the arguments of the operator: x merged, its norm, and sizes and slot map where they are new."""
    return _run("attend_half", args)[:4]  # type: ignore[return-value]


def mlp_half(*args: Any) -> tuple[Tensor, Tensor]:
    """Of the arguments of the operator: x and its norm."""
    return _run("mlp_half", args)[:2]  # type: ignore[return-value]


def _run(name: str, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    if torch.compiler.is_compiling():
        return launch(f"{name}_training", *args)  # type: ignore[no-any-return]
    return NODES[name].apply(*args)  # type: ignore[no-any-return]


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    x, q, k, v, weight, _, proj_weight, _, gamma, norm_weight, _, size, slot, drop, *numbers, _ = inputs
    merged, _, total, made, stats, packed, seen, lse, cast, branch = output
    ctx.heads, _, _, ctx.is_weighted, ctx.scale, _, _, dtype = numbers
    ctx.length = x.shape[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in output[2:] if t is not None))
    y = None if packed is None else q
    ctx.save_for_backward(
        *(merged, stats, slot if made is None else made, size, total, norm_weight, gamma, branch, drop, cast),
        *(_uncast(weight, dtype), _uncast(proj_weight, dtype), y, q if packed is None else packed, k, v, seen, lse),
    )


def _attend_grad(ctx: Any, saved: Sequence[Any], grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> Grads:
    needs = ctx.needs_input_grad
    if grad_x is None and grad_y is None:
        return (None,) * len(needs)
    merged, q, k = saved[0], saved[13], saved[14]
    wanted = _wanted(needs[4:11], grad_y)
    x, into, weight, proj_weight, vectors = launch(
        "attend_half_backward", grad_x, grad_y, *saved, ctx.heads, ctx.length, ctx.is_weighted, ctx.scale, _bits(wanted)
    )
    three: Sequence[Tensor | None] = (into, None, None)
    if k is not None:
        three = split_packed(into, q.shape[1])
    channels, width = merged.shape[2], q.shape[2] if k is None else 0
    parameters = _distributed(wanted, weight, proj_weight, vectors, width, channels)
    return x, *three, *parameters, *(None,) * (len(needs) - 11)


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    _, y, fc1_weight, _, fc2_weight, _, gamma, norm_weight, _, drop, ctx.gelu, _, _, dtype, _ = inputs
    merged, _, stats, hidden, active, cast, branch = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in output[2:] if t is not None))
    ctx.save_for_backward(
        *(merged, stats, norm_weight, gamma, branch, drop, cast),
        *(_uncast(fc1_weight, dtype), _uncast(fc2_weight, dtype), y, hidden, active),
    )


def _mlp_grad(ctx: Any, saved: Sequence[Any], grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> Grads:
    needs = ctx.needs_input_grad
    if grad_x is None and grad_y is None:
        return (None,) * len(needs)
    wanted = _wanted(needs[2:9], grad_y)
    x, y, fc1_weight, fc2_weight, vectors = launch("mlp_half_backward", grad_x, grad_y, *saved, ctx.gelu, _bits(wanted))
    parameters = _distributed(wanted, fc1_weight, fc2_weight, vectors, saved[10].shape[2], saved[0].shape[2])
    return x, y, *parameters, *(None,) * (len(needs) - 9)


def _uncast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight that the way back reads itself, and not as it was cast."""
    return weight if weight is not None and weight.dtype is dtype else None


def _wanted(needs: Sequence[bool], grad_y: Tensor | None) -> Sequence[bool]:
    """Of which of the seven parameters there is a gradient."""
    return needs if grad_y is not None else (*needs[:5], False, False)


def _bits(wanted: Sequence[bool]) -> int:
    return sum(1 << i for i in range(7) if wanted[i])


def _distributed(
    wanted: Sequence[bool], first: Tensor | None, second: Tensor | None, vectors: Tensor | None, width: int,
    channels: int,
) -> Grads:  # fmt: skip
    """The gradients of the seven parameters."""
    grads: list[Tensor | None] = [first, None, second, None, None, None, None]
    if vectors is not None:
        places = [i for i in VECTORS if wanted[i]]
        for i, grad in zip(places, vectors.split([width if i == 1 else channels for i in places]), strict=True):
            grads[i] = grad
    return tuple(grads)


def _node(
    name: str, outputs: int, setup_context: Callable[..., None], backward: Callable[..., Grads]
) -> type[torch.autograd.Function]:
    """The node of a half, of whose operator's results so many are a caller's; the operator is told of the same."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            made = launch(f"{name}_training", *args)
        setup_context(ctx, args, made)
        return made[:outputs]  # type: ignore[no-any-return]

    @once_differentiable
    def back(ctx: Any, *grads: Tensor | None) -> Grads:
        saved = ctx.saved_tensors  # once, and with autograd: a checkpoint computes them again, and gives them out once
        with torch._C._AutoDispatchBelowAutograd():
            return backward(ctx, saved, *grads)

    def traced(ctx: Any, *grads: Tensor | None) -> Grads:
        return backward(ctx, ctx.saved_tensors, *grads)

    registration.GRADIENTS[f"{name}_training"] = traced, setup_context
    registration.GRADIENTS[f"{name}_backward"] = registration._no_second_gradient(name), None
    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(back)})


NODES = {
    "attend_half": _node("attend_half", 4, _attend_context, _attend_grad),
    "mlp_half": _node("mlp_half", 2, _mlp_context, _mlp_grad),
}
