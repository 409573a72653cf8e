"""Blocks built on torch.nn.MultiheadAttention, with an MLP that is a Sequential: torchvision's, open_clip's, SWAG's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, NotPlain, Reading
from tome.patch.row import Attention, Call, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError, check_block, check_parts
from tome.tokens import MlpParts
from tome_reference.halves import split

plain.LINEARS[NonDynamicallyQuantizableLinear] = None


class MultiheadAttention(Attention):
    """torch.nn.MultiheadAttention, which calls no part of its own: hooks on its out_proj see nothing, here as there."""

    names = frozenset({"MultiheadAttention"})
    parts = frozenset({"out_proj"})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        return split((y,), attn.num_heads, (attn.in_proj_weight, attn.in_proj_bias))

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        return F.linear(seen.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        x = y if attn.batch_first else y.transpose(0, 1)
        value = attn(x, x, x, key_padding_mask=None if bias is None else bias[:, 0, 0], need_weights=False)[0]
        return cast(Tensor, value if attn.batch_first else value.transpose(0, 1))

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        return attn.num_heads, None, attn.dropout if attn.training else 0.0

    def reads_linearly(self, attn: Any) -> bool:
        return True

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        return AttentionParts(reading.affine(attn, "in_proj_weight", "in_proj_bias"), reading.linear(attn, "out_proj"))


class MhaBlock(MergingBlock):
    """A block whose MLP is a Sequential of Linear, GELU, Linear, with or without dropout; others are called."""

    def mlp_reads_linearly(self) -> bool:
        mlp: Any = getattr(self, self._tome_row.mlp)
        return _is_sequential(mlp) and len(mlp) > 0 and type(mlp[0]) is nn.Linear

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        steps = reading.steps(mlp) if _is_sequential(mlp) else []
        if len(steps) != 3:
            raise NotPlain(f"mlp is a {type(mlp).__name__} and not Linear, GELU, Linear")
        fc1, gelu, fc2 = steps
        return MlpParts(reading.linear(mlp, fc1), reading.gelu(mlp, gelu), reading.linear(mlp, fc2))


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def check(blocks: Mapping[str, nn.Module], mixin_of: Callable[[nn.Module], type[MergingBlock] | None]) -> None:
    """Refuse blocks that are not understood.

    Args:
        blocks: by their names.
        mixin_of: what a block becomes; None for one that is not known.

    Raises:
        UnsupportedModelError: with the name of the part and the reason.

    """
    for name, block in blocks.items():
        check_block(name, block)
        mixin = mixin_of(block)
        if mixin is None:
            raise UnsupportedModelError(f"{name}: {type(block).__name__} is not supported")
        row: Row = mixin._tome_row
        check_parts(name, block, row.children)
        attn = block._modules.get(row.attn)
        if type(attn).__name__ not in row.attention.names or attn is None:
            raise UnsupportedModelError(f"{name}.{row.attn}: {type(attn).__name__} is not supported")
        check_parts(f"{name}.{row.attn}", attn, row.attention.parts)
        if isinstance(row.attention, MultiheadAttention):
            _check_attention(f"{name}.{row.attn}", attn, mixin._tome_batch_first)


def _check_attention(name: str, attn: Any, batch_first: bool) -> None:
    if type(attn) is not nn.MultiheadAttention:
        raise UnsupportedModelError(f"{name}: {type(attn).__module__}.{type(attn).__name__} is not torch's own")
    for what, is_so in (
        ("add_bias_kv", attn.bias_k is not None or attn.bias_v is not None),
        ("add_zero_attn", attn.add_zero_attn),
        ("queries, keys and values of different widths (kdim, vdim)", not attn._qkv_same_embed_dim),
        (f"batch_first={attn.batch_first}", attn.batch_first is not batch_first),
    ):
        if is_so:
            raise UnsupportedModelError(f"{name}: nn.MultiheadAttention with {what} is not supported")
