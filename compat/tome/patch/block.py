"""What every host shares: the state that travels from block to block, and the block with a merge in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tome import ops, schedule
from tome.recording import record

Match = Callable[[Tensor], Tensor | None]  # keys [B, H, N, D] -> the slot map of this block's merge, if it merges


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not understood; the message names the part and the reason."""


class Tokens(NamedTuple):
    """The tokens between two blocks.

    Attributes:
        x: [B, N, C].
        size: float32 [B, N], how many original tokens each stands for; None while nothing has been merged.
        slot: int32 [B, N0], where each original token is now; None where nobody asked.
        normed: x [B, N, C] after the norm that reads it next, where both were computed together.

    """

    x: Tensor
    size: Tensor | None = None
    slot: Tensor | None = None
    normed: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, trace: bool) -> Tokens:
        """The tokens that enter the first block; ``trace`` follows each of them to its final place."""
        if not trace:
            return cls(x)
        identity = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        return cls(x, None, identity.expand(x.shape[0], -1).contiguous())


class Branch(NamedTuple):
    """What is added to x: value [B, N, C], times gamma [C] where there is a LayerScale."""

    value: Tensor
    gamma: Tensor | None = None


class Norm(NamedTuple):
    """A plain LayerNorm, and the dtype that its only reader wants: what can be computed with the addition before it."""

    module: nn.LayerNorm
    dtype: torch.dtype | None = None


class MergingBlock:
    """A transformer block that merges between attention and MLP (section 3, figure 1); mixed into a host's block.

    The host's class gives the two branches and the norms before them. The settings are attributes of types that
    torch.compile takes for constants, so that token counts stay static; a float would make them symbols, hence
    the str.
    """

    _tome_r: int | str  # its entry of the schedule: tokens, or the repr of a share of the free ones
    _tome_prefix: int  # protected tokens
    _tome_prop_attn: bool  # whether attention weighs keys by size

    def forward(self, tokens: Tokens, next_norm: Norm | None = None) -> Tokens:
        if self._tome_r == 0 and tokens.size is None:
            unmerged: Tensor = super().forward(tokens.x)  # type: ignore[misc]  # of the host's block
            return Tokens(unmerged, None, tokens.slot)
        return self.merging_forward(tokens, next_norm)

    def merging_forward(self, tokens: Tokens, next_norm: Norm | None = None) -> Tokens:
        """The block with its merge, also where it has nothing to merge.

        Args:
            tokens: the tokens.
            next_norm: the norm that will read the result, to be computed with the last addition; None leaves it out.

        """
        x, size, slot, normed = tokens
        n = x.shape[1]
        entry = float(self._tome_r) if isinstance(self._tome_r, str) else self._tome_r
        r = schedule.merged(entry, n - self._tome_prefix)
        side = side_stream(x) if r > 0 else None
        if side is None and next_norm is not None:
            done = self.whole(tokens, r, next_norm)
            if done is not None:
                return done

        def match(keys: Tensor) -> Tensor | None:
            if side is None:
                return ops.match(keys, r, self._tome_prefix) if r > 0 else None
            side.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(side):
                return ops.match(keys, r, self._tome_prefix)

        branch, step = self.attention_branch(x, normed, size if self._tome_prop_attn else None, match)
        if side is not None:
            torch.cuda.current_stream(x.device).wait_stream(side)
        if step is not None and slot is not None:
            slot = step.gather(1, slot.long())
        x, normed, size = add(x, branch, step, n - r, size, self.mlp_norm(x.device.type))
        x, normed, size = add(x, self.mlp_branch(x, normed), None, n - r, size, next_norm)
        return Tokens(x, size, slot, normed)

    def whole(self, tokens: Tokens, r: int, next_norm: Norm) -> Tokens | None:
        """The whole block in one call that saves the host work, or None where that cannot be."""
        return None

    def attention_norm(self, device: str) -> Norm | None:
        """The norm that attention reads x through, where another block may compute it; ``device`` is a type."""
        raise NotImplementedError

    def mlp_norm(self, device: str) -> Norm | None:
        """The norm that the MLP reads x through, where it can be computed with the addition before it."""
        raise NotImplementedError

    def attention_branch(
        self, x: Tensor, normed: Tensor | None, size: Tensor | None, match: Match
    ) -> tuple[Branch, Tensor | None]:
        """X [B, N, C], its norm or None, sizes float32 [B, N] or None -> what attention adds, and the matched keys."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Branch:
        """X [B, M, C], its norm or None -> what the MLP adds."""
        raise NotImplementedError


def add(
    x: Tensor, branch: Branch, slot: Tensor | None, tokens: int, size: Tensor | None, norm: Norm | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """X + branch, merged along ``slot`` if there is one, and its norm if there is one: x, normed, size."""
    value, gamma = branch
    if norm is not None and (value.dtype is x.dtype or x.dtype is torch.float32):
        weight, bias, eps = norm.module.weight, norm.module.bias, norm.module.eps
        return ops.merge_add_norm(x, value, slot, tokens, size, weight, bias, eps, gamma, norm.dtype)
    x = x + (value if gamma is None else value * gamma)
    if slot is not None:
        x, size = ops.merge(x, slot, tokens, size)
    return x, None, size


def side_stream(x: Tensor) -> torch.cuda.Stream | None:
    """Where matching may run beside attention: on a second branch of the CUDA graph that is being captured.

    Few images fill no GPU, so that the two take hardly longer than one of them. Outside of a graph the host would pay
    more for a second stream than the GPU gains. Each use waits for the current stream first, and the current stream
    waits for it before anything reads what it made; so the memory of either can be used again by the other.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return None
    return _side_stream(x.device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def plain_norm(module: nn.Module, types: tuple[type[nn.Module], ...]) -> nn.LayerNorm | None:
    """The module if it is a LayerNorm over the last dimension that can be computed outside of it, else None."""
    if not isinstance(module, nn.LayerNorm) or type(module) not in types:
        reason = f"{type(module).__name__} is not a plain LayerNorm"
    elif len(module.normalized_shape) != 1:
        reason = f"the LayerNorm is over {len(module.normalized_shape)} dimensions"
    elif has_hooks(module):
        reason = "the LayerNorm has hooks"
    elif module.weight.__class__ is not nn.Parameter and hasattr(module.weight, "device_mesh"):
        reason = "the LayerNorm's weight is distributed"
    else:
        return module
    record("merge_add_norm", None, reason)
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or replaces calls of the module, so that it has to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced for this instance, as accelerate does
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo a patch: every module gets its class back, and no attribute is left behind. Returns the model."""
    for module in model.modules():
        base = getattr(type(module), "_tome_base", None)
        if base is not None:
            module.__class__ = base
            for name in [n for n in vars(module) if n.startswith("_tome")]:
                delattr(module, name)
    return model
