"""What the commands share of reading their arguments: without PyTorch, so that help and mistakes come at once."""

from __future__ import annotations

import ast
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from tome import schedule
from tome.cli import STOPPED

BACKENDS = ("auto", "reference", "cuda")  # as in tome.backend, which loads PyTorch
DTYPES = ("float32", "float16", "bfloat16")
F = TypeVar("F", bound=Callable[..., Any])
RANDOM_WEIGHTS = "--random-weights"
WISHES = "--speedup, --latency-ms, --max-drop and --agreement"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class ScheduleType(click.ParamType):  # type: ignore[type-arg]  # no generic in older versions of click
    """``8``, ``8,-1.0``, ``[8,8,4]``, ``0.05``, or a JSON file that :func:`tome.schedule.load` reads."""

    name = "schedule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> schedule.Schedule:
        if not isinstance(value, str):
            return cast(schedule.Schedule, value)
        if value.endswith(".json"):
            try:
                return schedule.load(value)
            except OSError as error:
                self.fail(f"{value}: {error.strerror}", param, ctx)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        try:
            r = ast.literal_eval(value)
            # Any depth serves to check the form; the model's own is checked once it is known.
            schedule.per_layer(len(r) if isinstance(r, list) else 12, r)
        except (ValueError, TypeError, SyntaxError) as error:
            reason = str(error) if "r" in str(error)[:2] or "inflection" in str(error) else "not a schedule"
            self.fail(f"{value!r}: {reason} (forms: 8 or 8,-1.0 or [8,8,4] or 0.05 or a .json file)", param, ctx)
        return cast(schedule.Schedule, r)


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """448 or 336x504: height and width of images."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return cast("tuple[int, int]", value)
        found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", value)
        if found is None:
            self.fail(f"{value!r}: not a size (forms: 448 or 336x504, height first)", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class DeviceType(click.ParamType):  # type: ignore[type-arg]
    """cpu, cuda or cuda:1; whether it is there is asked later, of PyTorch."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if re.fullmatch(r"cpu|cuda(:\d+)?", value) is None:
            self.fail(f"device {value!r} is not supported: use cpu, cuda or cuda:N", param, ctx)
        return cast(str, value)


class CountOrAutoType(click.ParamType):  # type: ignore[type-arg]
    """A number from 1 on, or auto, which is None."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value in (None, "auto") else click.IntRange(min=1).convert(value, param, ctx)


class NumbersType(click.ParamType):  # type: ignore[type-arg]
    """``0.5``, for all channels, or ``0.485,0.456,0.406``."""

    name = "numbers"

    def __init__(self, positive: bool = False) -> None:
        self.positive = positive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is neither one number nor three (forms: 0.5 or 0.485,0.456,0.406)", param, ctx)
        if self.positive and min(numbers) <= 0:
            self.fail(f"{value!r} must be positive", param, ctx)
        return numbers


schedules = click.option(
    "--r",
    "schedules",
    type=ScheduleType(),
    multiple=True,
    help="Schedule: 8 or 8,-1.0 or [8,8,4] or 0.05 or FILE.json of tome tune. Repeat it for several. "
    "[default: 8, 16 and 16,-1.0 if they fit]",
)
batch_size = click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
dtype = click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
autocast = click.option("--autocast", type=click.Choice(DTYPES[1:]), help="Run under autocast.")
device = click.option("--device", type=DeviceType(), help="cpu or cuda; the GPU if there is one.")
image_size = click.option(
    "--image-size", type=SizeType(), help="Pixels: 448 or HEIGHTxWIDTH. [default: the model's own]"
)
checkpoint = click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of MODEL in a file: .safetensors, or what torch.save wrote.",
)
random_weights = click.option(RANDOM_WEIGHTS, "random_weights", is_flag=True, help="An untrained model, no download.")


def wishes(command: F) -> F:
    """The options of a command that tunes."""
    options = (
        click.option("--speedup", type=click.FloatRange(1, min_open=True), metavar="X",
                     help="X times as fast as the unpatched model."),
        click.option("--latency-ms", type=click.FloatRange(0, min_open=True), metavar="MS",
                     help="A batch in MS milliseconds."),
        click.option("--max-drop", type=click.FloatRange(0, 100), metavar="POINTS",
                     help="Lose no more top-1 accuracy; without labels: percent of images whose class changes."),
        click.option("--agreement", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="COSINE",
                     help="The pooled features' least mean cosine to the unpatched model's."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def wish(options: dict[str, Any]) -> tuple[Any, float] | None:
    """What :func:`wishes` were given, taken out of the options; None without one.

    Raises:
        click.UsageError: several.

    """
    given = {kind: options.pop(kind) for kind in ("speedup", "latency_ms", "max_drop", "agreement")}
    found = [(kind, value) for kind, value in given.items() if value is not None]
    if len(found) > 1:
        raise click.UsageError(f"choose one of {WISHES}")
    return found[0] if found else None


def images(command: F) -> F:
    """The options of a command that runs a model on images: which, how they are read, and what runs."""
    options = (
        click.option(
            "--data",
            required=True,
            help="A folder of images, or of folders, one a class; a dataset of torchvision; or digits.",
        ),
        click.option("--root", type=click.Path(path_type=Path), help="Where the dataset of torchvision's lies."),
        click.option(
            "--no-labels", "labels", flag_value=False, default=True, help="Folders are no classes: agreement only."
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            help="Processes that read images. [default: the cores where there is a GPU, else none]",
        ),
        dtype,
        autocast,
        device,
        checkpoint,
        random_weights,
        image_size,
        click.option("--mean", type=NumbersType(), help="0.5 or 0.485,0.456,0.406, instead of the model's."),
        click.option("--std", type=NumbersType(positive=True), help="Likewise."),
        click.option("--crop", type=click.FloatRange(0, 1, min_open=True), help="What is left of the shorter edge."),
        click.option("--interpolation", type=click.Choice(INTERPOLATIONS), help="How images are resized."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_weights(checkpoint: Path | None, random_weights: bool) -> None:
    """Refuse weights that are both given and random."""
    if checkpoint is not None and random_weights:
        raise click.UsageError(f"choose one of --checkpoint and {RANDOM_WEIGHTS}")


def check_dtypes(dtype: str, autocast: str | None) -> None:
    """Refuse autocast to one half precision of a model in the other."""
    if autocast is not None and dtype not in ("float32", autocast):
        raise click.BadParameter(
            f"{autocast} needs --dtype float32 or {autocast}, not {dtype}", param_hint="--autocast"
        )


def check_environment() -> None:
    """Refuse a TOME_BACKEND that no backend has for its name."""
    chosen = os.environ.get("TOME_BACKEND", "auto")
    if chosen not in BACKENDS:
        raise click.UsageError(f"TOME_BACKEND: unknown backend {chosen!r}; choose one of {', '.join(BACKENDS)}")


@contextmanager
def loading() -> Iterator[None]:
    """Import PyTorch and what is built on it within this: Ctrl-C then ends the process there and then.

    As an exception it may be swallowed by some ``except:`` of the many modules that are imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        os.write(2, STOPPED.encode())
        os._exit(130)

    outer = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outer)
