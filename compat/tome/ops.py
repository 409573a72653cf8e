"""The operations of token merging, each run by the backend in force (:mod:`tome.backend`).

Shapes: B batch, N tokens in, M tokens out, H heads, D head dim, C channels. The definition of each operation is
its namesake in ``tome_reference``, with whose signature and documentation it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import tome_reference
from tome.backend import implementation

__all__ = [
    "attend_half",
    "attention",
    "follow",
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


def _operation(definition: Callable[P, T]) -> Callable[P, T]:
    """What ``definition`` says, by the backend in force."""
    name = definition.__name__

    @functools.wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return cast(T, getattr(implementation(name, *args, **kwargs), name)(*args, **kwargs))

    run.__module__ = __name__  # where pickle finds it
    return run


max_r = tome_reference.max_r
match = _operation(tome_reference.match)
kth_match = _operation(tome_reference.kth_match)
random_match = _operation(tome_reference.random_match)
merge = _operation(tome_reference.merge)
unmerge = _operation(tome_reference.unmerge)
follow = _operation(tome_reference.follow)
restore = _operation(tome_reference.restore)
attention = _operation(tome_reference.attention)
merge_add_norm = _operation(tome_reference.merge_add_norm)
attend_half = _operation(tome_reference.attend_half)
mlp_half = _operation(tome_reference.mlp_half)
