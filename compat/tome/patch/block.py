"""What every host shares: the state that travels from block to block, and the block with a merge in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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


class BlockSettings(NamedTuple):
    """What one block needs to know: its entry of the schedule, the protected tokens, proportional attention."""

    r: int | float = 0
    prefix: int = 1
    prop_attn: bool = True


Attend: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def merging_block(tokens: Tokens, settings: BlockSettings, attend: Attend, mlp: Callable[[Tensor], Tensor]) -> Tokens:
    """One transformer block that merges between attention and MLP (section 3, figure 1).

    Args:
        tokens: the state.
        settings: of this block.
        attend: (x [B, N, C], size or None) -> (the attention branch [B, N, C], keys [B, H, N, D]).
        mlp: x [B, M, C] -> the MLP branch [B, M, C].

    """
    x, size, slot = tokens
    branch, keys = attend(x, size if settings.prop_attn else None)
    x = x + branch
    n = x.shape[1]
    r = schedule.merged(settings.r, n - settings.prefix)
    if r > 0:
        step = ops.match(keys, r, settings.prefix)
        x, size = ops.merge(x, step, n - r, size)
        slot = None if slot is None else step.gather(1, slot.long())
    return Tokens(x + mlp(x), size, slot)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo a patch: every module gets its class back, and no attribute is left behind. Returns the model."""
    for module in model.modules():
        base = getattr(type(module), "_tome_base", None)
        if base is not None:
            module.__class__ = base
            for name in [n for n in vars(module) if n.startswith("_tome")]:
                delattr(module, name)
    return model
