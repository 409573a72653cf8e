"""The CUDA library on a CPU: built by the system's C++ compiler against a small emulator of CUDA's threads.

The emulator (include/) runs the unchanged kernels, one fibre per thread, behind the unchanged host code, whose
operators are torch's to call as ``torch.ops.tome_emulated`` with tensors on the CPU. It checks index arithmetic,
barriers, alignment, rounding, arguments and launches; it can't check speed, real concurrency or the compiler for the
GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from cuda_emulator.build import library, missing

__all__ = ["HOPPER", "SMALL", "STATIC_BYTES", "Gpu", "Plan", "begin", "end", "library", "missing", "planned", "run",
           "second_grant"]  # fmt: skip

STATIC_BYTES = 9 << 10  # the most static shared memory of a kernel: kStaticReserve of launch.cuh


class Gpu(NamedTuple):
    """What host code asks of a GPU. Images can't share one with 0 ``multiprocessor_bytes``, and take tiles."""

    shared_bytes: int = 227 << 10  # of a block
    multiprocessor_bytes: int = 228 << 10
    multiprocessors: int = 132


class Plan(NamedTuple):
    """How launches are divided; 0 and False leave it to the library."""

    block_outputs: int = 0  # output rows of a block that merges or restores
    teams: int = 0  # heads of a block: 1, 2 or 4
    splits: int = 0  # blocks of a head
    is_streamed: bool = False  # keys and values pass by in tiles


HOPPER, SMALL = Gpu(), Gpu(99 << 10, 100 << 10, 84)
AS_PLANNED = Plan()


def run(name: str, *args: Any, seed: int = 0, gpu: Gpu = HOPPER, plan: Plan = AS_PLANNED) -> Any:
    """Call an operator; ``seed`` orders blocks and threads.

    Raises:
        AssertionError: a kernel wrote beside a tensor that was allocated for it.
        RuntimeError: the host code refuses the arguments, or CUDA would refuse a launch.

    """
    begin(seed, gpu, plan)
    out = getattr(torch.ops.tome_emulated, name)(*args)
    end()
    return out


def begin(seed: int = 0, gpu: Gpu = HOPPER, plan: Plan = AS_PLANNED, plan_only: bool = False) -> None:
    """What follows is for this GPU."""
    library().emulated_gpu(*gpu, int(plan_only))
    library().emulated_begin(seed, *map(int, plan))


def end() -> int:
    """How many kernels were launched since :func:`begin`.

    Raises:
        AssertionError: one of them wrote beside a tensor that was allocated for it.

    """
    launches: int = library().emulated_end()
    assert launches >= 0, "a kernel wrote beside its output"
    return launches


def planned(name: str, *args: Any, gpu: Gpu = HOPPER) -> int:
    """How many launches an operator makes; nothing is read or computed, so tensors may be larger than memory.

    Raises:
        RuntimeError: CUDA would refuse one of them.

    """
    begin(gpu=gpu, plan_only=True)
    getattr(torch.ops.tome_emulated, name)(*args)
    return end()


def second_grant(needed: int, granted: int) -> int:
    """How many launches are made of a kernel that is refused its shared memory at first, and granted it later.

    Raises:
        AssertionError: CUDA would refuse the second one.

    """
    why = ctypes.create_string_buffer(200)
    launches: int = library().emulated_second_grant(needed, granted, why, len(why))
    assert not why.value, why.value.decode()
    return launches
