"""timm's VisionTransformer and its kind: ViT, DeiT, DeiT-3, CLIP, SigLIP, MAE, DINOv2, registers, hybrids."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import VisionTransformer
from torch import Tensor, nn

from tome.patch.block import MergingBlock
from tome.patch.ends import is_last_norm
from tome.patch.model import ReadByForward
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks, is_inert, through
from tome.patch.row import Attention, Call, Place, Qkv, Row
from tome.patch.swap import base_of, name_of
from tome.patch.timm_host import TimmModel
from tome.tokens import Branch, Linear, MlpParts, Tokens

HOST = name_of(VisionTransformer)


class TimmAttention(Attention):
    """timm.layers.Attention: one linear layer for q, k, v; a norm, a gate and a projection behind."""

    names = frozenset({"Attention"})
    parts = frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        return self.heads(attn, call(attn.qkv, y), call)

    def biased(self, attn: Any, y: Tensor, call: Call) -> Tensor:
        """Q, k, v in one [B, N, 3 C], of a module that keeps the biases of q and v beside the weight."""
        if getattr(attn, "q_bias", None) is None:
            return call(attn.qkv, y)
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if not attn.qkv_bias_separate:
            return F.linear(y, attn.qkv.weight, bias)
        qkv = call(attn.qkv, y)
        qkv += bias
        return qkv

    def heads(self, attn: Any, qkv: Tensor, call: Call) -> Qkv:
        """Q, k, v in one [B, N, 3 C], each split into heads, and normed."""
        batch, n, _ = qkv.shape
        q, k, v = qkv.reshape(batch, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast the norms return float32; attention would round it to the dtype of v.
        return call(attn.q_norm, q).to(v.dtype), call(attn.k_norm, k).to(v.dtype), v

    def joined(self, attn: Any, seen: Tensor) -> Tensor:
        """What the heads have seen [B, H, N, D], side by side: [B, N, C]."""
        return seen.transpose(1, 2).flatten(2)

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        x = self.joined(attn, seen)
        norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
        x = x if norm is None else through(norm, x)
        if gate is not None:
            x = x * gate(y).sigmoid()
        return through(attn.proj_drop, attn.proj(x))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        return cast(Tensor, attn(y) if bias is None else attn(y, attn_mask=bias))

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn) or has_hooks(attn.attn_drop)

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        dropout_p = attn.attn_drop.p if attn.training else 0.0
        return attn.num_heads, None if attn.fused_attn else attn.scale, dropout_p

    def reads_linearly(self, attn: Any) -> bool:
        return type(attn.qkv) is nn.Linear

    def read_end(self, reading: Reading, attn: Any) -> Linear:
        """The projection; raises NotPlain where more stands between it and the heads."""
        if attn._modules.get("gate") is not None:
            raise NotPlain("attention has a gate")
        reading.inert(attn, "norm", "proj_drop", "attn_drop")
        return reading.linear(attn, "proj")

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        proj = self.read_end(reading, attn)
        try:
            reading.inert(attn, "q_norm", "k_norm")
            qkv = reading.linear(attn, "qkv")
        except NotPlain:
            qkv = None
        return AttentionParts(qkv, proj)


class TimmBlock(MergingBlock):
    """timm's pre-norm Block."""

    _tome_row = Row(TimmAttention())

    def mlp_reads_linearly(self) -> bool:
        return type(self.mlp) in (Mlp, GluMlp, SwiGLU)

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        if type(mlp) is not Mlp:
            raise NotPlain(f"mlp is a {type(mlp).__name__}")
        reading.inert(mlp, "drop1", "norm", "drop2")
        return MlpParts(reading.linear(mlp, "fc1"), reading.gelu(mlp, "act"), reading.linear(mlp, "fc2"))


class TimmResPostBlock(TimmBlock):
    """timm's block that normalises its branches."""

    _tome_row = Row(TimmAttention(), scale1=None, scale2=None, is_post=True)


class VisionTransformerModel(ReadByForward, TimmModel):
    """timm's VisionTransformer."""

    _tome_before = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")

    def _tome_reads_prefix(self, last: MergingBlock) -> bool:
        host = cast(Any, self)
        if host.global_pool != "token" or host.attn_pool is not None:
            return False
        methods = ("forward_features", "forward_head", "pool")
        return (
            type(host.blocks) is nn.Sequential
            and host.blocks[-1] is last
            and (type(host.norm) is nn.Identity or is_last_norm(host.norm))
            and self._tome_is_hosts(HOST, methods, (host.blocks, host.norm))
        )

    def _pos_embed(self, x: Tensor) -> Any:
        """As in timm; where kernels compute, one of them joins tokens and positions and norms them for the first block.

        PyTorch takes three passes over the tokens for it, two of which are slow: cat copies a class token that is
        expanded over the batch element by element.
        """
        host = cast(Any, self)
        if (
            x.dim() != 3
            or host.pos_embed is None
            or cast(Any, base_of(host))._pos_embed is not VisionTransformer._pos_embed
            or has_hooks(host.blocks)
            or not all(map(is_inert, (host.pos_drop, host.patch_drop, host.norm_pre)))
            or not host.blocks[0].gains(x)
        ):
            return super()._pos_embed(x)  # type: ignore[misc]
        extra = [token for token in (host.cls_token, host.reg_token) if token is not None]
        table = host.pos_embed
        if extra:
            count = 0 if host.no_embed_class else host.num_prefix_tokens
            first = extra[0] if len(extra) == 1 else torch.cat(extra, dim=1)
            table = torch.cat((first + table[:, :count] if count else first, table[:, count:]), dim=1)
        dtype = torch.promote_types(table.dtype, x.dtype)
        return Tokens(table.to(dtype).expand(x.shape[0], -1, -1), waiting=Branch(x))


BLOCKS: dict[str, type[MergingBlock]] = {
    "vision_transformer.Block": TimmBlock,
    "vision_transformer.ResPostBlock": TimmResPostBlock,
}
MODELS: dict[str, type[TimmModel] | str] = {"vision_transformer.VisionTransformer": VisionTransformerModel}
