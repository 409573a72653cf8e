"""Give an existing model token merging, in place: one function per library that models come from.

Each returns the model, whose ``r`` then takes a schedule (:mod:`tome.schedule`). :func:`unpatch` takes it back.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import nn

from tome.matching import Rule, chosen
from tome.patch.model import merged
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, unpatch
from tome.tokens import Tokens

__all__ = [
    "Rule",
    "Tokens",
    "UnsupportedModelError",
    "auto",
    "mae",
    "merged",
    "open_clip",
    "swag",
    "timm",
    "torchvision",
    "transformers",
    "unpatch",
]

ARGUMENTS = """
    Args:
        model: the model; changed in place.
        trace_source: keep the slot map of each forward pass for ``model._tome_info["source"]``.
        prop_attn: weigh each key by its size in attention (section 3, "Tracking Token Size"); None is the default of
            the model's own function.
        use_cuda_ext: True forces the CUDA backend, False the reference; None leaves it to :mod:`tome.backend`.
        matching: who decides which tokens merge: "bipartite" (section 3), "random", "kth" (an entry k of the schedule
            then keeps one token of k), or a function ``(keys, r, prefix) -> slot`` from keys [B, H, N, D] to int32
            [B, N] onto [0, N - r), that keeps the first ``prefix`` tokens in their places.

    Returns:
        The same model with ``model.r = 0``: nothing is merged until ``r`` is set.

    Raises:
        UnsupportedModelError: a model, block or attention that is not understood, with its name and the reason.
        ValueError, TypeError: a ``matching`` that is neither a known name nor a function.

    """


class Patch(Protocol):
    """A function that patches the models of one library."""

    def __call__(
        self,
        model: nn.Module,
        trace_source: bool = ...,
        prop_attn: bool | None = ...,
        use_cuda_ext: bool | None = ...,
        matching: str | Rule = ...,
    ) -> nn.Module:
        """Patch the model."""


def _patch(name: str, host: str, summary: str, by_size: bool | None = True) -> Patch:
    def patch(
        model: nn.Module,
        trace_source: bool = False,
        prop_attn: bool | None = by_size,
        use_cuda_ext: bool | None = None,
        matching: str | Rule = "bipartite",
    ) -> nn.Module:
        backend = None if use_cuda_ext is None else ("cuda" if use_cuda_ext else "reference")
        rule = chosen(matching)
        # The library, and what comes with it, loads only when a model of it is patched.
        home = import_module(f"tome.patch.{host}")
        weighs = by_size if prop_attn is None else prop_attn
        settings = ModelSettings(trace_source, home.weighs_sizes(model) if weighs is None else weighs, backend, rule)
        patched: nn.Module = home.apply_patch(model, settings)
        return patched

    patch.__name__ = patch.__qualname__ = name
    patch.__doc__ = f"{summary}\n{ARGUMENTS}"
    return patch


timm = _patch(
    "timm",
    "timm_host",
    "Patch a Vision Transformer of timm, or the feature extractor that ``features_only=True`` makes of one.",
)
transformers = _patch(
    "transformers",
    "transformers_vit",
    """Patch the vision tower of a model of transformers 5.19 or newer (tested up to 5.24).

    Its towers are ViT, DeiT, ViT-MAE, VideoMAE, I-JEPA, DINOv2 (with or without registers), DINOv3 (its ViT), CLIP,
    SigLIP and SigLIP 2. The model may have a head or a text tower around one. Text towers and decoders stay as they
    are. Hidden states are on the full grid; attentions are those of the merged tokens. SigLIP 2's padding merges with
    nothing as long as other pairs are left, and weighs nothing; elsewhere a mask is refused.
    """,
)
torchvision = _patch(
    "torchvision", "torchvision_vit", "Patch a VisionTransformer of torchvision, with whatever weights and stem."
)
open_clip = _patch(
    "open_clip",
    "open_clip_vit",
    """Patch the vision tower of a model of open_clip: its own VisionTransformer, or timm's in its TimmModel.

    CLIP, CustomTextCLIP and CoCa then have ``r``; their text towers stay as they are.
    """,
)
swag = _patch(
    "swag",
    "swag_vit",
    """Patch SWAG's VisionTransformer, as torch.hub loads it.

    torchvision's (:func:`torchvision`) has the same weights.
    """,
)
mae = _patch(
    "mae",
    "timm_host",
    """Patch MAE's VisionTransformer for fine-tuning, a class over timm's.

    Keys are not weighed by their sizes unless ``prop_attn`` is True: such models were trained without.
    """,
    by_size=False,
)
auto = _patch(
    "auto",
    "hosts",
    """Patch a model of any library that is known, by what its class comes from, or the one such model in a wrapper.

    A wrapper of any class then has ``r``, which it passes on. ``prop_attn`` is what the model's own function would
    take: False for MAE's class, else True.
    """,
    by_size=None,
)
