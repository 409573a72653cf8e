"""Models of no library: the user says where the parts are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tome.patch.block import MergingBlock
from tome.patch.mha import MhaBlock
from tome.patch.model import PatchedModel, begin
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks, through
from tome.patch.row import Attention, Call, ModelSettings, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError, check_block, check_own, check_parts, swap


class QkvAttention(Attention):
    """Attention of linear layers for q, k and v, softmax(q kT * scale) v, and a projection.

    Args:
        qkv: the name of one layer whose outputs are all of q, all of k and all of v, each head by head; or the names of
            three layers.
        proj: the name of the layer behind the heads.
        heads: how many, or the name of the attribute that tells.
        scale: the name of the attribute with the factor of the scores; None: one over the root of the head dimension.
        q_norm: the name of a norm of each head's q; None: there is none.
        k_norm: likewise for k.
        attn_drop: the name of a Dropout of the weights; None: there is none.
        proj_drop: the name of one behind ``proj``.

    """

    def __init__(
        self,
        qkv: str | tuple[str, str, str] = "qkv",
        proj: str = "proj",
        heads: str | int = "num_heads",
        scale: str | None = None,
        q_norm: str | None = None,
        k_norm: str | None = None,
        attn_drop: str | None = None,
        proj_drop: str | None = None,
    ) -> None:
        self.qkv, self.proj, self.heads, self.scale = qkv, proj, heads, scale
        self.q_norm, self.k_norm, self.attn_drop, self.proj_drop = q_norm, k_norm, attn_drop, proj_drop
        self.layers = (qkv,) if isinstance(qkv, str) else tuple(qkv)
        optional = {q_norm, k_norm, attn_drop, proj_drop} - {None}
        self.parts = frozenset({*self.layers, proj, *map(str, optional)})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        made, heads = [call(getattr(attn, layer), y) for layer in self.layers], self._heads(attn)
        parts = made[0].chunk(3, dim=-1) if len(made) == 1 else made
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
        if self.q_norm is not None:
            q = call(getattr(attn, self.q_norm), q).to(v.dtype)  # under autocast norms return float32
        if self.k_norm is not None:
            k = call(getattr(attn, self.k_norm), k).to(v.dtype)
        return q, k, v

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        x: Tensor = getattr(attn, self.proj)(seen.transpose(1, 2).flatten(2))
        return x if self.proj_drop is None else through(getattr(attn, self.proj_drop), x)

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        if bias is not None:
            raise UnsupportedModelError(
                f"{type(attn).__name__} is watched by a hook, and knows no sizes when it is called: hook a part of it, "
                "or patch with prop_attn=False"
            )
        x: Tensor = attn(y)
        return x

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn) or (self.attn_drop is not None and has_hooks(getattr(attn, self.attn_drop)))

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        drop = None if self.attn_drop is None else getattr(attn, self.attn_drop)
        dropout_p = drop.p if drop is not None and drop.training else 0.0
        return self._heads(attn), None if self.scale is None else getattr(attn, self.scale), dropout_p

    def reads_linearly(self, attn: Any) -> bool:
        return all(type(getattr(attn, layer)) is nn.Linear for layer in self.layers)

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        reading.inert(attn, *(name for name in (self.attn_drop, self.proj_drop) if name is not None))
        qkv = None
        if len(self.layers) == 1 and self.q_norm is None and self.k_norm is None:
            try:
                qkv = reading.linear(attn, self.layers[0])
            except NotPlain:
                qkv = None
        return AttentionParts(qkv, reading.linear(attn, self.proj))

    def _heads(self, attn: Any) -> int:
        heads: int = getattr(attn, self.heads) if isinstance(self.heads, str) else self.heads
        return heads


class OwnBlock(MhaBlock):
    """A block whose row its instance has."""

    _tome_row: Row


class OwnModel(PatchedModel):
    """A model that was told where its blocks are."""

    _tome_path: str
    _tome_protected: int

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        blocks: Any = self.get_submodule(self._tome_path)
        return {f"{self._tome_path}.{i}": block for i, block in enumerate(blocks)}

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        return self._tome_protected, self._tome_protected > 0, False

    def _tome_length(self) -> int | None:
        return None


def apply_patch(model: nn.Module, settings: ModelSettings, path: str, row: Row, prefix: int) -> nn.Module:
    """See :func:`tome.patch.custom`."""
    check_own("", model)
    try:
        blocks: Any = model.get_submodule(path)
        inside = list(blocks)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{path!r} is no list of blocks of {type(model).__name__}: {error}") from None
    for i, block in enumerate(inside):
        _check_block(f"{path}.{i}", block, row)
    for block in inside:
        swap(block, OwnBlock)
        block._tome_row = row
    told: Any = model
    told._tome_path, told._tome_protected = path, prefix
    begin(model, OwnModel, settings)
    return model


def _check_block(name: str, block: Any, row: Row) -> None:
    check_block(name, block)
    check_parts(name, block, row.children)
    attn = _part(name, block, row.attn)
    for part in (row.norm1, row.mlp, row.norm2):
        _part(name, block, part)
    for other in (row.scale1, row.drop1, row.scale2, row.drop2):
        if other is not None and not hasattr(block, other):
            raise _lacks(name, block, other)
    name = f"{name}.{row.attn}"
    check_parts(name, attn, row.attention.parts)
    for part in row.attention.parts:
        _part(name, attn, part)
    if isinstance(row.attention, QkvAttention):
        for attribute in (row.attention.heads, row.attention.scale):
            if isinstance(attribute, str) and not hasattr(attn, attribute):
                raise _lacks(name, attn, attribute)


def _part(name: str, module: nn.Module, part: str) -> nn.Module:
    found = module._modules.get(part)
    if found is None:
        raise _lacks(name, module, part)
    return found


def _lacks(name: str, module: nn.Module, part: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name}: {type(module).__name__} has no {part}, which its row names")
