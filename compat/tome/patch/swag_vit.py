"""SWAG's VisionTransformer, as torch.hub loads it: torchvision's parts, with tokens [N, B, C].

Its module's name depends on how it was loaded, so it is known by the names of its classes and parts.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tome.patch.plain import has_hooks
from tome.patch.row import Beside, ModelSettings
from tome.patch.swap import UnsupportedModelError
from tome.patch.torchvision_vit import EncoderBlock, LayersInEncoder, install


class SequenceFirstBlock(EncoderBlock):
    """The block of tokens [N, B, C]."""

    _tome_batch_first = False

    def beside(self, *args: Any, **kwargs: Any) -> Beside:
        if has_hooks(self):
            raise self.refused("it has hooks, which would see tokens [B, N, C]: hook a part of it, or set r = 0")
        return super().beside(*args, **kwargs)


class SwagModel(LayersInEncoder):
    """SWAG's model, with a class token or the mean of all tokens behind it."""

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        has_class = getattr(self, "class_token", None) is not None
        return int(has_class), has_class, False

    def _tome_length(self) -> int | None:
        position = getattr(cast(Any, self).encoder, "pos_embedding", None)
        return None if position is None else position.shape[0]


def knows(model: nn.Module) -> bool:
    """Whether the model has the name and the parts of SWAG's, and its tokens come as [N, B, C]."""
    named = any(kind.__name__ == "VisionTransformer" for kind in type(model).__mro__)
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if not named or not isinstance(layers, nn.Sequential | nn.ModuleList):
        return False
    parts, blocks = EncoderBlock._tome_row.children, list(layers.children())
    return len(blocks) > 0 and all(
        set(block._modules) == parts and getattr(block.self_attention, "batch_first", None) is False for block in blocks
    )


def known_models() -> list[str]:
    """What :func:`knows` goes by."""
    return ["VisionTransformer"]


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.swag`."""
    if not knows(model):
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} is not SWAG's VisionTransformer, whose encoder.layers "
            f"have the parts {sorted(EncoderBlock._tome_row.children)} and take tokens [N, B, C]"
        )
    install(cast(Any, model), SequenceFirstBlock, SwagModel, {"EncoderBlock"}, settings)
    return model
