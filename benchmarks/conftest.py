"""How ``nox -s bench`` times operations, and its report: beside each time what the bytes alone would take."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from tome import measure

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
CALLS = 12  # in one measurement on a GPU, over the sets of inputs in turn
ROUNDS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FILE", help="write every figure of the report to FILE as JSON")


@pytest.fixture(scope="session")
def bandwidth() -> Callable[[torch.device], float]:
    """Bytes per second of a large copy (read plus written), measured once a device in this run."""
    found: dict[torch.device, float] = {}

    def measured(device: torch.device) -> float:
        if device not in found:
            source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            # By a kernel: in a graph a copy is left to a slower engine.
            copy = [lambda: torch.bitwise_not(source, out=target)]
            found[device] = 2 * source.numel() / median_seconds(copy, device)
        return found[device]

    return measured


def median_seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Seconds of one call. On a GPU CUDA events around replays of a graph of calls, so that launches do not count."""
    if device.type == "cpu":
        return statistics.median(measure.time_calls({"": calls[0]}, device, 3, 9, progress=False)[""])
    replay = repeated(calls)
    return statistics.median(measure.time_calls({"": replay}, device, 3, ROUNDS, progress=False)[""]) / CALLS


def repeated(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The calls in turn, CALLS in all, as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    return graph.replay


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print, and write with --figures, time, byte floor, their ratio, the bandwidth reached and who is faster."""
    session = getattr(config, "_benchmarksession", None)
    rows = [] if session is None else [b.extra_info for b in session.benchmarks if "floor_us" in b.extra_info]
    if not rows:
        return
    times = {(row["op"], row["shape"], row["dtype"], row["backend"]): row["median_us"] for row in rows}
    table = Table(
        "operation", "backend", "shape", "dtype", "median us", "byte floor us", "ratio", "TB/s", "vs reference"
    )
    for row in rows:
        device = row["backend"].split("/")[1]
        base = times.get((row["op"], row["shape"], row["dtype"], f"reference/{device}"))
        row["faster"] = None if base is None else base / row["median_us"]
        table.add_row(
            *(row["op"], row["backend"], row["shape"], row["dtype"], f"{row['median_us']:.1f}"),
            *(f"{row['floor_us']:.1f}", f"{row['median_us'] / row['floor_us']:.2f}x"),
            *(f"{row['bytes'] / row['median_us'] / 1e6:.3g}", "" if base is None else f"{row['faster']:.2f}x"),
        )
    console = Console(width=150)
    console.print(table)
    devices = sorted({row["backend"].split("/")[1] for row in rows})
    machines = {device: measure.machine(torch.device(device)) for device in devices}
    for machine in machines.values():
        console.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
    if file := config.getoption("--figures"):
        file.write_text(json.dumps({"conditions": machines[devices[-1]], "results": rows}, indent=1) + "\n")
