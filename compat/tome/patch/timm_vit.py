"""timm's VisionTransformer and what is built on it: ViT, DeiT, DeiT-3, CLIP, SigLIP, MAE, DINOv2, registers, hybrids.

Only types that are known to the letter are swapped, so a change in timm ends in an error instead of a model that is
quietly wrong.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import DropPath, GluMlp, LayerNorm, Mlp, SwiGLU
from timm.layers.activations import GELU, GELUTanh
from timm.models import vision_transformer as timm_vit
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Block, LayerScale, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.ends import swap_ends
from tome.patch.model import PatchedModel, pass_on
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks, through
from tome.patch.row import Attention, Call, ModelSettings, Qkv, Row
from tome.patch.swap import UnsupportedModelError, base_of, check_block, check_own, swap
from tome.tokens import MlpParts, restored

plain.NORMS[LayerNorm] = plain.INERT_IN_EVAL[DropPath] = None
plain.SCALES[LayerScale] = "gamma"
plain.GELUS[GELU], plain.GELUS[GELUTanh] = (lambda gelu: False), (lambda gelu: True)

BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class TimmAttention(Attention):
    """timm.layers.Attention: one linear layer for q, k, v; a norm, a gate and a projection behind."""

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        batch, n, _ = y.shape
        qkv = call(attn.qkv, y).reshape(batch, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        # Under autocast the norms return float32; attention would round it to the dtype of v.
        return call(attn.q_norm, q).to(v.dtype), call(attn.k_norm, k).to(v.dtype), v

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        x = seen.transpose(1, 2).flatten(2)
        norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
        x = x if norm is None else through(norm, x)
        if gate is not None:
            x = x * gate(y).sigmoid()
        return through(attn.proj_drop, attn.proj(x))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, attn(y) if bias is None else attn(y, attn_mask=bias))

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn) or has_hooks(attn.attn_drop)

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        dropout_p = attn.attn_drop.p if attn.training else 0.0
        return attn.num_heads, None if attn.fused_attn else attn.scale, dropout_p

    def reads_linearly(self, attn: Any) -> bool:
        return type(attn.qkv) is nn.Linear

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        if attn._modules.get("gate") is not None:
            raise NotPlain("attention has a gate")
        reading.inert(attn, "norm", "proj_drop", "attn_drop")
        try:
            reading.inert(attn, "q_norm", "k_norm")
            qkv = reading.linear(attn, "qkv")
        except NotPlain:
            qkv = None
        return AttentionParts(qkv, reading.linear(attn, "proj"))


class TimmBlock(MergingBlock):
    """timm's pre-norm Block."""

    _tome_row = Row(TimmAttention())

    def mlp_reads_linearly(self) -> bool:
        return type(self.mlp) in (Mlp, GluMlp, SwiGLU)

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        if type(mlp) is not Mlp:
            raise NotPlain(f"mlp is a {type(mlp).__name__}")
        reading.inert(mlp, "drop1", "norm", "drop2")
        return MlpParts(reading.linear(mlp, "fc1"), reading.is_tanh(mlp, "act"), reading.linear(mlp, "fc2"))


class TimmResPostBlock(TimmBlock):
    """timm's block that normalises its branches."""

    _tome_row = Row(TimmAttention(), scale1=None, scale2=None, is_post=True)


BLOCKS: dict[type[nn.Module], type[MergingBlock]] = {Block: TimmBlock, ResPostBlock: TimmResPostBlock}


pass_on(FeatureGetterNet, "model")


class TimmViT(PatchedModel):
    """A patched VisionTransformer, or a subclass of it."""

    blocks: Any
    num_prefix_tokens: int

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks)}

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        return self.num_prefix_tokens, self.cls_token is not None, getattr(self, "dist_token", None) is not None

    def _tome_length(self) -> int | None:
        patches = None if self.dynamic_img_size else getattr(self.patch_embed, "num_patches", None)
        return None if patches is None else patches + self.num_prefix_tokens

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm: what it records of the blocks between is restored to the full grid."""
        return restored(super().forward_intermediates(*args, **kwargs))  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm; the schedule is spread over the blocks that are left."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self.r = self.r[: len(self.blocks)] if isinstance(self.r, list) else self.r
        return taken

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As in timm, which may make a new convolution."""
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        _swap_parts(self)


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.timm`."""
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    _check_model(inner)
    for block in inner.blocks:
        swap(block, BLOCKS[base_of(block)])
    _swap_parts(inner)
    swap(inner, TimmViT)
    inner._tome = settings
    inner.r = 0
    return model


def _swap_parts(model: Any) -> None:
    swap_ends([getattr(model.patch_embed, "proj", None)], model.norm)


def _check_model(model: Any) -> None:
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} is not supported (known: timm's VisionTransformer and "
            "its subclasses). Patch before torch.compile, DataParallel and other wrappers"
        )
    check_own("", model)
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        check_block(name, block)
        if base_of(block) not in BLOCKS:
            raise UnsupportedModelError(f"{name}: {type(block).__name__} is not supported")
        if type(block.attn) is not timm_vit.Attention:
            raise UnsupportedModelError(f"{name}.attn: {type(block.attn).__name__} is not supported")
        for part, module, known in ((name, block, BLOCK_PARTS), (f"{name}.attn", block.attn, ATTENTION_PARTS)):
            unknown = sorted({child for child, _ in module.named_children()} - known)
            if unknown:
                raise UnsupportedModelError(
                    f"{part}: {type(module).__name__} has parts that are not understood: {unknown}"
                )
