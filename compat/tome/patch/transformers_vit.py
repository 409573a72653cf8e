"""transformers' Vision Transformers: ViT, DeiT, ViT-MAE, VideoMAE, I-JEPA, DINOv2 and 3, CLIP, SigLIP 1 and 2.

Only types that are known by name, with the parts that they are known to have, are swapped: a change in transformers
ends in an error instead of a model that is quietly wrong. Text towers and decoders, whose layers are of the same
classes, stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.ends import swap_ends
from tome.patch.model import PatchedModel, begin, hold
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, base_of, check_block, check_own, name_of, swap
from tome.patch.transformers_layers import (
    GATED_MLPS,
    CLIPBlock,
    Dino3Block,
    DinoBlock,
    Siglip2Block,
    TransformersBlock,
    ViTBlock,
    gated,
)
from tome.patch.transformers_refused import why_refused
from tome.patch.transformers_videomae import VideoMAEBlock
from tome.tokens import restored

OLDEST = "5.19"  # that names the parts as below


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
_DINOV3 = "dinov3_vit.modeling_dinov3_vit.DINOv3ViT"
LAYERS: dict[str, tuple[type[TransformersBlock], str]] = {  # the mixin, and the class of the attention
    "vit.modeling_vit.ViTLayer": (ViTBlock, "ViTAttention"),
    "deit.modeling_deit.DeiTLayer": (ViTBlock, "DeiTAttention"),
    "vit_mae.modeling_vit_mae.ViTMAELayer": (ViTBlock, "ViTMAEAttention"),
    "ijepa.modeling_ijepa.IJepaLayer": (ViTBlock, "IJepaAttention"),
    f"{_DINOV2}Layer": (DinoBlock, "Dinov2Attention"),
    f"{_REGISTERS}Layer": (DinoBlock, "Dinov2WithRegistersAttention"),
    f"{_DINOV3}Layer": (Dino3Block, "DINOv3ViTAttention"),
    "clip.modeling_clip.CLIPEncoderLayer": (CLIPBlock, "CLIPAttention"),
    "siglip.modeling_siglip.SiglipEncoderLayer": (CLIPBlock, "SiglipAttention"),
    "siglip2.modeling_siglip2.Siglip2EncoderLayer": (Siglip2Block, "Siglip2Attention"),
    "videomae.modeling_videomae.VideoMAELayer": (VideoMAEBlock, "VideoMAEAttention"),
}
TOWERS = {
    "vit.modeling_vit.ViTModel": Tower("layers", 1),
    "deit.modeling_deit.DeiTModel": Tower("layers", 2),
    "vit_mae.modeling_vit_mae.ViTMAEModel": Tower("layers", 1, is_any_size=True),  # most patches are masked
    "ijepa.modeling_ijepa.IJepaModel": Tower("layers", 0),
    "clip.modeling_clip.CLIPVisionModel": Tower("encoder.layers", 1, "embeddings", "post_layernorm"),
    "siglip.modeling_siglip.SiglipVisionModel": Tower("encoder.layers", 0, "embeddings", "post_layernorm"),
    "siglip2.modeling_siglip2.Siglip2VisionModel": Tower("encoder.layers", 0, "embeddings", "post_layernorm", True),
    "videomae.modeling_videomae.VideoMAEModel": Tower("encoder.layer", 0, "embeddings"),
    f"{_DINOV3}Model": Tower("model.layer", 1, norm="norm", is_any_size=True),
    f"{_DINOV3}Backbone": Tower("model.layer", 1, norm="norm", is_any_size=True),
    f"{_DINOV2}Model": Tower("encoder.layer", 1, is_any_size=True),
    f"{_DINOV2}Backbone": Tower("encoder.layer", 1, is_any_size=True),
    f"{_REGISTERS}Model": Tower("encoder.layer", 1, is_any_size=True),
    f"{_REGISTERS}Backbone": Tower("encoder.layer", 1, is_any_size=True),
}
MASKS = ("attention_mask", "pixel_attention_mask")
TIMM_WRAPPER = "timm_wrapper.modeling_timm_wrapper.TimmWrapper"  # with a head, or without one
SCALES = {f"{_DINOV2}LayerScale", f"{_REGISTERS}LayerScale", f"{_DINOV3}LayerScale"}
DROP_PATHS = {f"{_DINOV2}DropPath", f"{_REGISTERS}DropPath", "dinov3_vit.modeling_dinov3_vit.Dinov3ViTDropPath"}


def _name(kind: type) -> str:
    return name_of(kind, "transformers.models.")


def _tower(module: object) -> Tower | None:
    return next((TOWERS[name] for name in map(_name, type(module).__mro__) if name in TOWERS), None)


def knows(model: nn.Module) -> bool:
    """Whether the model is one of TOWERS, or a wrapper around one of timm's."""
    return _tower(model) is not None or _name(type(model)).startswith(TIMM_WRAPPER)


def known_models() -> list[str]:
    """The names of TOWERS, without their homes."""
    return sorted(name.rpartition(".")[2] for name in TOWERS)


def _records(hook: Any) -> bool:
    """Whether a hook that recording hidden states or attentions has left behind records something in this pass."""
    active = hook.__globals__.get("_active_collector")
    free = hook.__code__.co_freevars
    if active is None or "key" not in free:
        return True
    collected = active.get()
    return bool(collected) and hook.__closure__[free.index("key")].cell_contents in collected


plain.RECORDERS[
    "transformers.utils.output_capturing", "install_output_capuring_hook.<locals>.output_capturing_hook"
] = _records


class TransformersTower(PatchedModel):
    """The model whose layers are patched. What it returns of its middle layers is on the full grid."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; not ``forward``, whose signature is asked for the names of inputs."""
        masks = [kwargs[name] for name in MASKS if kwargs.get(name) is not None]
        masks += [other for other in args[1:] if isinstance(other, Tensor)]
        if not masks:
            kwargs["tome_unmasked"] = True
        elif any(mask.dim() > 2 for mask in masks if isinstance(mask, Tensor)) and self._tome_merges:
            raise UnsupportedModelError(
                f"{type(self).__name__} merges under a mask of padding [B, N] only: another tells queries apart"
            )
        output = super().__call__(*args, **kwargs)
        values = output.values() if isinstance(output, dict) else output
        is_flat = isinstance(output, (dict, tuple)) and all(isinstance(value, Tensor) for value in values)
        return output if is_flat else restored(output)

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
        reason = why_refused(model)
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} must hold one of {', '.join(known_models())}; "
            f"found {len(towers)}" + (f". {reason}" if reason else "")
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
            plain.INERT_IN_EVAL[type(part)] = plain.STOCHASTIC_DEPTH
        elif type(part).__name__ in GATED_MLPS:
            plain.GATED[type(part)] = gated
    for layer in layers:
        kind = LAYERS[_name(base_of(layer))][0]
        for path_inside, inside in kind._tome_inner.items():
            if inside.mixin is not None:
                swap(layer.get_submodule(path_inside), inside.mixin)
        swap(layer, kind)
    swap_ends(inner.modules(), getattr(inner, tower.norm, None), settings.backend)
    begin(inner, TransformersTower, settings)
    hold(model, path)
    return model


def _check_layer(name: str, layer: Any) -> None:
    check_block(name, layer)
    known = LAYERS.get(_name(base_of(layer)))
    if known is None:
        raise UnsupportedModelError(f"{name}: {type(layer).__name__} is not supported")
    row, attn = known[0]._tome_row, layer._modules.get(known[0]._tome_row.attn)
    _check_parts(name, layer, type(layer).__name__, row.children)
    _check_parts(f"{name}.{row.attn}", attn, known[1], row.attention.parts)
    for path, inside in known[0]._tome_inner.items():
        _check_parts(f"{name}.{path}", layer.get_submodule(path), inside.kind, inside.parts)


def _check_parts(name: str, module: Any, kind: str, names: Collection[str]) -> None:
    if type(module).__name__ != kind:
        raise UnsupportedModelError(f"{name}: {type(module).__name__} is not supported")
    if (found := set(module._modules)) != set(names):
        raise UnsupportedModelError(
            f"{name}: {type(module).__name__} has the parts {sorted(found)}, not {sorted(names)} as in transformers "
            f"{OLDEST}"
        )
