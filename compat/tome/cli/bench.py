"""``tome bench``: throughput against the honest baseline, the unpatched model with fused attention, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import click
import torch
from timm.layers import set_fused_attn
from torch import nn

from tome import backend, cost, evaluate, measure, patch, schedule
from tome.cli import files, models
from tome.cli.rows import Result, Variant, draw, show

DEFAULT: tuple[schedule.Schedule, ...] = (8, 16, (16, -1.0))


def run(
    model_name: str,
    schedules: tuple[schedule.Schedule, ...],
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device_name: str | None,
    checkpoint: Path | None,
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
    shape = models.patched_shape(model)
    patch.unpatch(model)
    schedules = schedules or tuple(r for r in DEFAULT if schedule.too_large(r, *shape) is None)
    schedules = (0, *(r for r in schedules if r != 0))
    plans = {"none": schedule.plan(0, *shape)} | {str(r): models.checked_plan(model_name, shape, r) for r in schedules}
    flops = {"none": cost.flops(model)} | {str(r): cost.flops(model, r) for r in schedules}

    x = torch.randn(batch_size, *cost.input_size(model), device=device, dtype=models.dtype_of(dtype))
    calls: dict[Variant, measure.Call] = {}
    first_seconds: dict[Variant, float] = {}
    modes = ("eager", "compiled") if compiled else ("eager",)
    for variant, layers in _variants(model, schedules, backends or (backend.get_backend(),), modes):
        call = _call(torch.compile(layers) if variant.mode == "compiled" else layers, x, variant.backend, autocast)
        try:
            first_seconds[variant] = measure.time_calls({"": call}, device, 0, 1, progress=False)[""][0]
        except backend.BackendError as error:
            raise click.ClickException(str(error)) from error
        calls[variant] = _graphed(call) if cuda_graph else call
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
                images_per_second=batch_size / medians[variant],
                median_ms=medians[variant] * 1e3,
                spread_percent=None if quartiles is None else 100 * (quartiles[2] - quartiles[0]) / medians[variant],
                peak_mib=measure.peak_memory(calls[variant], device) / 2**20,
                first_call_s=first_seconds[variant],
                speedup=medians[Variant("none", "", variant.mode)] / medians[variant],
                merging=None if unmerged is None else unmerged / medians[variant],
                allowed=flops["none"] / flops[variant.r],
            )
        )
    conditions = {
        "model": model_name,
        "batch size": str(batch_size),
        "dtype": dtype,
        "autocast": str(autocast),
        "cuda graph": str(cuda_graph),
        **measure.machine(device),
    }
    show(results, conditions)
    if json_file is not None:
        rows = [{**asdict(result), "share": result.share} for result in results]
        files.write_json(json_file, {"conditions": conditions, "results": rows})
    if plot_file is not None:
        with files.replacing(plot_file) as file:
            draw(results, conditions, file, plot_file.suffix[1:])


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


def _graphed(call: measure.Call) -> measure.Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # allocations and library handles come before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        call()
    return graph.replay
