"""The operations of token merging, each run by the backend in force (:mod:`tome.backend`).

Shapes: B batch, N tokens in, M tokens out, H heads, D head dim, C channels. The definition of each operation is
its namesake in ``tome_reference``, whose documentation it shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

import tome_reference
from tome.backend import implementation

__all__ = ["attention", "kth_match", "match", "max_r", "merge", "merge_add_norm", "random_match", "unmerge"]

P = ParamSpec("P")
T = TypeVar("T")

max_r = tome_reference.max_r


def _documented(op: Callable[P, T]) -> Callable[P, T]:
    op.__doc__ = getattr(tome_reference, op.__name__).__doc__
    return op


@_documented
def match(keys: Tensor, r: int, prefix: int = 1) -> Tensor:
    return cast(Tensor, implementation("match", keys, r, prefix).match(keys, r, prefix))


@_documented
def kth_match(keys: Tensor, k: int, prefix: int = 1) -> Tensor:
    return cast(Tensor, implementation("kth_match", keys, k, prefix).kth_match(keys, k, prefix))


@_documented
def random_match(keys: Tensor, r: int, prefix: int = 1, generator: torch.Generator | None = None) -> Tensor:
    module = implementation("random_match", keys, r, prefix, generator)
    return cast(Tensor, module.random_match(keys, r, prefix, generator))


@_documented
def merge(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    module = implementation("merge", x, slot, tokens, size)
    return cast("tuple[Tensor, Tensor]", module.merge(x, slot, tokens, size))


@_documented
def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    return cast(Tensor, implementation("unmerge", x, slot).unmerge(x, slot))


@_documented
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    module = implementation("attention", q, k, v, size, scale, dropout_p)
    return cast(Tensor, module.attention(q, k, v, size, scale, dropout_p))


@_documented
def merge_add_norm(
    x: Tensor,
    branch: Tensor,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    args = (x, branch, slot, tokens, size, weight, bias, eps, gamma, norm_dtype)
    module = implementation("merge_add_norm", *args)
    return cast("tuple[Tensor, Tensor, Tensor | None]", module.merge_add_norm(*args))
