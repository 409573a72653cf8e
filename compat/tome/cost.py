"""What one image costs a model, in tokens and FLOPs, counted by PyTorch itself in a pass that computes nothing.

The pass is one of a copy on the meta device, so it takes no time or memory to speak of, whatever the size of the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tome import patch, schedule
from tome.backend import use_backend


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a Vision Transformer of timm was made for."""
    embed: Any = model.patch_embed  # knows better than the configuration, which may be that of other weights
    stem = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
    return (stem.in_channels, *embed.img_size)


def tokens(model: nn.Module, size: tuple[int, int, int] | None = None) -> int:
    """How many tokens enter the first block, prefix included.

    Args:
        model: of timm, patched or not.
        size: channels, height and width of the image; None for the model's own.

    """
    twin: Any = _unpatched_twin(model)
    counts: list[int] = []
    twin.blocks[0].register_forward_pre_hook(lambda block, args: counts.append(args[0].shape[1]))
    _count(twin, size)
    return counts[0]


def flops(model: nn.Module, r: schedule.Schedule = 0, size: tuple[int, int, int] | None = None) -> int:
    """FLOPs (two per multiply-add) of the convolutions and matrix products that one image takes.

    Those of matching are left out: they are the price of merging, and this tells what merging can save.

    Args:
        model: of timm, patched or not.
        r: the schedule to count for.
        size: channels, height and width of the image; None for the model's own.

    Raises:
        TypeError, ValueError: not a schedule.
        UnsupportedModelError: r is not 0 and the model cannot be patched.

    """
    twin: Any = _unpatched_twin(model)
    if r != 0:
        patch.timm(twin, matching=_some_slot)
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
