"""Give an existing model token merging, in place: one function per library that models come from.

Each returns the model, whose ``r`` then takes a schedule (:mod:`tome.schedule`). :func:`unpatch` takes it back.
"""

from __future__ import annotations

from torch import nn

from tome.matching import Rule, chosen
from tome.patch.model import merged
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, unpatch
from tome.tokens import Tokens

__all__ = ["Rule", "Tokens", "UnsupportedModelError", "auto", "merged", "timm", "transformers", "unpatch"]


def timm(
    model: nn.Module,
    trace_source: bool = False,
    prop_attn: bool = True,
    use_cuda_ext: bool | None = None,
    matching: str | Rule = "bipartite",
) -> nn.Module:
    """Patch a Vision Transformer of timm, or the feature extractor that ``features_only=True`` makes of one.

    Args:
        model: the model; changed in place.
        trace_source: keep the slot map of each forward pass for ``model._tome_info["source"]``.
        prop_attn: weigh each key by its size in attention (section 3, "Tracking Token Size").
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
    from tome.patch import timm_vit  # timm, and torchvision behind it, load only when a model is patched

    return timm_vit.apply_patch(model, _settings(trace_source, prop_attn, use_cuda_ext, matching))


def transformers(
    model: nn.Module,
    trace_source: bool = False,
    prop_attn: bool = True,
    use_cuda_ext: bool | None = None,
    matching: str | Rule = "bipartite",
) -> nn.Module:
    """Patch the vision tower of a model of transformers: ViT, DeiT, ViT-MAE, I-JEPA, DINOv2, CLIP or SigLIP.

    Text towers and decoders stay as they are. Hidden states are on the full grid; attentions are those of the merged
    tokens. A padding mask is refused.

    Args:
        model: the model, or one with a head or a text tower around it; changed in place.
        trace_source: as for :func:`timm`, like all that follow.
        prop_attn: likewise.
        use_cuda_ext: likewise.
        matching: likewise.

    Returns:
        The same model with ``model.r = 0``.

    Raises:
        UnsupportedModelError: a model, layer or attention that is not understood, with its name and the reason.
        ValueError, TypeError: a ``matching`` that is neither a known name nor a function.

    """
    from tome.patch import transformers_vit

    return transformers_vit.apply_patch(model, _settings(trace_source, prop_attn, use_cuda_ext, matching))


def auto(
    model: nn.Module,
    trace_source: bool = False,
    prop_attn: bool = True,
    use_cuda_ext: bool | None = None,
    matching: str | Rule = "bipartite",
) -> nn.Module:
    """Patch a model of any library that is known, by the library that its class comes from.

    Arguments, result and errors are those of :func:`timm` and :func:`transformers`.
    """
    homes = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    for home, patch in (("timm", timm), ("transformers", transformers)):
        if home in homes:
            return patch(model, trace_source, prop_attn, use_cuda_ext, matching)
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} comes from neither timm nor transformers. Patch before "
        "torch.compile, DataParallel and other wrappers"
    )


def _settings(trace_source: bool, prop_attn: bool, use_cuda_ext: bool | None, matching: str | Rule) -> ModelSettings:
    backend = None if use_cuda_ext is None else ("cuda" if use_cuda_ext else "reference")
    return ModelSettings(trace_source, prop_attn, backend, chosen(matching))
