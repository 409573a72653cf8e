"""What a block says of itself: the names of its parts, how its attention makes q, k and v, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tome.matching import Matching
from tome.patch.plain import AttentionParts, Reading

Call = Callable[[nn.Module, Tensor], Tensor]
Qkv = tuple[Tensor, Tensor, Tensor]  # each [B, H, N, D]


class Attention(Protocol):
    """How one class of attention makes q, k, v, and what it does behind them; ``attn`` is the module."""

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        """Normed tokens [B, N, C] -> q, k, v as attention reads them; ``call`` calls a part."""

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        """What the heads have seen [B, H, N, D] -> what is added to the tokens [B, N, C]."""

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None) -> Tensor:
        """The module itself, called with log sizes [B, 1, 1, N] as its mask."""

    def is_watched(self, attn: Any) -> bool:
        """Whether someone watches or replaces what only a call of the module computes."""

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        """Heads, the factor of the scores (None: D ** -0.5), and the probability of dropping a weight now."""

    def reads_linearly(self, attn: Any) -> bool:
        """Whether y is read by linear layers only, which round to autocast's dtype anyway."""

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        """What it computes with; raises NotPlain where it doesn't end in a plain linear layer."""


class Row(NamedTuple):
    """Where a class of blocks keeps its parts: their names."""

    attention: Attention
    attn: str = "attn"
    norm1: str = "norm1"
    scale1: str | None = "ls1"
    drop1: str | None = "drop_path1"
    mlp: str = "mlp"
    norm2: str = "norm2"
    scale2: str | None = "ls2"
    drop2: str | None = "drop_path2"
    is_post: bool = False  # the norms stand behind the branches


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
    is_last: bool
    model: ModelSettings

    @property
    def entry(self) -> int | float:
        """Its entry of the schedule: tokens, or a share of the free ones."""
        count, parts = self.ratio
        return count if parts == 1 else count / parts
