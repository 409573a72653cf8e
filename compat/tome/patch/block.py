"""What every host shares: the state that travels from block to block, and the block with a merge in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tome import ops, schedule


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not understood; the message names the part and the reason."""


class Tokens(NamedTuple):
    """The tokens between two blocks.

    Attributes:
        x: [B, N, C].
        size: float32 [B, N], how many original tokens each stands for; None while nothing has been merged.
        slot: int32 [B, N0], where each original token is now; None where nobody asked.

    """

    x: Tensor
    size: Tensor | None = None
    slot: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, trace: bool) -> Tokens:
        """The tokens that enter the first block; ``trace`` follows each of them to its final place."""
        identity = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        return cls(x, None, identity.expand(x.shape[0], -1).contiguous() if trace else None)


class MergingBlock:
    """A transformer block that merges between attention and MLP (section 3, figure 1); mixed into a host's block.

    The host's class gives the two branches. The settings are attributes of types that torch.compile takes for
    constants, so that token counts stay static; a float would make them symbols, hence the str.
    """

    _tome_r: int | str  # its entry of the schedule: tokens, or the repr of a share of the free ones
    _tome_prefix: int  # protected tokens
    _tome_prop_attn: bool  # whether attention weighs keys by size

    def forward(self, tokens: Tokens) -> Tokens:
        if self._tome_r == 0 and tokens.size is None:
            unmerged: Tensor = super().forward(tokens.x)  # type: ignore[misc]  # of the host's block
            return tokens._replace(x=unmerged)
        return self.merging_forward(tokens)

    def merging_forward(self, tokens: Tokens) -> Tokens:
        """The block with its merge, also where it has nothing to merge."""
        x, size, slot = tokens
        branch, keys = self.attention_branch(x, size if self._tome_prop_attn else None)
        x = x + branch
        n = x.shape[1]
        entry = float(self._tome_r) if isinstance(self._tome_r, str) else self._tome_r
        r = schedule.merged(entry, n - self._tome_prefix)
        if r > 0:
            step = ops.match(keys, r, self._tome_prefix)
            x, size = ops.merge(x, step, n - r, size)
            slot = None if slot is None else step.gather(1, slot.long())
        return Tokens(x + self.mlp_branch(x), size, slot)

    def attention_branch(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """X [B, N, C], size float32 [B, N] or None -> what attention adds to x, and the keys [B, H, N, D]."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor) -> Tensor:
        """X [B, M, C] -> what the MLP adds to x."""
        raise NotImplementedError


def unpatch(model: nn.Module) -> nn.Module:
    """Undo a patch: every module gets its class back, and no attribute is left behind. Returns the model."""
    for module in model.modules():
        base = getattr(type(module), "_tome_base", None)
        if base is not None:
            module.__class__ = base
            for name in [n for n in vars(module) if n.startswith("_tome")]:
                delattr(module, name)
    return model
