"""Where models come from beside timm's names: ``hf:``, ``torchvision:``, ``open_clip:`` and functions of the user's.

Each source imports its library when it is asked, and gives a model of random weights unless pretrained ones are wanted.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from tome.patch import hosts

FORMS = "hf:NAME-OR-FOLDER, torchvision:NAME, open_clip:NAME or NAME/WEIGHTS, module:function"
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


class Made(NamedTuple):
    """A model, and what :func:`timm.data.create_transform` is to be told of its images, asked when one is drawn."""

    model: Any
    pixels: Callable[[], dict[str, Any]] = dict


def make(name: str, pretrained: bool, device: torch.device | str) -> Made:
    """The model of a name with a prefix.

    Args:
        name: one of FORMS.
        pretrained: load the weights that belong to the name; else they are random. A function's are its own.
        device: where it is made.

    Raises:
        click.UsageError: a library that is not installed, an unknown name, or one without weights.
        Exception: whatever the library, the hub or the user's function raises.

    """
    prefix, _, rest = name.partition(":")
    source = SOURCES.get(prefix)
    if source is None:
        made = Made(_called(name))
    else:
        with _quietly(), nullcontext() if pretrained else _on(device):
            made = source(rest, pretrained)
    return made._replace(model=made.model.to(device).eval())


def _on(device: torch.device | str) -> AbstractContextManager[object]:
    return torch.device(device)  # random weights of large models are slow on a CPU


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # of weights that are random, as they were asked to be
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise click.UsageError(f"{package} is not installed: pip install 'token-merging[{package}]'") from error


def _check_known(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.0)
        raise click.UsageError(f"unknown model {kind}:{name}; there are, for instance, {', '.join(near)}")


def _from_transformers(name: str, pretrained: bool) -> Made:
    library = _library("transformers")
    config = library.AutoConfig.from_pretrained(name)
    classifies = any("ForImageClassification" in each for each in config.architectures or ())
    kind = library.AutoModelForImageClassification if classifies else library.AutoModel
    if pretrained:
        model, told = kind.from_pretrained(name, output_loading_info=True)
        # A head or a pooler may be lacking; layers of random weights would draw nonsense.
        lost = [key for key in sorted(told["missing_keys"]) if re.search(r"layers?\.\d", key)]
        if lost:
            raise click.UsageError(f"'hf:{name}' has no weights for {lost[0]} of {type(model).__name__}")
        model = model.float()
    else:
        model = kind.from_config(config if classifies else getattr(config, "vision_config", config))
    if hasattr(config, "vision_config") and not classifies:  # of several towers the one for images
        towers = [tower for _, tower, _ in hosts.find(model)]
        model = towers[0] if len(towers) == 1 else model

    def pixels() -> dict[str, Any]:
        try:
            processor = library.AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError):  # a folder with a configuration only
            return {}
        found = {"mean": getattr(processor, "image_mean", None), "std": getattr(processor, "image_std", None)}
        found["interpolation"] = INTERPOLATIONS.get(getattr(processor, "resample", 3))
        cropped = getattr(processor, "do_center_crop", None)
        crop = _crop("center" if cropped else "squash")
        edge, left = (_edge(getattr(processor, key, None)) for key in ("size", "crop_size"))
        if cropped and edge and left:
            crop["crop_pct"] = min(1.0, left / edge)
        return {key: value for key, value in found.items() if value} | crop

    return Made(model, pixels)


def _from_torchvision(name: str, pretrained: bool) -> Made:
    library = _library("torchvision.models")
    _check_known("torchvision", name, [each for each in library.list_models() if each.startswith("vit")])
    weights = library.get_model_weights(name).DEFAULT

    def pixels() -> dict[str, Any]:
        told = weights.transforms()
        return {
            "mean": told.mean,
            "std": told.std,
            "interpolation": told.interpolation.value,
            "crop_pct": told.crop_size[0] / told.resize_size[0],
        }

    return Made(library.get_model(name, weights=weights if pretrained else None), pixels)


def _from_open_clip(name: str, pretrained: bool) -> Made:
    library = _library("open_clip")
    weights = None
    if ":" not in name:  # with hf-hub: or local-dir: open_clip reads a configuration and weights from there
        name, _, weights = name.partition("/")
        _check_known("open_clip", name, library.list_models())
        tags = library.list_pretrained_tags_by_model(name)
        if pretrained and not tags:
            raise click.UsageError(f"open_clip has no pretrained weights for {name!r}")
        if weights and weights not in tags:
            raise click.UsageError(
                f"open_clip has the weights {', '.join(tags) or 'of none'} for {name!r}, not {weights!r}"
            )
        weights = weights or tags[0] if pretrained else None
    options = {} if pretrained else {"load_weights": False, "pretrained_text": False}
    visual = library.create_model(name, pretrained=weights, **options).visual

    def pixels() -> dict[str, Any]:
        told = getattr(visual, "preprocess_cfg", {})
        mode = {"squash": "squash", "longest": "border"}.get(told.get("resize_mode", ""), "center")
        return {key: told[key] for key in ("mean", "std", "interpolation") if key in told} | _crop(mode)

    return Made(visual, pixels)


def _edge(size: Any) -> int | None:
    """The shorter edge of what a processor resizes or crops to."""
    edges = [size.get(key) for key in ("shortest_edge", "height", "width")] if size else []
    return min((edge for edge in edges if edge), default=None)


def _crop(mode: str) -> dict[str, Any]:
    return {"crop_mode": mode, "crop_pct": 1.0}


SOURCES: dict[str, Callable[[str, bool], Made]] = {
    "hf": _from_transformers,
    "torchvision": _from_torchvision,
    "open_clip": _from_open_clip,
}


def _called(name: str) -> nn.Module:
    """What ``module:function`` returns; modules of the working directory count."""
    home, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = import_module(home)
    except ImportError as error:
        if not home.startswith(error.name or home):
            raise
        raise click.UsageError(f"{name!r}: there is no module {home!r} (forms: {FORMS})") from error
    function = getattr(module, path, None)
    if not callable(function):
        near = difflib.get_close_matches(path, [each for each in vars(module) if callable(vars(module)[each])])
        also = f"; it has {', '.join(near)}" if near else ""
        raise click.UsageError(f"{name!r}: module {home!r} has no function {path!r}{also}")
    model = function()
    if not isinstance(model, nn.Module):
        raise click.UsageError(f"{name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model
