"""timm's models whose attention adds a bias to each pair of tokens: BEiT, BEiT v2, ViTs with relative positions."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_relpos import LayerScale
from torch import Tensor

from tome import ops
from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks
from tome.patch.row import Beside, Call, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError
from tome.patch.timm_host import TimmModel
from tome.patch.timm_vit import TimmAttention, TimmBlock
from tome.recording import record
from tome_reference.attention import aligned, size_bias

plain.SCALES[LayerScale] = "gamma"  # of its own in timm 1.0.20


def paired(bias: Tensor, place: Place, log_size: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mask of merged tokens, where a pair of tokens has the bias of the places in which the two stand.

    Args:
        bias: [1, H, N, N] or [H, N, N], for the original tokens.
        place: of the M tokens.
        log_size: [B, 1, 1, M], added to each key's column.
        dtype: of the queries.

    Returns:
        [B, H, M, M], or [1, H, N, N] where all images have the same.

    """
    bias = bias if bias.dim() == 4 else bias[None]
    if place.home is None:
        return (bias if log_size is None else bias + log_size).to(dtype)
    return ops.pair_bias(bias[0].to(dtype), place.home, None if log_size is None else log_size[:, 0, 0])


class PairAttention(TimmAttention):
    """Attention with a bias for each pair of tokens, of its own or one for all blocks."""

    is_placed = True
    own: str  # the part, a module or a parameter, without which it takes only the bias that it is given

    def bias(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        """The bias of each pair of original tokens, [1, H, N, N] or [H, N, N]."""
        raise NotImplementedError

    def attend(self, attn: Any, qkv: Qkv, size: Tensor | None, place: Place) -> Tensor:
        bias = self.bias(attn, place.given)
        if bias is None:
            return super().attend(attn, qkv, size, place)
        record("attention", "torch", "each pair of tokens has a bias of its own")
        _, scale, dropout_p = self.numbers(attn)
        q, k, v = map(aligned, qkv)
        mask = paired(bias, place, None if size is None else size_bias(size), q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        """Its hooks get a copy of the module, which shares all with it, but for which all bias is given."""
        pairs = self.bias(attn, place.given)
        if pairs is None and bias is None:
            return cast(Tensor, attn(y))
        if "forward" in vars(attn):
            raise UnsupportedModelError(
                f"the forward of {type(attn).__name__} was replaced, so that it would not be told which tokens have "
                "merged: patch before that, or hook it"
            )
        stand_in = copy.copy(attn)
        for kind in ("_parameters", "_modules"):
            parts = vars(attn)[kind]
            stand_in.__dict__[kind] = {**parts, self.own: None} if self.own in parts else parts
        return cast(Tensor, stand_in(y, bias if pairs is None else paired(pairs, place, bias, y.dtype)))

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        raise NotPlain("attention adds a bias to each pair of tokens")


class BeitAttention(PairAttention):
    """timm.models.beit.Attention: biases of q and v beside the weight, a table of the biases of pairs."""

    parts = frozenset({"qkv", "attn_drop", "proj", "proj_drop"})
    own = "relative_position_bias_table"

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        q, k, v = self.biased(attn, y, call).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def bias(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        if attn.relative_position_bias_table is None:
            return shared
        own = cast(Tensor, attn._get_rel_pos_bias())
        return own if shared is None else own + shared


class RelPosAttention(PairAttention):
    """timm's RelPosAttention: a module computes the biases of pairs, from a table or from coordinates."""

    names = frozenset({"RelPosAttention"})
    parts = frozenset({"qkv", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop"})
    own = "rel_pos"

    def bias(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        if attn.rel_pos is None:
            return shared
        if has_hooks(attn.rel_pos) and not attn.fused_attn:
            raise UnsupportedModelError(f"attn.rel_pos: {type(attn.rel_pos).__name__} is not called, but has hooks")
        return cast(Tensor, attn.rel_pos.get_bias())


class PairBlock(TimmBlock):
    """A block that may be given the bias which all blocks share."""

    def beside(self, *args: Any, **kwargs: Any) -> Beside:
        given = [bias for bias in (*args, *kwargs.values()) if bias is not None]
        if not given:
            return Beside()
        if len(given) > 1 or given[0].dim() not in (3, 4) or given[0].shape[:-3] not in ((), (1,)):
            raise self.refused("a bias of pairs must be [H, N, N] or [1, H, N, N], the same for all images")
        return Beside(given[0])


class BeitBlock(PairBlock):
    """BEiT's block: LayerScale is a parameter, or nothing."""

    _tome_row = Row(BeitAttention(), scale1="gamma_1", scale2="gamma_2")


class RelPosBlock(PairBlock):
    """timm's RelPosBlock."""

    _tome_row = Row(RelPosAttention())


class ResPostRelPosBlock(PairBlock):
    """timm's block that normalises its branches, with relative positions."""

    _tome_row = Row(RelPosAttention(), scale1=None, scale2=None, is_post=True)


BLOCKS: dict[str, type[MergingBlock]] = {
    "beit.Block": BeitBlock,
    "vision_transformer_relpos.RelPosBlock": RelPosBlock,
    "vision_transformer_relpos.ResPostRelPosBlock": ResPostRelPosBlock,
}
MODELS: dict[str, type[TimmModel] | str] = {
    "beit.Beit": TimmModel,
    "vision_transformer_relpos.VisionTransformerRelPos": TimmModel,
}
