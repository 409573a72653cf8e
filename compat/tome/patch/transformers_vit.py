"""transformers' Vision Transformers: ViT, DeiT, ViT-MAE, I-JEPA, DINOv2 with and without registers, CLIP, SigLIP.

Only types that are known by name, with the parts that they are known to have, are swapped: a change in transformers
ends in an error instead of a model that is quietly wrong. Text towers and decoders, whose layers are of the same
classes, stay as they are.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.ends import swap_ends
from tome.patch.model import PatchedModel, hold
from tome.patch.plain import AttentionParts, NotPlain, Reading
from tome.patch.row import Attention, Beside, Call, ModelSettings, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError, base_of, check_block, check_own, swap
from tome.tokens import MlpParts, Tokens, restored

OLDEST = "5.19"  # that names the parts as below
plain.GELUS[GELUTanh] = lambda gelu: True
plain.GELUS[GELUActivation] = lambda gelu: False


class SeparateAttention(Attention):
    """A linear layer for each of q, k and v, and one behind."""

    def __init__(self, heads: str, scale: str, dropout: str, proj: str) -> None:
        self.heads, self.scale, self.dropout, self.proj = heads, scale, dropout, proj
        self.parts = frozenset({"q_proj", "k_proj", "v_proj", proj})

    def project(self, attn: Any, y: Tensor, call: Call, place: Place) -> Qkv:
        made = (call(part, y) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        return cast(Qkv, tuple(part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in made))

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, getattr(attn, self.proj)(seen.transpose(1, 2).flatten(2)))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        if bias is not None and (kernel := attn.config._attn_implementation) not in ("eager", "sdpa"):
            raise UnsupportedModelError(
                f"{type(attn).__name__} is watched and {kernel!r} takes no log sizes as its mask: use 'sdpa' or 'eager'"
            )
        return cast(Tensor, attn(y, attention_mask=bias)[0])

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        return getattr(attn, self.heads), getattr(attn, self.scale), attn.training * getattr(attn, self.dropout)

    def reads_linearly(self, attn: Any) -> bool:
        return all(type(part) is nn.Linear for part in attn.children())

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        return AttentionParts(None, reading.linear(attn, self.proj))


class TransformersBlock(MergingBlock):
    """A layer of transformers: MLPs of Linear, activation, Linear; others are called."""

    def forward(self, x: Tensor | Tokens, *args: Any, tome_unmasked: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which makes a mask of ones while a model is traced, asked for or not."""
        if tome_unmasked:
            args = tuple(None for _ in args)
            kwargs |= {"attention_mask": None} if "attention_mask" in kwargs else {}
        return super().forward(x, *args, **kwargs)

    def beside(self, *args: Any, **kwargs: Any) -> Beside:
        """A mask is refused. What is to be recorded of the model comes as flags, which concern hooks."""
        return super().beside(*(other for other in (*args, *kwargs.values()) if isinstance(other, Tensor)))

    def mlp_reads_linearly(self) -> bool:
        return {type(part) for part in cast(nn.Module, self.mlp).children()} <= {nn.Linear, *plain.GELUS}

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        if {name for name, _ in mlp.named_children()} != {"fc1", "activation_fn", "fc2"}:
            raise NotPlain(f"mlp is a {type(mlp).__name__}")
        fc1, fc2 = reading.linear(mlp, "fc1"), reading.linear(mlp, "fc2")
        return MlpParts(fc1, reading.is_tanh(mlp, "activation_fn"), fc2)


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


class CLIPBlock(TransformersBlock):
    """The layer of CLIP and SigLIP."""

    _tome_row = Row(
        SeparateAttention("num_heads", "scale", "dropout", "out_proj"),
        *("self_attn", "layer_norm1", None, None, "mlp", "layer_norm2", None, None),
    )


class Tower(NamedTuple):
    """A class of models that runs layers over the tokens of an image."""

    layers: str
    class_tokens: int  # 2: a distillation token too
    patches: str = "embeddings.patch_embeddings"
    norm: str = "layernorm"
    is_any_size: bool = False


# By the names behind transformers.models, so that none of them is imported before a user has.
_DINOV2 = "dinov2.modeling_dinov2.Dinov2"
_REGISTERS = "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters"
LAYERS: dict[str, tuple[type[MergingBlock], str]] = {  # the mixin, and the class of the attention
    "vit.modeling_vit.ViTLayer": (ViTBlock, "ViTAttention"),
    "deit.modeling_deit.DeiTLayer": (ViTBlock, "DeiTAttention"),
    "vit_mae.modeling_vit_mae.ViTMAELayer": (ViTBlock, "ViTMAEAttention"),
    "ijepa.modeling_ijepa.IJepaLayer": (ViTBlock, "IJepaAttention"),
    f"{_DINOV2}Layer": (DinoBlock, "Dinov2Attention"),
    f"{_REGISTERS}Layer": (DinoBlock, "Dinov2WithRegistersAttention"),
    "clip.modeling_clip.CLIPEncoderLayer": (CLIPBlock, "CLIPAttention"),
    "siglip.modeling_siglip.SiglipEncoderLayer": (CLIPBlock, "SiglipAttention"),
}
TOWERS = {
    "vit.modeling_vit.ViTModel": Tower("layers", 1),
    "deit.modeling_deit.DeiTModel": Tower("layers", 2),
    "vit_mae.modeling_vit_mae.ViTMAEModel": Tower("layers", 1, is_any_size=True),  # most patches are masked
    "ijepa.modeling_ijepa.IJepaModel": Tower("layers", 0),
    "clip.modeling_clip.CLIPVisionModel": Tower("encoder.layers", 1, "embeddings", "post_layernorm"),
    "siglip.modeling_siglip.SiglipVisionModel": Tower("encoder.layers", 0, "embeddings", "post_layernorm"),
    f"{_DINOV2}Model": Tower("encoder.layer", 1, is_any_size=True),
    f"{_DINOV2}Backbone": Tower("encoder.layer", 1, is_any_size=True),
    f"{_REGISTERS}Model": Tower("encoder.layer", 1, is_any_size=True),
    f"{_REGISTERS}Backbone": Tower("encoder.layer", 1, is_any_size=True),
}
TIMM_WRAPPER = "timm_wrapper.modeling_timm_wrapper.TimmWrapper"  # with a head, or without one
SCALES = {f"{_DINOV2}LayerScale", f"{_REGISTERS}LayerScale"}
DROP_PATHS = {f"{_DINOV2}DropPath", f"{_REGISTERS}DropPath"}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models.")


def _tower(module: object) -> Tower | None:
    return next((TOWERS[name] for name in map(_name, type(module).__mro__) if name in TOWERS), None)


def knows(model: nn.Module) -> bool:
    """Whether the model is one of TOWERS, or a wrapper around one of timm's."""
    return _tower(model) is not None or _name(type(model)).startswith(TIMM_WRAPPER)


def known_models() -> list[str]:
    """The names of TOWERS, without their homes."""
    return sorted(name.rpartition(".")[2] for name in TOWERS)


class TransformersTower(PatchedModel):
    """The model whose layers are patched. What it returns of its middle layers is on the full grid."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; not ``forward``, whose signature is asked for the names of inputs."""
        if kwargs.get("attention_mask") is None and not any(isinstance(other, Tensor) for other in args[1:]):
            kwargs["tome_unmasked"] = True
        return restored(super().__call__(*args, **kwargs))

    @property
    def _tome_tower(self) -> Tower:
        return cast(Tower, _tower(self))

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        path = self._tome_tower.layers
        return {f"{path}.{i}": layer for i, layer in enumerate(attrgetter(path)(self))}

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        count, config = self._tome_tower.class_tokens, cast(Any, self).config
        return count + getattr(config, "num_register_tokens", 0), count > 0, count > 1

    def _tome_length(self) -> int | None:
        tower = self._tome_tower
        patches = None if tower.is_any_size else getattr(attrgetter(tower.patches)(self), "num_patches", None)
        return None if patches is None else patches + self._tome_prefix()[0]


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.transformers`."""
    for path, module in model.named_modules():
        if _name(type(module)).startswith(TIMM_WRAPPER):
            from tome.patch import timm_host

            timm_host.apply_patch(module.timm_model, settings)
            hold(model, f"{path}.timm_model".lstrip("."))
            return model
    towers = [(name, module) for name, module in model.named_modules() if _tower(module) is not None]
    if len(towers) != 1:
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} must hold one of {', '.join(known_models())}; "
            f"found {len(towers)}"
        )
    path, inner = towers[0]
    tower = cast(Tower, _tower(inner))
    check_own("", model)
    check_own(path, inner)
    layers = attrgetter(tower.layers)(inner)
    for i, layer in enumerate(layers):
        _check_layer(f"{tower.layers}.{i}", layer)
    for part in layers.modules():
        if _name(type(part)) in SCALES:
            plain.SCALES[type(part)] = "lambda1"
        elif _name(type(part)) in DROP_PATHS:
            plain.INERT_IN_EVAL[type(part)] = None
    for layer in layers:
        swap(layer, LAYERS[_name(base_of(layer))][0])
    swap_ends(inner.modules(), getattr(inner, tower.norm, None))
    swap(inner, TransformersTower)
    inner._tome = settings
    inner.r = 0
    hold(model, path)
    return model


def _check_layer(name: str, layer: Any) -> None:
    check_block(name, layer)
    known = LAYERS.get(_name(base_of(layer)))
    if known is None:
        raise UnsupportedModelError(f"{name}: {type(layer).__name__} is not supported")
    row, attn = known[0]._tome_row, layer._modules.get(known[0]._tome_row.attn)
    if type(attn).__name__ != known[1]:
        raise UnsupportedModelError(f"{name}.{row.attn}: {type(attn).__name__} is not supported")
    for part, module, names in (
        (name, layer, row.children),
        (f"{name}.{row.attn}", attn, row.attention.parts),
    ):
        if (found := set(module._modules)) != set(names):
            raise UnsupportedModelError(
                f"{part}: {type(module).__name__} has the parts {sorted(found)}, not {sorted(map(str, names))} as in "
                f"transformers {OLDEST}"
            )
