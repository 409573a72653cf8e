"""What a model is judged by: its pooled features, and its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("head", "classifier", "heads", "fc")  # as libraries call their last linear layer


def pooled(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the last linear layer [B, C], and what leaves it [B, K]; without one both are the output."""
    inputs: list[Tensor] = []
    head = _head(model)
    hook = None if head is None else head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        out = _tensor(model(x))
    finally:
        if hook is not None:
            hook.remove()
    features = inputs[-1] if inputs and inputs[-1].dim() == 2 else out
    return features.float(), out.float()


def _head(model: Any) -> nn.Module | None:
    for name in HEADS:
        part = getattr(model, name, None)
        linear = [module for module in part.modules() if isinstance(module, nn.Linear)] if part is not None else []
        if linear:
            return linear[-1]
    return None


def _tensor(out: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            out = getattr(out, name)
    if not isinstance(out, Tensor):
        out = out["last_hidden_state"] if hasattr(out, "keys") else out[0]
    tensor: Tensor = out
    return tensor if tensor.dim() == 2 else torch.flatten(tensor[:, 0] if tensor.dim() == 3 else tensor, 1)
