"""What ``model.r`` may be, and what it will do, answered without running a model.

A schedule says how many tokens each layer merges:

=================  =====================================================================================
``8``              8 tokens in every layer
``(8, -1.0)``      8 on average, from 16 in the first layer down to 0 in the last (+1.0: the other way round)
``[8, 8, 4]``      layer by layer; layers behind the end of the list merge nothing
``0.05``           in each layer that share of the tokens still free
=================  =====================================================================================

A layer never merges more than half of its free (unprotected) tokens, whatever the schedule asks for.
:func:`load` reads a schedule from a file.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

Schedule: TypeAlias = int | float | tuple[int, float] | list[int]


@dataclass(frozen=True)
class Plan:
    """What a schedule does: ``tokens[i]`` enter layer i, ``tokens[-1]`` leave the last; ``r[i]`` are merged."""

    tokens: tuple[int, ...]
    r: tuple[int, ...]


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
    return min(_wanted(entry, free), free // 2)  # max_r of tome_reference, with which PyTorch would come


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


def too_large(r: Schedule, depth: int, tokens: int, prefix: int = 1) -> str | None:
    """Why even the first layer, which has most tokens, could not follow a schedule in full; None where it could.

    The arguments are those of :func:`plan`.
    """
    free = tokens - prefix
    wanted = max((_wanted(entry, free) for entry in per_layer(depth, r)), default=0)
    most = merged(wanted, free)
    if wanted <= most:
        return None
    return f"of {tokens} tokens, {prefix} of them protected, a layer can merge at most {most}, not {wanted}"


def warn_if_clipped(r: Schedule, depth: int, tokens: int, prefix: int = 1, stacklevel: int = 4) -> None:
    """Warn where :func:`too_large` has a reason; the default ``stacklevel`` blames who sets it on a Module."""
    reason = too_large(r, depth, tokens, prefix)
    if reason is not None:
        warnings.warn(f"r = {r} is clipped: {reason}", stacklevel=stacklevel)


def load(file: str | os.PathLike[str]) -> Schedule:
    """The schedule in a JSON file: of an object what stands under "r", as ``tome tune --json`` writes it.

    A tuple (8, -1.0) stands there as [8, -1.0]: only its second entry has a point.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no schedule in it, with its name and the reason.

    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if isinstance(found, dict) and "r" not in found:
            raise ValueError('has no "r"')
        r = found["r"] if isinstance(found, dict) else found
        if isinstance(r, list) and len(r) == 2 and isinstance(r[1], float):
            r = tuple(r)
        per_layer(len(r) if isinstance(r, list) else 12, r)  # any depth serves to check the form
    except (ValueError, TypeError) as error:  # bytes that are no text, text that is no JSON
        reason = f"is not JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
        raise ValueError(f"{file}: {reason}") from error
    return cast(Schedule, r)


def _wanted(entry: int | float, free: int) -> int:
    # The small addend forgives the rounding of a product such as 0.29 * 100.
    return int(entry * free + 1e-6) if isinstance(entry, float) else entry


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
