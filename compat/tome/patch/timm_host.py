"""timm's isotropic models: what they share. Each family's blocks stand in a file of their own.

Only types that are known to the letter are swapped, so a change in timm ends in an error instead of a model that is
quietly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, cast

from timm.layers import DropPath, GluMlp, LayerNorm, SwiGLU
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import LayerScale
from torch import nn

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.ends import swap_ends
from tome.patch.model import Intermediates, begin, hold, pass_on
from tome.patch.refusals import reason
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, base_of, check_block, check_own, check_parts, name_of, swap
from tome.tokens import GatedParts

# Each has tables by "file.Class": BLOCKS, and MODELS, where a name says in which attribute the model itself stands.
FAMILIES = ("timm_vit", "timm_eva", "timm_naflex", "timm_gemma", "timm_bias", "timm_parallel", "timm_cait")

plain.NORMS[LayerNorm], plain.INERT_IN_EVAL[DropPath] = None, plain.STOCHASTIC_DEPTH
plain.SCALES[LayerScale] = "gamma"
plain.GELUS |= {GELU: lambda _: "erf", GELUTanh: lambda _: "tanh", QuickGELU: lambda _: "quick"}


def _gated(reading: plain.Reading, mlp: Any) -> GatedParts:
    is_packed = type(mlp) is GluMlp
    reading.part(mlp, "act", plain.SILUS)
    reading.inert(mlp, "drop1", "drop2")
    has_norm = type(mlp.norm) in plain.NORMS
    if not has_norm:
        reading.inert(mlp, "norm")
    return GatedParts(
        tuple(reading.linear(mlp, name) for name in (("fc1",) if is_packed else ("fc1_g", "fc1_x"))),
        is_packed and mlp.gate_last,
        reading.norm(mlp, "norm") if has_norm else None,
        reading.linear(mlp, "fc2"),
    )


plain.GATED |= {GluMlp: _gated, SwiGLU: _gated}

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
        _swap_parts(self, self._tome.backend)


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.timm`."""
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    host = _lookup("MODELS", inner)
    if host is None:
        why = reason(type(inner)) or (
            f"known are {', '.join(known_models())} of timm and their subclasses. Patch before torch.compile, "
            "DataParallel and other wrappers"
        )
        raise UnsupportedModelError(f"{type(model).__module__}.{type(model).__name__} is not supported: {why}")
    check_own("", inner)
    outer, path = inner, ""
    if isinstance(host, str):
        inner, path = getattr(inner, host), host
        host = _lookup("MODELS", inner)
        check_own(path, inner)
    mixins = [_checked(f"blocks.{i}", block) for i, block in enumerate(inner.blocks)]
    for block, mixin in zip(inner.blocks, mixins, strict=True):
        swap(block, host._tome_variants.get(mixin, mixin))
    _swap_parts(inner, settings.backend)
    begin(inner, host, settings)
    hold(outer, path)
    return model


def knows(model: nn.Module) -> bool:
    """Whether the model is one that can be patched, if its blocks are known too."""
    return _lookup("MODELS", model.model if isinstance(model, FeatureGetterNet) else model) is not None


def known_models() -> list[str]:
    """The names of the classes of timm that can be patched, subclasses left out."""
    return [name.rpartition(".")[2] for family in FAMILIES for name in import_module(f"tome.patch.{family}").MODELS]


def _lookup(table: str, thing: object) -> Any:
    return next(_found(table, thing), None)


def _found(table: str, thing: object) -> Iterator[Any]:
    """What families say of a class (of a block: of exactly this one), or of an instance's class and those above it."""
    kinds = (thing,) if isinstance(thing, type) else type(thing).__mro__
    names = [name_of(kind, "timm.models.") for kind in kinds]
    tables = [getattr(import_module(f"tome.patch.{family}"), table) for family in FAMILIES]
    return (table[name] for name in names for table in tables if name in table)


def _swap_parts(model: Any, chosen: str | None) -> None:
    embedding = getattr(getattr(model, "patch_embed", None), "proj", None)
    swap_ends([embedding], getattr(model, "norm", None), chosen)


def _checked(name: str, block: Any) -> type[MergingBlock]:
    """How a block is patched, if all its parts are understood."""
    check_block(name, block)
    mixin = _mixin(name, block)
    row = mixin._tome_row
    check_parts(name, block, row.children)
    for path, attn in mixin.attentions(block).items():
        check_parts(f"{name}.{path}", attn, row.attention.parts)
    return mixin


def _mixin(name: str, block: Any) -> type[MergingBlock]:
    """How a block is patched: of the ways for its class the one that knows its attention."""
    unknown = f"{name}: {type(block).__name__}"
    for mixin in _found("BLOCKS", base_of(block)):
        others = {path: type(attn).__name__ for path, attn in mixin.attentions(block).items()}
        others = {path: kind for path, kind in others.items() if kind not in mixin._tome_row.attention.names}
        if not others:
            return cast(type[MergingBlock], mixin)
        unknown = "; ".join(f"{name}.{path}: {kind}" for path, kind in others.items())
    raise UnsupportedModelError(f"{unknown} is not supported")
