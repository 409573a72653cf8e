"""What one image costs a model, in tokens and FLOPs, counted by PyTorch itself in a pass that computes nothing.

The pass is one of a copy on the meta device, so it takes no time or memory to speak of, whatever the size of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tome import patch, schedule
from tome.backend import use_backend
from tome.patch.model import patched_in
from tome.tokens import kept


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a Vision Transformer was made for.

    Args:
        model: of any library that :func:`tome.patch.auto` knows, patched or not.

    Raises:
        UnsupportedModelError: it does not say.

    """
    inner: Any = model if hasattr(model, "patch_embed") else patched_in(model)
    if inner is None:
        inner = patched_in(patch.auto(_unpatched_twin(model)))
    stem = next((module for module in inner.modules() if isinstance(module, nn.Conv2d)), None)
    # timm's embedding knows better than its configuration, which may be that of other weights.
    source = getattr(inner, "patch_embed", getattr(inner, "config", inner))
    size = getattr(source, "img_size", None) or getattr(source, "image_size", None)
    if stem is None or not size:
        raise patch.UnsupportedModelError(f"{type(inner).__name__} does not say what images it was made for")
    height, width = size if isinstance(size, Sequence) else (size, size)
    return stem.in_channels, height, width


def tokens(model: nn.Module, size: tuple[int, int, int] | None = None) -> int:
    """How many tokens enter the first block, prefix included.

    Args:
        model: of any library that :func:`tome.patch.auto` knows, patched or not.
        size: channels, height and width of the image; None for the model's own.

    Raises:
        UnsupportedModelError: it cannot be patched.

    """
    twin = patch.auto(_unpatched_twin(model))
    with kept() as found:
        _count(twin, size)
    return found[-1].count()


def flops(model: nn.Module, r: schedule.Schedule = 0, size: tuple[int, int, int] | None = None) -> int:
    """FLOPs (two per multiply-add) of the convolutions and matrix products that one image takes.

    Those of matching are left out: they are the price of merging, and this tells what merging can save.

    Args:
        model: of any library, patched or not.
        r: the schedule to count for.
        size: channels, height and width of the image; None for the model's own.

    Raises:
        TypeError, ValueError: not a schedule.
        UnsupportedModelError: r is not 0 and the model cannot be patched.

    """
    twin: Any = _unpatched_twin(model)
    if r != 0:
        patch.auto(twin, matching=_some_slot)
        twin.r = r
    return _count(twin, size)


def _unpatched_twin(model: nn.Module) -> nn.Module:
    on_meta: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    for parameter in model.parameters():
        on_meta[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return patch.unpatch(copy.deepcopy(model, on_meta)).eval()


def _count(twin: nn.Module, size: tuple[int, int, int] | None) -> int:
    images = torch.empty(1, *(size or input_size(twin)), dtype=next(twin.parameters()).dtype, device="meta")
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter knows its products in every version
    with torch.no_grad(), plain, use_backend("reference"), FlopCounterMode(display=False) as counter:
        twin(images)
    return int(counter.get_total_flops())


def _some_slot(keys: Tensor, r: int, prefix: int) -> Tensor:
    return torch.empty(keys.shape[0], keys.shape[-2], dtype=torch.int32, device=keys.device)
