"""timm's vision tower of Gemma 4: four norms a block, and rotary positions by coordinates of each image's own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tome.patch.block import MergingBlock
from tome.patch.row import Attention, Beside, Call, Place, Qkv, Row
from tome.patch.timm_eva import AnySizeModel
from tome.patch.timm_host import TimmModel
from tome.patch.timm_naflex import PaddedBlock

try:
    from timm.models.gemma4_vit import apply_multidimensional_rope
except ImportError:  # a timm without Gemma 4, and so without its blocks
    apply_multidimensional_rope = None


class GemmaAttention(Attention):
    """Gemma4Attention; the given is (cosines, sines), each [B, N0, D]."""

    names = frozenset({"Gemma4Attention"})
    parts = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "v_norm", "attn_drop", "proj_drop"})
    is_placed = is_rotary = True

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        made = (
            call(norm, call(part, y).unflatten(2, (heads, attn.head_dim)))
            for part, norm, heads in (
                (attn.q_proj, attn.q_norm, attn.num_heads),
                (attn.k_proj, attn.k_norm, attn.num_kv_heads),
                (attn.v_proj, attn.v_norm, attn.num_kv_heads),
            )
        )
        return cast(Qkv, tuple(x.transpose(1, 2) for x in made))

    def placed(self, attn: Any, qkv: Qkv, place: Place) -> Qkv:
        given, (q, k, v) = self._given(place), qkv
        q, k = (apply_multidimensional_rope(x.transpose(1, 2), *given).transpose(1, 2).to(v.dtype) for x in (q, k))
        if attn.num_kv_groups > 1:
            k, v = (x.repeat_interleave(attn.num_kv_groups, dim=1) for x in (k, v))
        return q, k, v

    def _given(self, place: Place) -> tuple[Tensor, Tensor]:
        cos, sin = place.given
        if place.home is None:
            return cos, sin
        image = torch.arange(place.home.shape[0], device=place.home.device)[:, None]
        return cos[image, place.home], sin[image, place.home]

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, attn.proj_drop(attn.o_proj(seen.transpose(1, 2).flatten(2))))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        return cast(Tensor, attn(y, *self._given(place), attn_mask=bias))

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        return attn.num_heads, 1.0, attn.attn_drop.p if attn.training else 0.0


class GemmaBlock(PaddedBlock):
    """Gemma4Block. The norms behind its branches stand where others have a LayerScale."""

    _tome_row = Row(
        GemmaAttention(),
        *("attn", "norm1", "norm2", "drop_path", "mlp", "norm3", "norm4", "drop_path"),
    )

    def beside(  # type: ignore[override]
        self, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> Beside:
        """The rotary tables, and which tokens are no padding."""
        return Beside((rope_cos, rope_sin), None if attn_mask is None else self.valid(attn_mask))


BLOCKS: dict[str, type[MergingBlock]] = {"gemma4_vit.Gemma4Block": GemmaBlock}
MODELS: dict[str, type[TimmModel] | str] = {
    "gemma4_vit.Gemma4VitEncoder": AnySizeModel,
    "gemma4_vit.Gemma4VitClassifier": "encoder",
}
