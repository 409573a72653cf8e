"""What the commands share of models: making one by its name, patching it, and turning failures into one line."""

from __future__ import annotations

import difflib
import itertools
import logging
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click
import timm
import torch
from timm.models import load_state_dict

from tome import backend, cost, patch, schedule
from tome.cli import sources
from tome.cli.arguments import RANDOM_WEIGHTS
from tome.measure import checked_device
from tome.patch.model import patched_in

# Where timm keeps the models that are worth suggesting; whether one can be patched is found by trying.
FAMILIES = ("deit", "vision_transformer", "vision_transformer_hybrid", "vitamin")

TIMM_PREFIXES = ("hf-hub", "hf_hub", "local-dir")
_PLAIN = "--checkpoint needs a plain name of timm's for the model, not {!r}"

for library in ("huggingface_hub", "timm"):  # what matters of their warnings is in the one line that a failure ends in
    logging.getLogger(library).setLevel(logging.CRITICAL)


class Shape(NamedTuple):
    """What a schedule is spread over: blocks, tokens that enter the first (prefix included), protected tokens."""

    depth: int
    tokens: int
    prefix: int


def find_device(name: str | None) -> torch.device:
    """The device of ``--device``; without it the GPU where there is one.

    Raises:
        click.BadParameter: it is not there.

    """
    try:
        return checked_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error


def dtype_of(name: str) -> torch.dtype:
    """The dtype of ``--dtype`` or ``--autocast``."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast_to(dtype: str | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to a dtype; None leaves it off."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype_of(dtype))


def load(
    name: str, pretrained: bool = False, device: torch.device | str = "cpu", checkpoint: Path | None = None
) -> sources.Made:
    """A model of any source in eval mode, with what is to be known of its images.

    Args:
        name: timm's, also with its prefix, or one of :data:`tome.cli.sources.FORMS`.
        pretrained: load the weights that belong to the name; else they are random.
        device: where it is made.
        checkpoint: load the weights in this file instead, of timm's names.

    Raises:
        click.UsageError: an unknown model, or weights that cannot be loaded or do not fit.

    """
    if ":" not in name or name.partition(":")[0] in TIMM_PREFIXES:
        return sources.Made(create_model(name, pretrained, device, checkpoint))
    if checkpoint is not None:
        raise click.UsageError(_PLAIN.format(name))
    try:
        return sources.make(name, pretrained, device)
    except click.UsageError:
        raise
    except Exception as error:  # as below
        mend = ": connect to the model hub, or name a folder" if name.startswith("hf:") else ""
        raise click.UsageError(f"cannot make {name!r} ({_in_short(error)}){mend}") from error


def create_model(
    name: str, pretrained: bool = False, device: torch.device | str = "cpu", checkpoint: Path | None = None
) -> Any:
    """A model of timm in eval mode.

    Args:
        name: timm's, also with its prefix (hf-hub:REPOSITORY, local-dir:FOLDER).
        pretrained: load the weights that belong to the name; else they are random.
        device: where it is made.
        checkpoint: load the weights in this file instead.

    Raises:
        click.UsageError: an unknown model, or weights that cannot be loaded or do not fit.

    """
    is_plain = ":" not in name
    if is_plain and not timm.is_model(name):
        raise click.UsageError(_unknown(name))
    options: dict[str, Any] = {"pretrained": pretrained}
    failed, mend = f"cannot make {name!r}", ""
    if checkpoint is not None:
        if not is_plain:
            raise click.UsageError(_PLAIN.format(name))
        failed, options = f"{checkpoint} does not fit {name!r}", _weights(checkpoint)
    elif not is_plain:
        failed, mend = f"cannot load {name!r}", ": connect to the model hub" if name.startswith("hf") else ""
    elif pretrained:
        if not timm.is_model_pretrained(name):
            raise click.UsageError(f"timm has no pretrained weights for {name!r}: use {RANDOM_WEIGHTS}")
        failed = f"cannot load the pretrained weights of {name!r}"
        mend = f": connect to the model hub, or use --checkpoint, or {RANDOM_WEIGHTS} if only speed counts"
    try:
        with warnings.catch_warnings(), torch.device(device):  # random weights of large models are slow on a CPU
            warnings.simplefilter("ignore")
            model = timm.create_model(name, **options)
    except Exception as error:  # whatever the hub, the network or the file system raises ends in the same advice
        raise click.UsageError(f"{failed} ({_in_short(error)}){mend}") from error
    model.pretrained_cfg.pop("state_dict", None)  # else every copy of the model would copy the checkpoint
    return model.eval()


@contextmanager
def failing_in_a_line() -> Iterator[None]:
    """Runs of a model that no backend can take, that lack memory or whose readers die end in a line with the remedy.

    Raises:
        click.ClickException: with the reason.

    """
    try:
        yield
    except backend.BackendError as error:
        raise click.ClickException(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            f"out of memory ({str(error).splitlines()[0]}): choose a smaller --batch-size"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise click.ClickException(
            f"{str(error).splitlines()[0]}: choose fewer --workers, or give the machine more shared memory"
        ) from error


def set_image_size(name: str, model: Any, size: tuple[int, int], option: str) -> bool:
    """Make a model of timm one for images of (height, width); whether it can be told of a size at all.

    Raises:
        click.BadParameter: the size does not suit it, with the reason, in the name of the option.

    """
    if not hasattr(model, "set_input_size"):
        return False
    try:
        model.set_input_size(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        message = f"{name} takes no images of {size[0]}x{size[1]} pixels ({_in_short(error)})"
        raise click.BadParameter(message, param_hint=option) from error
    return True


def check_image_size(name: str, model: Any, size: tuple[int, int] | None, option: str) -> None:
    """The same, where it is given and not the model's own.

    Raises:
        click.BadParameter: the model cannot be told of a size, or this one does not suit it.

    """
    if size is None or size == cost.input_size(model)[1:]:
        return
    if not set_image_size(name, model, size, option):
        raise click.BadParameter(f"{name} takes no images of another size", param_hint=option)


def patched_shape(model: Any, size: tuple[int, int, int] | None = None) -> Shape:
    """The shape of a model, which is patched in place, for images of a size: its own without one.

    Raises:
        click.UsageError: it cannot be patched.

    """
    try:
        inner = patched_in(patch.auto(model))
        assert inner is not None
        return Shape(len(inner._tome_blocks()), cost.tokens(model, size), inner._tome_prefix()[0])
    except patch.UnsupportedModelError as error:
        raise click.UsageError(str(error)) from error


def checked_plan(name: str, shape: Shape, r: schedule.Schedule) -> schedule.Plan:
    """The plan of a schedule that the first layer could follow in full.

    Raises:
        click.BadParameter: a schedule that is not one for this depth, or merges more than half of the free tokens.

    """
    try:
        reason = schedule.too_large(r, *shape)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--r") from error
    if reason is not None:
        raise click.BadParameter(f"{r} is too large for {name}: {reason}", param_hint="--r")
    return schedule.plan(r, *shape)


def _weights(checkpoint: Path) -> dict[str, Any]:
    """What makes timm.create_model load a file of weights, in whatever naming the model's loader knows."""
    try:
        state = load_state_dict(str(checkpoint))
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    except Exception as error:  # of pickle, safetensors and the file system
        raise click.UsageError(f"cannot read weights from {checkpoint} ({_in_short(error)})") from error
    if not tensors:
        raise click.UsageError(f"cannot read weights from {checkpoint}: there are none in it")
    overlay: dict[str, Any] = {"state_dict": state}
    options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if any(key.startswith("blocks.") for key in state):  # timm's own naming: as many classes as it was trained for
        head = state.get("head.weight")
        options["num_classes"] = overlay["num_classes"] = 0 if head is None else len(head)
    return options


def _unknown(name: str) -> str:
    if "/" in name:
        return (
            f"unknown model {name!r}: write hf-hub:{name} for the model hub or local-dir:{name} for a folder, and "
            f"hf:{name} for either if it is transformers'"
        )
    names = [known for family in FAMILIES for known in timm.list_models(module=family)]
    near = difflib.get_close_matches(name, names, n=len(names), cutoff=0.0)
    return f"unknown model {name!r}; timm has, for instance, {', '.join(itertools.islice(filter(_is_host, near), 3))}"


def _is_host(name: str) -> bool:
    try:
        patch.timm(timm.create_model(name, depth=1))  # its blocks are all alike
    except patch.UnsupportedModelError:
        return False
    return True


def _in_short(error: Exception) -> str:
    """The first line; of weights that do not fit, the first line of each kind: missing, unexpected, of another size."""
    first, *more = str(error).strip().splitlines() or [""]
    first = first if " " in first else f"{type(error).__name__}: {first}"  # of KeyError it is but the key
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        first += f": pip install {error.name.partition('.')[0]}"
    kinds: dict[str, str] = {}
    for line in more:
        kinds.setdefault(line.split()[0], line)
    lines = kinds.values() if "loading state_dict" in first else [first]
    return "; ".join(textwrap.shorten(line, 200, placeholder=" ...") for line in lines)
