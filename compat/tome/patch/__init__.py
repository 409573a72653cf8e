"""Give an existing model token merging, in place: one function per library that models come from.

Each returns the model, whose ``r`` then takes a schedule (:mod:`tome.schedule`). :func:`unpatch` takes it back.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import nn

from tome.matching import Rule, chosen
from tome.patch import grid
from tome.patch.model import merged
from tome.patch.own import QkvAttention
from tome.patch.own import apply_patch as _patch_own
from tome.patch.row import ModelSettings, Row
from tome.patch.swap import M, UnsupportedModelError, unpatch
from tome.tokens import Tokens

__all__ = [
    "QkvAttention",
    "Row",
    "Rule",
    "Tokens",
    "UnsupportedModelError",
    "auto",
    "custom",
    "diffusers",
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


def _backend(use_cuda_ext: bool | None) -> str | None:
    return None if use_cuda_ext is None else ("cuda" if use_cuda_ext else "reference")


def _patch(name: str, host: str, summary: str, by_size: bool | None = True) -> Patch:
    def patch(
        model: nn.Module,
        trace_source: bool = False,
        prop_attn: bool | None = by_size,
        use_cuda_ext: bool | None = None,
        matching: str | Rule = "bipartite",
    ) -> nn.Module:
        rule = chosen(matching)
        # The library, and what comes with it, loads only when a model of it is patched.
        home = import_module(f"tome.patch.{host}")
        weighs = by_size if prop_attn is None else prop_attn
        settings = ModelSettings(
            trace_source, home.weighs_sizes(model) if weighs is None else weighs, _backend(use_cuda_ext), rule
        )
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


def custom(
    model: nn.Module,
    blocks: str,
    row: Row,
    prefix: int = 1,
    trace_source: bool = False,
    prop_attn: bool = True,
    use_cuda_ext: bool | None = None,
    matching: str | Rule = "bipartite",
) -> nn.Module:
    """Patch a model of no library, whose parts the caller names (docs/own-model.md).

    Its blocks compute x + scale1(attn(norm1(x))) and then x + scale2(mlp(norm2(x))), or the same with the norms behind,
    on tokens [B, N, C], and are called one behind the other with nothing but the tokens.

    Args:
        model: the model; changed in place.
        blocks: the path of the list of its blocks.
        row: the names of the parts of a block.
        prefix: how many leading tokens (class, registers) never merge.
        trace_source: as for :func:`timm`.
        prop_attn: likewise.
        use_cuda_ext: likewise.
        matching: likewise.

    Returns:
        The same model with ``model.r = 0``: nothing is merged until ``r`` is set.

    Raises:
        UnsupportedModelError: blocks or parts that are not there, or that the row does not name.
        ValueError, TypeError: a ``matching`` that is neither a known name nor a function, or a ``prefix`` below 0.

    """
    if not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"prefix must be an integer of at least 0, got {prefix!r}")
    settings = ModelSettings(trace_source, prop_attn, _backend(use_cuda_ext), chosen(matching))
    return _patch_own(model, settings, blocks, row, prefix)


def diffusers(
    model: M,
    ratio: float = 0.5,
    max_downsample: int | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    *,
    seed: int = 0,
    share_map: bool = False,
    share_guidance: bool = True,
    use_cuda_ext: bool | None = None,
) -> M:
    """Merge tokens around the self-attention of a denoiser of diffusers (arXiv 2303.17604): UNet, DiT or PixArt.

    In each cell of the grid one token is a target; of all others those that are most like their best target, by the
    cosine of their keys, merge into it before self-attention, and get its result behind it.

    Args:
        model: a pipeline, or its ``unet`` or ``transformer``; changed in place. Patched again it takes the new
            settings.
        ratio: the share of the tokens that merge, at most 1 - 1 / (sx * sy); with 0 the model computes as unpatched.
        max_downsample: merge where the UNet has scaled the latent down by at most this (1, 2, 4, 8); None: where
            self-attention is finest (1 in Stable Diffusion 1 and 2, 2 in XL). For DiT and PixArt all blocks count as 1.
        sx: width of a cell.
        sy: height of a cell; the last cells are smaller where the grid does not divide.
        use_rand: draw each cell's target, for each timestep anew; otherwise it is the top left token.
        merge_attn: merge around self-attention; must be True.
        merge_crossattn: around cross attention; must be False.
        merge_mlp: around the MLP; must be False.
        seed: with the timestep, all that the draw depends on: no generator moves, so the noise stays as it was.
        share_map: the blocks of one size share the map of the first of them, made anew by each call.
        share_guidance: samples in the two halves of a batch that have the same latent (the unconditional and the
            conditional one of guidance) share a map, that of their mean keys.
        use_cuda_ext: True forces the CUDA backend, False the reference; None leaves it to :mod:`tome.backend`.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: a denoiser, block or attention that is not understood, with its name and the reason.
        ValueError: an argument out of its range, or one with which nothing would merge.

    """
    merges = {"merge_attn": merge_attn, "merge_crossattn": merge_crossattn, "merge_mlp": merge_mlp}
    grid.check(ratio, max_downsample, sx, sy, merges)
    host = import_module("tome.patch.diffusers_unet")
    own = sx, sy, use_rand, seed, share_map, share_guidance, _backend(use_cuda_ext)
    host.apply_patch(model, host.Settings(grid.share(ratio), *own), max_downsample)
    return model
