"""timm's CaiT: attention whose heads talk, and class tokens that enter behind the blocks."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks, through
from tome.patch.row import Call, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError
from tome.patch.timm_host import TimmModel
from tome.patch.timm_vit import TimmAttention, TimmBlock
from tome.recording import record
from tome_reference.attention import size_bias


class TalkingHeads(TimmAttention):
    """timm's TalkingHeadAttn: linear layers over the heads, before the softmax and behind it."""

    names = frozenset({"TalkingHeadAttn"})
    parts = frozenset({"qkv", "attn_drop", "proj", "proj_l", "proj_w", "proj_drop"})

    def heads(self, attn: Any, qkv: Tensor, call: Call) -> Qkv:
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, attn: Any, qkv: Qkv, size: Tensor | None, place: Place) -> Tensor:
        record("attention", "torch", "heads talk")
        q, k, v = qkv
        scores = attn.proj_l(((q * attn.scale) @ k.transpose(2, 3)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if size is None:
            weights = attn.proj_w(scores.softmax(dim=3).permute(0, 2, 3, 1))
        else:
            weights = (scores + size_bias(size)).softmax(dim=3).to(v.dtype)
            weights = attn.proj_w(weights.permute(0, 2, 3, 1))
            if attn.proj_w.bias is not None:  # which each of the tokens that a key stands for would have got
                weights = weights + ((size - 1)[:, None, :, None] * attn.proj_w.bias).to(weights.dtype)
        return through(attn.attn_drop, weights.permute(0, 3, 1, 2)) @ v

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        if bias is not None:
            raise UnsupportedModelError(
                f"a {type(attn).__name__} has hooks or a forward of its own, and takes no log sizes: hook a part of it"
            )
        return cast(Tensor, attn(y))

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn)

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        raise NotPlain("heads talk")


class CaitBlock(TimmBlock):
    """CaiT's LayerScaleBlock."""

    _tome_row = Row(TalkingHeads(), scale1="gamma_1", drop1="drop_path", scale2="gamma_2", drop2="drop_path")


class CaitModel(TimmModel):
    """CaiT, of whose blocks only those behind the patched ones have a class token."""

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        return 0, False, False


BLOCKS: dict[str, type[MergingBlock]] = {"cait.LayerScaleBlock": CaitBlock}
MODELS: dict[str, type[TimmModel] | str] = {"cait.Cait": CaitModel}
