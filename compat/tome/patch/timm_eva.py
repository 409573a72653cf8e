"""timm's Eva and its kind: EVA, EVA-02, DINOv3, LingBot, Perception Encoder, ViTs with rotary positions, Sapiens2.

And the vision towers of Qwen3 and DeepSeek, whose blocks are of the same construction.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tome import ops
from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, Reading
from tome.patch.rotary import rows
from tome.patch.row import NOTHING, Beside, Call, Place, Qkv, Row
from tome.patch.timm_host import TimmModel
from tome.patch.timm_vit import TimmAttention, TimmBlock


class RotaryAttention(TimmAttention):
    """EvaAttention and timm.layers.AttentionRope; the given is the rotary table."""

    names = frozenset({"EvaAttention", "AttentionRope"})
    parts = TimmAttention.parts | {"q_proj", "k_proj", "v_proj"}
    is_placed = is_rotary = True

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        q, k, v = self._heads(attn, y, call)
        return call(attn.q_norm, q), call(attn.k_norm, k), v

    def placed(self, attn: Any, qkv: Qkv, place: Place) -> Qkv:
        q, k, v = qkv
        if place.given is not None:
            turn = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
            q, k = ops.rotate(q, k, place.given, place.home, *turn)
        q, k = q.to(v.dtype), k.to(v.dtype)
        groups = attn.num_heads // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v

    def _heads(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        if attn.qkv is None:
            kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
            parts = ((attn.q_proj, attn.num_heads), (attn.k_proj, kv_heads), (attn.v_proj, kv_heads))
            return cast(Qkv, tuple(call(part, y).unflatten(2, (h, -1)).transpose(1, 2) for part, h in parts))
        qkv = self.biased(attn, y, call)
        return cast(Qkv, qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        table = None if place.given is None else rows(place.given, place, attn.num_prefix_tokens)
        return cast(Tensor, attn(y, rope=table, attn_mask=bias))

    def reads_linearly(self, attn: Any) -> bool:
        readers = (attn._modules.get(name) for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"))
        return all(reader is None or type(reader) is nn.Linear for reader in readers)

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        return AttentionParts(None, self.read_end(reading, attn))


class RotaryBlock(TimmBlock):
    """EvaBlock: pre-norm, LayerScale by parameters of its own."""

    _tome_row = Row(RotaryAttention(), scale1="gamma_1", scale2="gamma_2")

    def beside(self, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Beside:
        """The rotary table; a mask is refused, and so is a table for tokens that merge."""
        super().beside(*args, **kwargs)
        if rope is None:
            return NOTHING
        unmoved = cast(Any, self).attn.num_prefix_tokens
        if unmoved > self._tome.prefix:
            raise self.refused(
                f"its attention leaves {unmoved} tokens without a position, of which {self._tome.prefix} are protected"
            )
        return Beside(rope)


class RotaryPostNormBlock(RotaryBlock):
    """EvaBlockPostNorm, which normalises its branches."""

    _tome_row = Row(RotaryBlock._tome_row.attention, scale1=None, scale2=None, is_post=True)


class DeepseekBlock(RotaryBlock):
    """DeepseekVitBlock, without LayerScale."""

    _tome_row = Row(RotaryBlock._tome_row.attention, scale1=None, scale2=None)


class AnySizeModel(TimmModel):
    """A model that takes images of any size."""

    def _tome_length(self) -> int | None:
        return None


BLOCKS: dict[str, type[MergingBlock]] = {
    "eva.EvaBlock": RotaryBlock,
    "eva.EvaBlockPostNorm": RotaryPostNormBlock,
    "deepseek_vit.DeepseekVitBlock": DeepseekBlock,
}
MODELS: dict[str, type[TimmModel] | str] = {
    "eva.Eva": TimmModel,
    "qwen3_vit.Qwen3VitEncoder": AnySizeModel,
    "qwen3_vit.Qwen3VitClassifier": "encoder",
    "deepseek_vit.DeepseekVitEncoder": AnySizeModel,
    "deepseek_vit.DeepseekVitClassifier": "encoder",
}
