"""``tome info``: what runs where, and why not; with a model, block by block."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tome
from tome import backend, cost, measure, ops, report, schedule
from tome.cli import models
from tome.patch import hosts


def show_backends() -> None:
    """Every operation and backend, whether it is available or why not, and versions.

    Raises:
        click.UsageError: the backend that was chosen cannot run.

    """
    chosen = backend.get_backend()
    console = Console()
    missing = backend.extension_problem()
    table = Table("operation", "reference", "cuda", title=f"backend: {chosen}")
    for op in (name for name in ops.__all__ if name != "max_r"):
        table.add_row(op, "available", "available" if missing is None else "cannot run")
    console.print(table)
    if missing is not None:
        console.print(f"cuda: {escape(missing)}", soft_wrap=True)
        if torch.cuda.is_available():
            console.print(f"merging runs on {backend.REFERENCE}", soft_wrap=True)
        else:
            console.print("no GPU here: the reference is what runs, and it lacks nothing", soft_wrap=True)
    for name, value in facts().items():
        console.print(f"{name:<22}{escape(value)}", soft_wrap=True)
    if chosen == "cuda" and missing is not None:
        raise click.UsageError("TOME_BACKEND chose cuda, which cannot run here: no operation can")


def show_hosts() -> None:
    """What is supported, and why the rest is not."""
    console = Console()
    table = Table("models", "patched by", "classes", box=box.SIMPLE_HEAD, title="tome.patch.auto finds which it is")
    for row in hosts.supported():
        table.add_row(row.library, row.function, escape(", ".join(row.models) or f"not installed: {row.needs}"))
    console.print(table)
    table = Table("not supported", "each of them", box=box.SIMPLE_HEAD)
    for reason, names in hosts.unsupported().items():
        table.add_row(names, reason)
    console.print(table)


def show_parts(
    name: str,
    r: schedule.Schedule,
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device_name: str | None,
    checkpoint: Path | None,
) -> None:
    """What each part of the model runs on, and why, in one pass over random images."""
    device = models.find_device(device_name)
    model = models.load(name, device=device, checkpoint=checkpoint).model.to(models.dtype_of(dtype))
    models.checked_plan(name, models.patched_shape(model), r)
    model.r = r
    images = torch.randn(batch_size, *cost.input_size(model), device=device, dtype=models.dtype_of(dtype))
    try:
        with models.autocast_to(autocast, device):
            found = report.parts(model, images)
    except backend.BackendError as error:
        raise click.ClickException(str(error)) from error
    title = escape(f"{name}, r {r}, {dtype}, {device}")
    table = Table("part", "operation", "runs on", "why", title=title, box=box.SIMPLE_HEAD)
    for part in report.ranges(found):
        if not part.calls:
            table.add_row(part.name, "as unpatched", "torch", "nothing is merged in it or before it")
        for i, call in enumerate(part.calls):
            table.add_row("" if i else part.name, call.op, call.backend or "left out", escape(call.reason or ""))
    Console().print(table)


def facts() -> dict[str, str]:
    """Versions, GPUs and driver, with what the library of kernels says of itself."""
    extension = import_module("tome_cuda") if find_spec("tome_cuda") is not None else None
    found = {"token-merging": tome.__version__, "torch": torch.__version__}
    for package in ("timm", "transformers", "torchvision", "open_clip_torch"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["python"] = f"{platform.python_version()} on {platform.platform()}"
    found["CUDA of torch"] = torch.version.cuda or "none"
    found.update({} if extension is None else extension.build_info())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        found["GPU"] = "none that PyTorch can use"
    found["driver"] = measure.driver_version() or "none"
    return found
