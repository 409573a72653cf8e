"""timm's isotropic models: what they share. Each family's blocks stand in a file of their own.

Only types that are known to the letter are swapped, so a change in timm ends in an error instead of a model that is
quietly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from timm.layers import DropPath, LayerNorm
from timm.layers.activations import GELU, GELUTanh
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import LayerScale
from torch import nn

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.ends import swap_ends
from tome.patch.model import Intermediates, hold, pass_on
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, base_of, check_block, check_own, check_parts, swap

# Each has tables by "file.Class": BLOCKS, and MODELS, where a name says in which attribute the model itself stands.
FAMILIES = ("timm_vit", "timm_eva", "timm_naflex", "timm_gemma")

plain.NORMS[LayerNorm] = plain.INERT_IN_EVAL[DropPath] = None
plain.SCALES[LayerScale] = "gamma"
plain.GELUS[GELU], plain.GELUS[GELUTanh] = (lambda gelu: False), (lambda gelu: True)

pass_on(FeatureGetterNet, "model")


class TimmModel(Intermediates):
    """A patched model of timm that runs ``blocks`` over its tokens."""

    _tome_variants: Mapping[type[MergingBlock], type[MergingBlock]] = {}  # what its blocks become instead of BLOCKS's

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        return {f"blocks.{i}": block for i, block in enumerate(cast(Any, self).blocks)}

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        tokens = (getattr(self, name, None) is not None for name in ("cls_token", "dist_token"))
        return getattr(self, "num_prefix_tokens", 0), *tokens  # type: ignore[return-value]

    def _tome_length(self) -> int | None:
        if getattr(self, "dynamic_img_size", False):
            return None
        patches = getattr(getattr(self, "patch_embed", None), "num_patches", None)
        return None if patches is None else patches + self._tome_prefix()[0]

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As in timm, which may make a new convolution."""
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        _swap_parts(self)


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.timm`."""
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    host = _lookup("MODELS", inner)
    if host is None:
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} is not supported (known: {', '.join(known_models())} of "
            "timm and their subclasses). Patch before torch.compile, DataParallel and other wrappers"
        )
    check_own("", inner)
    outer, path = inner, ""
    if isinstance(host, str):
        inner, path = getattr(inner, host), host
        host = _lookup("MODELS", inner)
        check_own(path, inner)
    for i, block in enumerate(inner.blocks):
        _check_block(f"blocks.{i}", block)
    for block in inner.blocks:
        mixin = cast(type[MergingBlock], _lookup("BLOCKS", base_of(block)))
        swap(block, host._tome_variants.get(mixin, mixin))
    _swap_parts(inner)
    swap(inner, host)
    inner._tome = settings
    inner.r = 0
    hold(outer, path)
    return model


def knows(model: nn.Module) -> bool:
    """Whether the model is one that can be patched, if its blocks are known too."""
    return _lookup("MODELS", model.model if isinstance(model, FeatureGetterNet) else model) is not None


def known_models() -> list[str]:
    """The names of the classes of timm that can be patched, subclasses left out."""
    return [name.rpartition(".")[2] for family in FAMILIES for name in import_module(f"tome.patch.{family}").MODELS]


def _lookup(table: str, thing: object) -> Any:
    """What a family says of a class (of a block: of exactly this one), or of an instance's class and those above it."""
    kinds = (thing,) if isinstance(thing, type) else type(thing).__mro__
    names = [f"{kind.__module__}.{kind.__qualname__}".removeprefix("timm.models.") for kind in kinds]
    tables = [getattr(import_module(f"tome.patch.{family}"), table) for family in FAMILIES]
    return next((table[name] for name in names for table in tables if name in table), None)


def _swap_parts(model: Any) -> None:
    swap_ends([getattr(getattr(model, "patch_embed", None), "proj", None)], getattr(model, "norm", None))


def _check_block(name: str, block: Any) -> None:
    check_block(name, block)
    mixin = _lookup("BLOCKS", base_of(block))
    if mixin is None:
        raise UnsupportedModelError(f"{name}: {type(block).__name__} is not supported")
    row = mixin._tome_row
    check_parts(name, block, row.children)
    attn = getattr(block, row.attn)
    if type(attn).__name__ not in row.attention.names:
        raise UnsupportedModelError(f"{name}.{row.attn}: {type(attn).__name__} is not supported")
    check_parts(f"{name}.{row.attn}", attn, row.attention.parts)
