"""Several schedules of one model side by side, in the memory of one."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn

from tome import patch, schedule


def patched(model: nn.Module, r: schedule.Schedule = 0) -> nn.Module:
    """A patched copy with that schedule, which shares the model's weights; the model stays as it is."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    variant: Any = copy.deepcopy(model, shared)
    if not any(hasattr(module, "_tome_base") for module in variant.modules()):
        patch.auto(variant)
    variant.r = r
    return cast(nn.Module, variant)
