"""Who decides which tokens merge: a name that this library knows, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from tome import ops, schedule

Rule: TypeAlias = Callable[[Tensor, int, int], Tensor]  # keys [B, H, N, D], r, prefix -> slot int32 [B, N]


class Matching(NamedTuple):
    """A rule, and how the entries of a schedule are meant for it; without a name it is the user's own."""

    rule: Rule
    name: str | None = None

    def plan(self, entry: int | float, tokens: int, prefix: int) -> tuple[int, int]:
        """What a layer asks the rule for, and how many tokens are left of ``tokens``."""
        free = tokens - prefix
        if self.name == "kth":
            k = max(1, min(int(entry), free))
            return k, prefix + free // k if k > 1 else tokens
        r = schedule.merged(entry, free)
        return r, tokens - r


NAMED = {
    "bipartite": Matching(ops.match, "bipartite"),
    "kth": Matching(ops.kth_match, "kth"),
    "random": Matching(ops.random_match, "random"),
}


def chosen(matching: str | Rule) -> Matching:
    """The matching of that name, or the user's own.

    Raises:
        ValueError, TypeError: neither a known name nor a function.

    """
    if isinstance(matching, str):
        if matching not in NAMED:
            raise ValueError(f"unknown matching {matching!r}; choose one of {', '.join(NAMED)}, or pass a function")
        return NAMED[matching]
    if not callable(matching):
        raise TypeError(f"matching must be a name or a function (keys, r, prefix) -> slot, got {matching!r}")
    return Matching(matching)
