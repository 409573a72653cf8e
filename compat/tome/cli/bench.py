"""``tome bench``: throughput against the honest baseline, the unpatched model with fused attention, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import click
import torch
from rich.console import Console
from timm.layers import set_fused_attn
from torch import nn

from tome import backend, cost, evaluate, measure, patch, schedule
from tome.cli import bars, files, models, tables

WHOLE = 116  # characters that all columns take
NARROW = ("r", "tokens", "im/s", "spread", "speed-up", "allowed")
SPREAD = "spread: quartile distance / median."
ALLOWED = "allowed: FLOPs unpatched / FLOPs merged."
FEWER = f"All columns: in {WHOLE} characters, or --json."
DEFAULT: tuple[schedule.Schedule, ...] = (8, 16, (16, -1.0))


@dataclass(frozen=True)
class Variant:
    """The model with a schedule ("none": unpatched), the backend it chooses, and "eager" or "compiled"."""

    r: str
    backend: str
    mode: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.r, self.backend, self.mode) if part not in ("", "auto", "eager"))


@dataclass(frozen=True)
class Result:
    """One row: a variant of the model and what it cost.

    ``speedup`` is against the unpatched model of its mode; ``merging``, of patched models, against the same path with
    r = 0: what is left of the first are the kernels, which need no merging.
    """

    r: str
    backend: str
    mode: str
    tokens: tuple[int, ...]
    gflops: float
    images_per_second: float
    median_ms: float
    spread_percent: float | None  # of one run there is none
    peak_mib: float
    first_call_s: float
    speedup: float
    merging: float | None
    allowed: float

    @property
    def name(self) -> str:
        """The row's, as in the first column."""
        return str(Variant(self.r, self.backend, self.mode))

    @property
    def share(self) -> float:
        """The part of the speed-up that the saved arithmetic allows."""
        return self.speedup / self.allowed


def run(
    model_name: str,
    schedules: tuple[schedule.Schedule, ...],
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device_name: str | None,
    checkpoint: Path | None,
    image_size: tuple[int, int] | None,
    backends: tuple[str, ...],
    compiled: bool,
    cuda_graph: bool,
    runs: int,
    warm_up: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure, print, and write what was asked for."""
    device = models.find_device(device_name)
    if cuda_graph and device.type != "cuda":
        raise click.BadParameter(f"needs --device cuda, not {device}", param_hint="--cuda-graph")
    set_fused_attn(True)
    model = models.load(model_name, device=device, checkpoint=checkpoint).model.to(models.dtype_of(dtype))
    models.patched_shape(model)  # what cannot be patched does not say its size
    models.check_image_size(model_name, model, image_size, "--image-size")
    x = torch.randn(batch_size, *cost.input_size(model), device=device, dtype=models.dtype_of(dtype))
    results = measured(model_name, model, x, schedules, autocast, backends, compiled, cuda_graph, runs, warm_up)
    conditions = {
        "model": model_name,
        "batch size": str(batch_size),
        "dtype": dtype,
        "autocast": str(autocast),
        "cuda graph": str(cuda_graph),
        **measure.machine(device),
    }
    _print(results, conditions)
    if json_file is not None:
        rows = [{**asdict(result), "share": result.share} for result in results]
        files.write_json(json_file, {"conditions": conditions, "results": rows})
    if plot_file is not None:
        with files.replacing(plot_file) as file:
            bars.draw(results, conditions, file, plot_file.suffix[1:])


def measured(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    schedules: tuple[schedule.Schedule, ...],
    autocast: str | None = None,
    backends: tuple[str, ...] = (),
    compiled: bool = False,
    cuda_graph: bool = False,
    runs: int = 15,
    warm_up: int = 3,
) -> list[Result]:
    """Measure the model unpatched and with each schedule, r = 0 before them, on a batch.

    Raises:
        click.ClickException: it cannot be patched, a schedule does not fit it, or no backend runs it.

    """
    device = x.device
    shape = models.patched_shape(model)
    patch.unpatch(model)
    schedules = schedules or tuple(r for r in DEFAULT if schedule.too_large(r, *shape) is None)
    schedules = (0, *(r for r in schedules if r != 0))
    plans = {"none": schedule.plan(0, *shape)} | {str(r): models.checked_plan(name, shape, r) for r in schedules}
    flops = {"none": cost.flops(model)} | {str(r): cost.flops(model, r) for r in schedules}

    calls: dict[Variant, measure.Call] = {}
    first_seconds: dict[Variant, float] = {}
    modes = ("eager", "compiled") if compiled else ("eager",)
    for variant, layers in _variants(model, schedules, backends or (backend.get_backend(),), modes):
        call = _call(torch.compile(layers) if variant.mode == "compiled" else layers, x, variant.backend, autocast)
        try:
            first_seconds[variant] = measure.time_calls({"": call}, device, 0, 1, progress=False)[""][0]
        except backend.BackendError as error:
            raise click.ClickException(str(error)) from error
        calls[variant] = measure.graphed(call) if cuda_graph else call
    seconds = measure.time_calls(calls, device, warm_up, runs)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    results = []
    for variant, times in seconds.items():
        unmerged = medians.get(replace(variant, r="0"))
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else None
        results.append(
            Result(
                **asdict(variant),
                tokens=plans[variant.r].tokens,
                gflops=flops[variant.r] / 1e9,
                images_per_second=len(x) / medians[variant],
                median_ms=medians[variant] * 1e3,
                spread_percent=100 * (quartiles[2] - quartiles[0]) / medians[variant] if quartiles else None,
                peak_mib=measure.peak_memory(calls[variant], device) / 2**20,
                first_call_s=first_seconds[variant],
                speedup=medians[Variant("none", "", variant.mode)] / medians[variant],
                merging=None if unmerged is None else unmerged / medians[variant],
                allowed=flops["none"] / flops[variant.r],
            )
        )
    return results


def _variants(
    model: nn.Module,
    schedules: tuple[schedule.Schedule, ...],
    backends: tuple[str, ...],
    modes: tuple[str, ...],
) -> Iterator[tuple[Variant, nn.Module]]:
    for mode in modes:
        yield Variant("none", "", mode), model
    for r, name, mode in product(schedules, backends, modes):
        yield Variant(str(r), name, mode), evaluate.twin(model, r)


def _call(
    model: Callable[[torch.Tensor], object], x: torch.Tensor, backend_name: str, autocast: str | None
) -> measure.Call:
    if autocast is None and backend_name in ("", backend.get_backend()):
        return lambda: model(x)

    def call() -> object:
        with ExitStack() as stack:
            stack.enter_context(models.autocast_to(autocast, x.device))
            stack.enter_context(backend.use_backend(backend_name or None))
            return model(x)

    return call


def cells(results: list[Result]) -> tables.Cells:
    """A row for each variant."""
    rows = [
        [
            row.name,
            f"{row.tokens[0]}-{row.tokens[-1]}",
            f"{row.gflops:.2f}",
            tables.rate(row.images_per_second),
            f"{row.median_ms:.4g}",
            "-" if row.spread_percent is None else f"{row.spread_percent:.1f}%",
            f"{row.peak_mib:.0f}",
            f"{row.speedup:.2f}x",
            "" if row.merging is None else f"{row.merging:.2f}x",
            f"{row.allowed:.2f}x",
            f"{row.share:.2f}",
        ]
        for row in results
    ]
    return tables.Cells(
        ["r", "tokens", "GFLOPs", "im/s", "ms", "spread", "MiB", "speed-up", "by merging", "allowed", "share"],
        rows,
        f"ms: median of a batch. {SPREAD} MiB: most memory that a pass adds. speed-up: measured. by merging: against "
        f"r = 0 of the same path; the rest is the kernels'. {ALLOWED} share: speed-up / allowed.",
    )


def _print(results: list[Result], conditions: dict[str, str]) -> None:
    title, whole = "against the unpatched model with fused attention, same run", cells(results)
    console = Console()
    if console.width >= WHOLE:
        whole.show(console, title)
    else:  # figures cut short are worse than a long line
        narrow = whole.of(*NARROW, note=f"{SPREAD} {ALLOWED} {FEWER}")
        least = sum(2 + max(map(len, column)) for column in zip(narrow.heads, *narrow.rows, strict=True))
        narrow.show(Console(width=max(console.width, 1 + least)), title)
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True)
