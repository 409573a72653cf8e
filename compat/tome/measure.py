"""Time and memory of calls, on any device, fairly: the variants take turns."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import TypeVar

import torch
from rich.progress import Progress

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")


def checked_device(device: torch.device | str | int) -> torch.device:
    """The device, if it is there.

    Raises:
        ValueError: no such device, one that is not measured (mps), or a GPU that is not there.

    """
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    checked = torch.device(name)
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs an NVIDIA GPU and none is available: use cpu")
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: the last is cuda:{torch.cuda.device_count() - 1}")
    return checked


def time_calls(
    calls: dict[Name, Call], device: torch.device, warm_up: int, runs: int, progress: bool = True
) -> dict[Name, list[float]]:
    """Seconds of each of ``runs`` calls of each variant, after ``warm_up`` calls that are not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    with torch.inference_mode(), Progress(transient=True) if progress else nullcontext() as bar:
        task = None if bar is None else bar.add_task("measuring", total=(warm_up + runs) * len(calls))
        for run in range(warm_up + runs):
            for name, call in calls.items():
                elapsed, _ = timed(call, device)
                if run >= warm_up:
                    seconds[name].append(elapsed)
                if bar is not None and task is not None:
                    bar.update(task, advance=1, description=f"measuring {name}".rstrip())
    return seconds


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call, and its result."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3, result
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def graphed(call: Call) -> Call:
    """The same as the replay of a CUDA graph."""
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


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes of tensors that one call holds at most, beyond what was there before."""
    with torch.inference_mode():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with (
            _quiet_stderr(),
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profile,
        ):
            call()
    held = peak = 0
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    for event in results.events() if results is not None else []:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for the head of every table of figures."""
    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
        info["cuda"] = str(torch.version.cuda)
        info["driver"] = driver_version() or "unknown"
    return info


def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what C++ code writes to stderr: the profiler reports there that it found no GPU, and more."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
