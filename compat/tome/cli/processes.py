"""Several processes that share one piece of work, as torchrun starts them; without it one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import click
import torch
import torch.distributed as dist

from tome.cli import models

T = TypeVar("T")


class Place(NamedTuple):
    """Which of the processes this is, and what it computes on."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def cores(self) -> int:
        """Those of the machine for each of its processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // _number("LOCAL_WORLD_SIZE", 1))

    def gathered(self, value: T) -> list[T]:
        """The value of each process, by rank; all must ask."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


@contextmanager
def joined(device_name: str | None) -> Iterator[Place]:
    """One of the processes that torchrun started, with a GPU of its own where there are some.

    Raises:
        click.BadParameter: a device that is not there, or one GPU for all.

    """
    world = _number("WORLD_SIZE", 1)
    device = models.find_device(device_name)
    if world == 1:
        yield Place(device)
        return
    if device.type == "cuda":
        if device.index is not None:
            raise click.BadParameter("each process takes its own: write cuda without a number", param_hint="--device")
        device = models.find_device(f"cuda:{_number('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Shares end at different times; torchrun ends all when one fails.
    dist.init_process_group(backend, timeout=timedelta(days=1), device_id=device if backend == "nccl" else None)
    try:
        yield Place(device, _number("RANK", 0), world)
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
