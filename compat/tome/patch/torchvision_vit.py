"""torchvision's VisionTransformer. Its types are known by name, so that torchvision is not imported for them."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tome.patch.block import MergingBlock
from tome.patch.ends import is_last_norm, swap_ends
from tome.patch.mha import MhaBlock, MultiheadAttention, check
from tome.patch.model import PatchedModel, ReadByForward, begin
from tome.patch.row import ModelSettings, Row
from tome.patch.swap import UnsupportedModelError, base_of, check_own, name_of, swap

HOME = "torchvision.models.vision_transformer"
MODELS = {f"{HOME}.VisionTransformer"}


class EncoderBlock(MhaBlock):
    """torchvision's block."""

    _tome_row = Row(MultiheadAttention(), *("self_attention", "ln_1", None, "dropout", "mlp", "ln_2", None, None))


class LayersInEncoder(PatchedModel):
    """A model with its layers in an encoder."""

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        return layers(self)  # type: ignore[return-value]


class TorchvisionModel(ReadByForward, LayersInEncoder):
    """torchvision's model, with a class token."""

    _tome_before = ("conv_proj",)

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        return 1, True, False

    def _tome_length(self) -> int | None:
        return cast(Any, self).seq_length

    def _tome_reads_prefix(self, last: MergingBlock) -> bool:
        encoder = cast(Any, self).encoder
        return (
            name_of(type(encoder)) == f"{HOME}.Encoder"
            and type(encoder.layers) is nn.Sequential
            and encoder.layers[-1] is last
            and is_last_norm(encoder.ln)
            and self._tome_is_hosts(f"{HOME}.VisionTransformer", (), (encoder, encoder.layers, encoder.ln))
        )


def layers(model: Any) -> dict[str, nn.Module]:
    """The blocks by their names."""
    return {f"encoder.layers.{name}": layer for name, layer in model.encoder.layers.named_children()}


def knows(model: nn.Module) -> bool:
    """Whether the model, or what its class is made from, is one of MODELS."""
    return any(name_of(kind) in MODELS for kind in type(model).__mro__)


def known_models() -> list[str]:
    """The names of MODELS, without their homes."""
    return sorted(name.rpartition(".")[2] for name in MODELS)


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.torchvision`."""
    if not knows(model):
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} is not torchvision's VisionTransformer"
        )
    install(cast(Any, model), EncoderBlock, TorchvisionModel, {f"{HOME}.EncoderBlock"}, settings)
    return model


def install(
    model: Any, mixin: type[MergingBlock], kind: type[PatchedModel], known: set[str], settings: ModelSettings
) -> None:
    """Patch a model that has torchvision's parts, and blocks of a class whose name, or name with its home, is known."""
    check_own("", model)

    def mixin_of(block: nn.Module) -> type[MergingBlock] | None:
        base = base_of(block)
        return mixin if known & {base.__qualname__, name_of(base)} else None

    check(layers(model), mixin_of)
    for layer in layers(model).values():
        swap(layer, mixin)
    swap_ends([getattr(model, "conv_proj", None)], getattr(model.encoder, "ln", None), settings.backend)
    begin(model, kind, settings)
