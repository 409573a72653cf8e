"""Which library a model comes from, itself or inside a wrapper; and what is supported of each."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tome.patch.model import Holder, PatchedModel, hold
from tome.patch.row import ModelSettings
from tome.patch.swap import UnsupportedModelError, check_own
from tome.patch.transformers_refused import CONVOLUTIONS, REFUSED, STAGES, WINDOWS

# The module of tome.patch by the library's name.
HOSTS = {
    "timm": "timm_host",
    "transformers": "transformers_vit",
    "torchvision": "torchvision_vit",
    "open_clip": "open_clip_vit",
}
SHAPE = "swag_vit"  # of no library: known by the names of its parts

# Other libraries' models than transformers', which have a table of their own.
UNSUPPORTED = {
    "Swin, SwinV2, MaxViT, SAM": WINDOWS,
    "Hiera, MViT, PiT, LeViT, TinyViT, CoaT, Twins": STAGES,
    "ResNet, ConvNeXt, EfficientNet": CONVOLUTIONS,
    "XCiT, DaViT": "attends over channels, where a token has no weight of its own",
    "CrossViT, TNT, VOLO": "holds several sequences of tokens side by side",
}


class Support(NamedTuple):
    """What is supported of a library."""

    library: str
    function: str
    models: tuple[str, ...]  # the names of classes; empty where the library is not installed
    needs: str | None = None  # what is missing


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.auto`."""
    check_own("", model)
    own, found = _host_of(model), list({id(each[1]): each for each in find(model)}.values())
    if own is not None and (len(found) != 1 or found[0][2] is own):
        patched: nn.Module = own.apply_patch(model, settings)
        return patched
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | DistributedDataParallel):
        raise UnsupportedModelError(
            f"{type(model).__name__}: patch the model in it before torch.compile, DataParallel and other wrappers"
        )
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} comes from none of {', '.join(HOSTS)}, and holds "
            f"{', '.join(path for path, _, _ in found) or 'no model of theirs'}: it must hold one that can be patched. "
            f"Supported: {'; '.join(map(_line, supported()))}"
        )
    path, inner, host = found[0]
    steps = path.split(".")
    for i in range(len(steps)):
        owner = model.get_submodule(".".join(steps[:i]))
        if hasattr(owner, "r") and not isinstance(owner, Holder):
            raise UnsupportedModelError(
                f"{type(owner).__name__} has an attribute r of its own: patch its {'.'.join(steps[i:])} itself"
            )
    host.apply_patch(inner, settings)
    whole = next(name for name, module in model.named_modules() if isinstance(module, PatchedModel))
    # Every module on the way passes r on, so that none keeps what is set on it to itself.
    for i in range(len(steps)):
        hold(model.get_submodule(".".join(steps[:i])), whole.split(".", i)[i])
    return model


def find(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, Any]]:
    """The outermost models in a module that can be patched: path, model and the module of its host."""
    host = _host_of(model)
    if host is not None and host.knows(model):
        yield path, model, host
        return
    for name, child in model.named_children():
        yield from find(child, f"{path}.{name}".lstrip("."))


def weighs_sizes(model: nn.Module) -> bool:
    """Whether sizes count in attention if nobody says: not in MAE's class for fine-tuning, trained without."""
    return not any(map(is_mae, model.modules()))


def is_mae(model: nn.Module) -> bool:
    """Whether a model is MAE's for fine-tuning: a VisionTransformer over timm's whose ``global_pool`` is a bool."""
    is_named = type(model).__name__ == "VisionTransformer" and _library(type(model)) == "timm"
    return is_named and isinstance(getattr(model, "global_pool", None), bool)


def supported() -> list[Support]:
    """What is supported, by library, from the hosts' own tables."""
    rows = []
    for library, host in HOSTS.items():
        if find_spec(library) is None:
            rows.append(Support(library, f"tome.patch.{library}", (), f"pip install 'token-merging[{library}]'"))
        else:
            models = import_module(f"tome.patch.{host}").known_models()
            rows.append(Support(library, f"tome.patch.{library}", tuple(models)))
    rows.append(Support("SWAG", "tome.patch.swag", tuple(import_module(f"tome.patch.{SHAPE}").known_models())))
    rows.append(Support("MAE", "tome.patch.mae", ("VisionTransformer",)))
    return rows


def unsupported() -> dict[str, str]:
    """What is not supported: the names of models by the reason, which goes on from "each"."""
    reasons: dict[str, list[str]] = {reason: [names] for names, reason in UNSUPPORTED.items()}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"transformers.{name.partition('.')[0]}")
    return {reason: ", ".join(names) for reason, names in reasons.items()}


def _line(row: Support) -> str:
    return f"{row.library} ({', '.join(row.models) or row.needs})"


def _library(kind: type) -> str | None:
    homes = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return next((library for library in HOSTS if library in homes), None)


def _host_of(model: nn.Module) -> Any:
    """The module of tome.patch for a model of a library, or of SWAG's shape; imported for it."""
    library = _library(type(model))
    if library is not None:
        return import_module(f"tome.patch.{HOSTS[library]}")
    if type(model).__name__ == "VisionTransformer":
        shape = import_module(f"tome.patch.{SHAPE}")
        return shape if shape.knows(model) else None
    return None
