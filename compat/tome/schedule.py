"""What ``model.r`` may be, and what it will do, answered without running a model.

A schedule says how many tokens each layer merges:

=================  =====================================================================================
``8``              8 tokens in every layer
``(8, -1.0)``      8 on average, from 16 in the first layer down to 0 in the last (+1.0: the other way round)
``[8, 8, 4]``      layer by layer; layers behind the end of the list merge nothing
``0.05``           in each layer that share of the tokens still free
=================  =====================================================================================

A layer never merges more than half of its free (unprotected) tokens, whatever the schedule asks for.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tome_reference import max_r

Schedule: TypeAlias = int | float | tuple[int, float] | list[int]


@dataclass(frozen=True)
class Plan:
    """What a schedule does: ``tokens[i]`` enter layer i, ``tokens[-1]`` leave the last; ``r[i]`` are merged."""

    tokens: tuple[int, ...]
    r: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """FLOPs (two per multiply-add) of the matrix products of one model and one image.

    Attributes:
        attention: per token and layer: the query, key, value and output projections.
        mixing: per pair of tokens and layer: scores and weighted sum.
        mlp: per token and layer, after merging.
        fixed: once per image: patch embedding and head.
        pool: per token that leaves the last layer: attention pooling.

    """

    attention: int
    mixing: int
    mlp: int
    fixed: int = 0
    pool: int = 0

    @classmethod
    def vit(cls, dim: int, mlp_ratio: float = 4.0, fixed: int = 0) -> Cost:
        """The plain Vision Transformer of width ``dim``."""
        return cls(8 * dim * dim, 4 * dim, 4 * dim * int(dim * mlp_ratio), fixed)


def per_layer(depth: int, r: Schedule) -> tuple[int | float, ...]:
    """Check a schedule and spread it over ``depth`` layers.

    Returns:
        One entry a layer: an int is a number of tokens, a float a share of the free tokens.

    Raises:
        TypeError, ValueError: not a schedule, with the reason.

    """
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(f"r as a tuple must be (r, inflection), got {r!r}; use a list for one r per layer")
        return tuple(_inflected(depth, *r))
    if isinstance(r, list):
        if len(r) > depth:
            raise ValueError(f"r has {len(r)} entries for a model of {depth} layers: {r!r}")
        return tuple(_count(f"r[{i}]", entry) for i, entry in enumerate(r)) + (0,) * (depth - len(r))
    if isinstance(r, numbers.Integral):
        return (_count("r", r),) * depth
    if isinstance(r, numbers.Real):
        if not 0.0 < r < 1.0:
            raise ValueError(f"r as a ratio must be in (0, 1), got {r!r}; use an int for a number of tokens")
        return (float(r),) * depth
    raise TypeError(f"r must be an int, (r, inflection), a list of ints or a float ratio, got {r!r}")


def merged(entry: int | float, free: int) -> int:
    """How many of ``free`` tokens one layer merges, given its entry of :func:`per_layer`."""
    # The small addend forgives the rounding of a product such as 0.29 * 100.
    wanted = int(entry * free + 1e-6) if isinstance(entry, float) else entry
    return min(wanted, max_r(free, 0))


def plan(r: Schedule, depth: int, tokens: int, prefix: int = 1) -> Plan:
    """Tokens per layer for a schedule.

    Args:
        r: the schedule.
        depth: layers of the model.
        tokens: tokens that enter the first layer, prefix included.
        prefix: protected tokens (class, distillation, registers).

    Raises:
        TypeError, ValueError: not a schedule, or counts that are no counts.

    """
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be in [0, tokens = {tokens}], got {prefix}")
    counts, merges = [tokens], []
    for entry in per_layer(depth, r):
        merges.append(merged(entry, counts[-1] - prefix))
        counts.append(counts[-1] - merges[-1])
    return Plan(tuple(counts), tuple(merges))


def flops(tokens: Sequence[int], cost: Cost) -> int:
    """FLOPs of one image: attention sees the tokens that enter a layer, the MLP those that leave it.

    Args:
        tokens: as in :attr:`Plan.tokens`.
        cost: of the model.

    """
    layers = itertools.pairwise(tokens)
    blocks = sum(cost.attention * n + cost.mixing * n * n + cost.mlp * m for n, m in layers)
    return cost.fixed + cost.pool * tokens[-1] + blocks


def _inflected(depth: int, r: int, inflection: float) -> list[int]:
    mean = _count("r", r)
    if isinstance(inflection, bool) or not isinstance(inflection, numbers.Real):
        raise TypeError(f"inflection must be a number in [-1, 1], got {inflection!r}")
    if not -1.0 <= inflection <= 1.0:
        raise ValueError(f"inflection must be in [-1, 1], got {inflection!r}")
    if depth == 1:
        return [mean]
    first = math.trunc(mean * (1.0 - inflection))
    return [math.trunc(first + 2 * (mean - first) * i / (depth - 1)) for i in range(depth)]


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return int(value)


def warn_if_clipped(r: Schedule, depth: int, tokens: int, prefix: int = 1) -> None:
    pass
