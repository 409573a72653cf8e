"""How fast a model is with and without merging, beside what the saved arithmetic allows.

    python examples/benchmark.py --model vit_base_patch16_224 --r 8 --r 16 --batch-size 256 --half

The model and its patched copies take turns, so that whatever else the machine does happens to all of them. Speed hardly
depends on the weights: they are random, and nothing is downloaded. ``tome bench`` also tells spread and memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import click
import torch
from torch import nn

from tome import cost, evaluate, measure, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, device


class Speed(NamedTuple):
    """What was measured of one schedule."""

    images_per_second: float
    speedup: float  # of the unpatched model
    allowed: float  # its FLOPs, by those that are left


def benchmark(
    model: nn.Module, schedules: Sequence[schedule.Schedule], batch_size: int = 16, runs: int = 10, warm_up: int = 2
) -> dict[str, Speed]:
    """Median speed of the unpatched model and of each schedule, on random images.

    Args:
        model: unpatched, in eval mode; its dtype and device are those that are measured.
        schedules: what r may be.
        batch_size: images of a pass.
        runs: passes of each that are timed.
        warm_up: passes of each before.

    """
    like, size = next(model.parameters()), cost.input_size(model)
    images = torch.rand(batch_size, *size, dtype=like.dtype, device=like.device)
    variants: dict[str, nn.Module] = {"unpatched": model}
    flops = {"unpatched": cost.flops(model)}
    for r in schedules:
        variants[f"r = {r}"] = evaluate.twin(model, r)
        flops[f"r = {r}"] = cost.flops(model, r)
    calls: dict[str, measure.Call] = {name: partial(variant, images) for name, variant in variants.items()}
    seconds = measure.time_calls(calls, like.device, warm_up, runs, progress=False)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    base, whole = median["unpatched"], flops["unpatched"]
    return {name: Speed(batch_size / median[name], base / median[name], whole / flops[name]) for name in variants}


@click.command()
@click.option("--model", "name", default="vit_small_patch16_224", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(8, 16), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--half", is_flag=True, help="In float16, as one does on a GPU.")
@device
def main(
    name: str, schedules: tuple[schedule.Schedule, ...], batch_size: int, runs: int, half: bool, device: str | None
) -> None:
    """Measure a model, unpatched and with each --r."""
    where = models.find_device(device)
    model = models.load(name, device=where).model
    found = benchmark(model.half() if half else model, schedules, batch_size, runs)
    print(", ".join(f"{part} {value}" for part, value in measure.machine(where).items()))
    print(f"{'':>14} {'images/s':>9} {'speed-up':>9} {'arithmetic allows':>18}")
    for label, speed in found.items():
        print(f"{label:>14} {speed.images_per_second:9.1f} {speed.speedup:8.2f}x {speed.allowed:17.2f}x")


if __name__ == "__main__":
    main()
