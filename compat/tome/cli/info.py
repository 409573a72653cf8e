"""``tome info``: what runs where, and why not."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from importlib.util import find_spec

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tome import backend, measure, ops

EPILOG = """\b
Examples:
  tome info
  TOME_BACKEND=reference tome info
"""


@click.command("info", epilog=EPILOG)
def command() -> None:
    """Show each operation and backend, whether it is available or why not, and versions for a bug report."""
    try:
        chosen = backend.get_backend()
    except ValueError as error:
        raise click.UsageError(f"TOME_BACKEND: {error}") from error
    console = Console()
    missing = backend.extension_problem()
    extension = import_module("tome_cuda") if find_spec("tome_cuda") is not None else None
    table = Table("operation", "reference", "cuda", title=f"backend: {chosen}")
    for op in (name for name in ops.__all__ if name != "max_r"):
        has = extension is not None and hasattr(extension, op)
        state = "no kernel: runs on the reference" if not has else "available" if missing is None else "cannot run"
        table.add_row(op, "available", state)
    console.print(table)
    if missing is not None:
        console.print(f"cuda: {escape(missing)}", soft_wrap=True)
    for name, value in _facts({} if extension is None else extension.build_info()).items():
        console.print(f"{name:<22}{escape(value)}", soft_wrap=True)


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
