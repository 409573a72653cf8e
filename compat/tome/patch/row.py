"""What a block says of itself: the names of its parts, how its attention makes q, k and v, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tome import ops
from tome.matching import Matching
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks

Call = Callable[[nn.Module, Tensor], Tensor]
Qkv = tuple[Tensor, Tensor, Tensor]  # each [B, H, N, D]


class Place(NamedTuple):
    """Where the tokens of a block stand."""

    given: Any = None  # what the host passes to each of its blocks: a rotary table or a bias, for the original tokens
    home: Tensor | None = None  # int64 [B, N], the original token in whose place each stands; None: each in its own


class Beside(NamedTuple):
    """What a host passes to a block beside the tokens, for those that entered the first block."""

    given: Any = None  # positions, as the block's attention understands them
    valid: Tensor | None = None  # bool [B, N], false for padding


NOTHING = Beside()


class Attention:
    """How one class of attention makes q, k, v, and what it does behind them; ``attn`` is the module."""

    names: frozenset[str]  # of the classes
    parts: frozenset[str]  # the names of their children
    is_placed = False  # whether it reads positions, which then follow the tokens
    is_rotary = False  # whether it turns q and k by them

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        """Normed tokens [B, N, C] -> q, k, v, of which k is what tokens are matched by; ``call`` calls a part."""
        raise NotImplementedError

    def placed(self, attn: Any, qkv: Qkv, place: Place) -> Qkv:
        """Q, k, v as attention reads them: turned by their places, if they are to be."""
        return qkv

    @torch.no_grad()
    def unwatched_keys(self, attn: Any, y: Tensor) -> Tensor:
        """The keys, made past the hooks of what makes them, for a module that is called as well."""
        return self.project(attn, y, lambda part, value: part.forward(value))[1]

    def attend(self, attn: Any, qkv: Qkv, size: Tensor | None, place: Place) -> Tensor:
        """What the heads see [B, H, N, D], each key weighed by its size [B, N]."""
        return ops.attention(*qkv, size, *self.numbers(attn)[1:])

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        """What the heads have seen [B, H, N, D] -> what is added to the tokens [B, N, C]."""
        raise NotImplementedError

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        """The module itself, called with log sizes [B, 1, 1, N] as its mask."""
        raise NotImplementedError

    def is_watched(self, attn: Any) -> bool:
        """Whether someone watches or replaces what only a call of the module computes."""
        return has_hooks(attn)

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        """Heads, the factor of the scores (None: D ** -0.5), and the probability of dropping a weight now."""
        raise NotImplementedError

    def reads_linearly(self, attn: Any) -> bool:
        """Whether y is read by linear layers only, which round to autocast's dtype anyway."""
        return False

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        """What it computes with; raises NotPlain where it doesn't end in a plain linear layer."""
        raise NotPlain(f"{type(attn).__name__} is called part by part")


class Row(NamedTuple):
    """Where a class of blocks keeps its parts: their names."""

    attention: Attention
    attn: str = "attn"
    norm1: str = "norm1"
    scale1: str | None = "ls1"  # a module, or a parameter
    drop1: str | None = "drop_path1"
    mlp: str = "mlp"
    norm2: str = "norm2"
    scale2: str | None = "ls2"
    drop2: str | None = "drop_path2"
    is_post: bool = False  # the norms stand behind the branches
    others: tuple[str, ...] = ()  # further children

    @property
    def children(self) -> set[str]:
        """The names of all children that the block may have."""
        scales_and_drops = {self.scale1, self.drop1, self.scale2, self.drop2} - {None}
        return {self.attn, self.norm1, self.mlp, self.norm2, *self.others, *map(str, scales_and_drops)}


class ModelSettings(NamedTuple):
    """What a patched model was told."""

    trace_source: bool
    prop_attn: bool
    backend: str | None
    matching: Matching


class BlockSettings(NamedTuple):
    """What a block needs to know of the model and of its schedule."""

    name: str  # "blocks.3"
    ratio: tuple[int, int]  # of the schedule, an entry as integers: a float would be a symbol to torch.compile
    prefix: int
    is_first: bool
    is_last: bool
    model: ModelSettings

    @property
    def entry(self) -> int | float:
        """Its entry of the schedule: tokens, or a share of the free ones."""
        count, parts = self.ratio
        return count if parts == 1 else count / parts
