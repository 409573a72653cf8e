"""The layers of transformers' Vision Transformers: the names of their parts, and what each kind of attention does."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation, GELUTanh, QuickGELUActivation

from tome import ops
from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, NotPlain, Reading
from tome.patch.rotary import rows
from tome.patch.row import Attention, Beside, Call, Place, Qkv, Row
from tome.patch.swap import Patched, UnsupportedModelError
from tome.tokens import GatedParts, MlpParts, Tokens

plain.GELUS |= {GELUTanh: lambda _: "tanh", GELUActivation: lambda _: "erf", QuickGELUActivation: lambda _: "quick"}
plain.SILUS[type(ACT2FN["silu"])] = None
GATED_MLPS = {"Dinov2SwiGLUFFN", "Dinov2WithRegistersSwiGLUFFN", "DINOv3ViTGatedMLP"}  # gate_proj, up_proj, down_proj
MLPS = (("fc1", "activation_fn", "fc2"), ("up_proj", "act_fn", "down_proj"))


def gated(reading: Reading, mlp: Any) -> GatedParts:
    """What a gated MLP computes with."""
    reading.part(mlp, "act_fn", plain.SILUS)
    layers = reading.linear(mlp, "gate_proj"), reading.linear(mlp, "up_proj")
    return GatedParts(layers, False, None, reading.linear(mlp, "down_proj"))


def heads(made: Tensor, head_dim: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return made.unflatten(2, (-1, head_dim)).transpose(1, 2)


class SeparateAttention(Attention):
    """A linear layer for each of q, k and v, and one behind."""

    def __init__(self, heads: str, scale: str, dropout: str, proj: str) -> None:
        self.heads, self.scale, self.dropout, self.proj = heads, scale, dropout, proj
        self.parts = frozenset({"q_proj", "k_proj", "v_proj", proj})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        made = (call(part, y) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        return cast(Qkv, tuple(heads(part, attn.head_dim) for part in made))

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, getattr(attn, self.proj)(seen.transpose(1, 2).flatten(2)))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        if bias is not None and (kernel := attn.config._attn_implementation) not in ("eager", "sdpa"):
            raise UnsupportedModelError(
                f"{type(attn).__name__} is watched and {kernel!r} takes no log sizes as its mask: use 'sdpa' or 'eager'"
            )
        return cast(Tensor, attn(y, attention_mask=bias, **self.positions(place))[0])

    def positions(self, place: Place) -> dict[str, Any]:
        """What a call of the module is to be told of positions."""
        return {}

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        return getattr(attn, self.heads), getattr(attn, self.scale), attn.training * getattr(attn, self.dropout)

    def reads_linearly(self, attn: Any) -> bool:
        return all(type(part) is nn.Linear for part in attn.children())

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        return AttentionParts(None, reading.linear(attn, self.proj))


class Turns(NamedTuple):
    """Rotary positions of the original tokens, as DINOv3 gives them to each layer."""

    cos: Tensor  # [N - P, D]
    sin: Tensor
    prefix: int  # P leading tokens stand nowhere


class RotaryAttention(SeparateAttention):
    """DINOv3's, which turns queries and keys of the patches by where they stand."""

    is_placed = is_rotary = True

    def placed(self, attn: Any, qkv: Qkv, place: Place) -> Qkv:
        q, k, v = qkv
        cos, sin, prefix = place.given
        turned = ops.rotate(q, k, torch.cat((sin, cos), dim=-1), place.home, prefix, True)
        # Under autocast the table is float32; attention would round to the dtype of v.
        return turned[0].to(v.dtype), turned[1].to(v.dtype), v

    def positions(self, place: Place) -> dict[str, Any]:
        cos, sin, prefix = place.given
        return {"position_embeddings": (rows(cos, place, prefix), rows(sin, place, prefix))}


class Inner(NamedTuple):
    """A part of a layer's part that merging reads past its ``forward``: its class, its children, and its patch."""

    kind: str
    parts: frozenset[str]
    mixin: type[Patched] | None = None


class TransformersBlock(MergingBlock):
    """A layer of transformers: MLPs of Linear, activation, Linear; others are called."""

    _tome_inner: ClassVar[dict[str, Inner]] = {}  # by its path

    def forward(self, x: Tensor | Tokens, *args: Any, tome_unmasked: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which makes a mask of ones while a model is traced, asked for or not."""
        if tome_unmasked:
            args = tuple(None for _ in args)
            kwargs |= {"attention_mask": None} if "attention_mask" in kwargs else {}
        return super().forward(x, *args, **kwargs)

    def beside(self, attention_mask: Any = None, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Beside:
        """Masks and positions are refused. What is to be recorded comes as flags, which concern hooks."""
        for name, given in kwargs.items():
            if isinstance(given, Tensor):
                raise self.refused(f"a patched block takes no {name}: merging moves the tokens")
        return super().beside(attention_mask, *args)

    def mlp_reads_linearly(self) -> bool:
        mlp = getattr(self, self._tome_row.mlp)
        return {type(part) for part in mlp.children()} <= {nn.Linear, *plain.GELUS, *plain.SILUS}

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        for fc1, gelu, fc2 in MLPS:
            if set(mlp._modules) == {fc1, gelu, fc2}:
                first, second = reading.linear(mlp, fc1), reading.linear(mlp, fc2)
                return MlpParts(first, reading.gelu(mlp, gelu), second)
        raise NotPlain(f"{self._tome_row.mlp} is a {type(mlp).__name__}")


class ViTBlock(TransformersBlock):
    """The layer of ViT and what follows it."""

    _tome_row = Row(
        SeparateAttention("num_attention_heads", "scaling", "attention_dropout", "o_proj"),
        *("attention", "layernorm_before", None, "dropout", "mlp", "layernorm_after", None, "dropout"),
    )


class DinoBlock(TransformersBlock):
    """The layer of DINOv2, with LayerScale."""

    _tome_row = Row(
        ViTBlock._tome_row.attention,
        *("attention", "norm1", "layer_scale1", "drop_path", "mlp", "norm2", "layer_scale2", "drop_path"),
    )


class Dino3Block(TransformersBlock):
    """The layer of DINOv3: DINOv2's, with rotary positions."""

    _tome_row = DinoBlock._tome_row._replace(attention=RotaryAttention("num_heads", "scaling", "dropout", "o_proj"))

    def beside(self, attention_mask: Any = None, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Beside:
        super().beside(attention_mask, *args, **kwargs)
        cos, sin = position_embeddings
        return Beside(Turns(cos, sin, self._tome.prefix))


class CLIPBlock(TransformersBlock):
    """The layer of CLIP and SigLIP."""

    _tome_row = Row(
        SeparateAttention("num_heads", "scale", "dropout", "out_proj"),
        *("self_attn", "layer_norm1", None, None, "mlp", "layer_norm2", None, None),
    )


class Siglip2Block(CLIPBlock):
    """The layer of SigLIP 2, whose images may be padded."""

    def beside(self, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Beside:
        super().beside(None, *args, **kwargs)
        if attention_mask is None:
            return Beside()
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
            raise self.refused(f"the {type(attention_mask).__name__} is no mask [B, 1, N, N]: use 'sdpa' or 'eager'")
        seen = attention_mask[:, 0, 0]  # the same for each query
        return Beside(None, seen if seen.dtype is torch.bool else seen == 0)
