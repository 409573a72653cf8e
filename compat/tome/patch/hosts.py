"""Which library a model comes from."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError

HOSTS = {"timm": "timm_host", "transformers": "transformers_vit"}  # the module of tome.patch by the library's name


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.auto`."""
    homes = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    for library, host in HOSTS.items():
        if library in homes:
            patched: nn.Module = import_module(f"tome.patch.{host}").apply_patch(model, settings)
            return patched
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} comes from none of {', '.join(HOSTS)}. Patch before "
        "torch.compile, DataParallel and other wrappers"
    )
