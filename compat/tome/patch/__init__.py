"""Give an existing model token merging, in place: one function per library that models come from.

Each returns the model, whose ``r`` then takes a schedule (:mod:`tome.schedule`). :func:`unpatch` takes it back.
"""

from __future__ import annotations

from torch import nn

from tome.patch.block import Tokens, UnsupportedModelError, unpatch

__all__ = ["Tokens", "UnsupportedModelError", "timm", "unpatch"]


def timm(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, use_cuda_ext: bool | None = None
) -> nn.Module:
    """Patch a Vision Transformer of timm, or the feature extractor that ``features_only=True`` makes of one.

    Args:
        model: the model; changed in place.
        trace_source: keep the slot map of each forward pass for ``model._tome_info["source"]``.
        prop_attn: weigh each key by its size in attention (section 3, "Tracking Token Size").
        use_cuda_ext: True forces the CUDA backend, False the reference; None leaves it to :mod:`tome.backend`.

    Returns:
        The same model with ``model.r = 0``: nothing is merged until ``r`` is set.

    Raises:
        UnsupportedModelError: a model, block or attention that is not understood, with its name and the reason.

    """
    from tome.patch import timm_vit  # timm, and torchvision behind it, load only when a model is patched

    return timm_vit.apply_patch(model, trace_source, prop_attn, use_cuda_ext)
