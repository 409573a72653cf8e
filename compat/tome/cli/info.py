"""``tome info``: what runs where, and why not; with a model, block by block."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from importlib.util import find_spec

import click
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tome import backend, measure, ops, report, schedule
from tome.cli.common import (
    DTYPES,
    DeviceType,
    ScheduleType,
    autocast_to,
    create_model,
    default_device,
    input_size,
    patched,
)

EPILOG = """\b
Examples:
  tome info
  TOME_BACKEND=reference tome info
  tome info vit_base_patch16_224 --r 8 --dtype float16 --device cuda
"""


@click.command("info", epilog=EPILOG)
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option("--r", type=ScheduleType(), default="8", show_default=True, help="Schedule: 8 or 8,-1.0 or 0.05.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--autocast", type=click.Choice(["float16", "bfloat16"]), help="Run under autocast.")
@click.option("--device", type=DeviceType(), default=default_device, help="cpu or cuda; the GPU if there is one.")
def command(
    model_name: str | None,
    r: schedule.Schedule,
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device: torch.device,
) -> None:
    """Show each operation and backend, whether it is available or why not, and versions for a bug report.

    With MODEL, a name of timm's: run it once with random weights, and show block by block what ran on which backend,
    and why. The other options are about that run.
    """
    try:
        chosen = backend.get_backend()
    except ValueError as error:
        raise click.UsageError(f"TOME_BACKEND: {error}") from error
    console = Console()
    if model_name is not None:
        _print_parts(console, model_name, r, batch_size, dtype, autocast, device)
        return
    missing = backend.extension_problem()
    extension = import_module("tome_cuda") if find_spec("tome_cuda") is not None else None
    table = Table("operation", "reference", "cuda", title=f"backend: {chosen}")
    for op in (name for name in ops.__all__ if name != "max_r"):
        table.add_row(op, "available", "available" if missing is None else "cannot run")
    console.print(table)
    if missing is not None:
        console.print(f"cuda: {escape(missing)}", soft_wrap=True)
    for name, value in _facts({} if extension is None else extension.build_info()).items():
        console.print(f"{name:<22}{escape(value)}", soft_wrap=True)


def _print_parts(
    console: Console,
    name: str,
    r: schedule.Schedule,
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device: torch.device,
) -> None:
    model = create_model(name, pretrained=False, device=device).to(DTYPES[dtype])
    patched(name, model, r)
    images = torch.randn(batch_size, *input_size(model), device=device, dtype=DTYPES[dtype])
    try:
        with autocast_to(autocast, device):
            found = report.parts(model, images)
    except backend.BackendError as error:
        raise click.ClickException(str(error)) from error
    table = Table("part", "operation", "runs on", "why", title=f"{name}, r {r}, {dtype}, {device}", box=box.SIMPLE_HEAD)
    for part in report.ranges(found):
        if not part.calls:
            table.add_row(part.name, "as in timm", "torch", "nothing is merged in it or before it")
        for i, call in enumerate(part.calls):
            table.add_row("" if i else part.name, call.op, call.backend or "left out", escape(call.reason or ""))
    console.print(table)


def _facts(library: dict[str, str]) -> dict[str, str]:
    facts = {p: metadata.version(p) for p in ("token-merging", "timm")} | {"torch": torch.__version__}
    facts["python"] = f"{platform.python_version()} on {platform.platform()}"
    facts["CUDA of torch"] = torch.version.cuda or "none"
    facts.update(library)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        facts["GPU"] = "none that PyTorch can use"
    facts["driver"] = measure.driver_version() or "none"
    return facts
