"""The operations of token merging, each run by the backend in force (:mod:`tome.backend`).

Shapes: B batch, N tokens in, M tokens out, H heads, D head dim, C channels. The definition of each operation is
its namesake in ``tome_reference``, with whose signature and documentation it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

import tome_reference
from tome.backend import extension, implementation
from tome.recording import is_recording, record
from tome_reference import checks

__all__ = [
    "attend_half",
    "attention",
    "follow",
    "homes",
    "kth_match",
    "linear_gelu",
    "match",
    "max_r",
    "merge",
    "merge_add_norm",
    "mlp_half",
    "one_call",
    "pair_bias",
    "quick_gelu",
    "random_match",
    "restore",
    "rotate",
    "set_match",
    "swiglu",
    "swiglu_norm",
    "take",
    "unmerge",
]

P = ParamSpec("P")
T = TypeVar("T")


def _operation(definition: Callable[P, T], checks_first: bool = True) -> Callable[P, T]:
    """What ``definition`` says, by the backend in force.

    Args:
        definition: of the reference, which checks its arguments.
        checks_first: whether its check comes before the kernels too. Without it they refuse by themselves whatever the
            check refuses, which takes less of the host's time, and the check is left to say what was wrong.

    """
    name = definition.__name__
    check: Callable[P, None] = getattr(checks, name)

    @functools.wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            kernels = implementation(name, *args, **kwargs)
        except Exception:
            check(*args, **kwargs)
            raise
        if kernels is tome_reference:
            return definition(*args, **kwargs)
        kernel: Callable[P, T] = getattr(kernels, name)
        if checks_first or torch.compiler.is_compiling():
            check(*args, **kwargs)
            return kernel(*args, **kwargs)
        try:
            return kernel(*args, **kwargs)
        except Exception:
            check(*args, **kwargs)
            raise

    run.__module__ = __name__  # where pickle finds it
    return run


def one_call(half: str, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """What computes a half of a block in one call, for :func:`take`; None where its parts have to be called; recorded.

    Args:
        half: "attend_half" or "mlp_half".
        *args: its arguments.
        **kwargs: likewise.

    """
    kernels, reason = extension(args[0])
    if kernels is not None:
        reason = kernels.PREDICATES[half](*args, **kwargs)  # why_not, in less of the host's time
    if kernels is None or reason is not None:
        record(half, None, reason)
        return None
    if is_recording():
        record(half, "cuda", " ".join(filter(None, ("one call", kernels.remark(half, *args, **kwargs)))))
    call: Callable[..., Any] = getattr(kernels, half)
    return call


def take(call: Callable[..., T], *args: object) -> T:
    """Do what :func:`one_call` gave, with the arguments that it was asked about, or their like."""
    if torch.compiler.is_compiling():
        return call(*args)
    try:
        return call(*args)
    except Exception:
        getattr(checks, call.__name__)(*args)
        raise


max_r = tome_reference.max_r
match = _operation(tome_reference.match)
kth_match = _operation(tome_reference.kth_match)
random_match = _operation(tome_reference.random_match)
set_match = _operation(tome_reference.set_match)
merge = _operation(tome_reference.merge, checks_first=False)
unmerge = _operation(tome_reference.unmerge)
follow = _operation(tome_reference.follow)
restore = _operation(tome_reference.restore)
rotate = _operation(tome_reference.rotate)
homes = _operation(tome_reference.homes)
pair_bias = _operation(tome_reference.pair_bias)
quick_gelu = _operation(tome_reference.quick_gelu)
swiglu = _operation(tome_reference.swiglu)
swiglu_norm = _operation(tome_reference.swiglu_norm)
linear_gelu = _operation(tome_reference.linear_gelu)
attention = _operation(tome_reference.attention)
merge_add_norm = _operation(tome_reference.merge_add_norm, checks_first=False)
attend_half = _operation(tome_reference.attend_half, checks_first=False)
mlp_half = _operation(tome_reference.mlp_half, checks_first=False)
