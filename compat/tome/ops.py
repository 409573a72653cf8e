"""The operations of token merging, each run by the backend in force (:mod:`tome.backend`).

Shapes: B batch, N tokens in, M tokens out, H heads, D head dim, C channels. The definition of each operation is
its namesake in ``tome_reference``, with whose signature and documentation it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

import tome_reference
from tome.backend import extension, implementation
from tome.recording import record
from tome_reference import checks

__all__ = [
    "attend_half",
    "attention",
    "follow",
    "in_one_call",
    "kth_match",
    "match",
    "max_r",
    "merge",
    "merge_add_norm",
    "mlp_half",
    "random_match",
    "restore",
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


def in_one_call(half: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """A half of a block as one call of the kernels, or None where its parts have to be called one by one.

    The reason for that is recorded, unless nothing runs on the kernels here anyway.

    Args:
        half: :func:`attend_half` or :func:`mlp_half`.
        *args: its arguments.
        **kwargs: likewise.

    """
    name = half.__name__
    kernels, _ = extension(args[0])
    if kernels is None:
        return None
    try:
        reason = kernels.why_not(name, *args, **kwargs)
        record(name, "cuda" if reason is None else None, reason)
        return None if reason is not None else cast(T, getattr(kernels, name)(*args, **kwargs))
    except Exception:
        getattr(checks, name)(*args, **kwargs)
        raise


max_r = tome_reference.max_r
match = _operation(tome_reference.match)
kth_match = _operation(tome_reference.kth_match)
random_match = _operation(tome_reference.random_match)
merge = _operation(tome_reference.merge, checks_first=False)
unmerge = _operation(tome_reference.unmerge)
follow = _operation(tome_reference.follow)
restore = _operation(tome_reference.restore)
attention = _operation(tome_reference.attention)
merge_add_norm = _operation(tome_reference.merge_add_norm, checks_first=False)
attend_half = _operation(tome_reference.attend_half, checks_first=False)
mlp_half = _operation(tome_reference.mlp_half, checks_first=False)
