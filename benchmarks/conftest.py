"""The report of ``nox -s bench``: beside each time the time that the bytes alone would take."""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from rich.table import Table

from tome import measure


@pytest.fixture(scope="session")
def bandwidth() -> Callable[[torch.device], float]:
    """Bytes per second of a large copy (read plus written), measured once a device in this run."""
    found: dict[torch.device, float] = {}

    def measured(device: torch.device) -> float:
        if device not in found:
            source = torch.empty((256 if device.type == "cpu" else 1024) * 2**20, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            seconds = measure.time_calls({"copy": lambda: target.copy_(source)}, device, 3, 9, progress=False)["copy"]
            found[device] = 2 * source.numel() / sorted(seconds)[len(seconds) // 2]
        return found[device]

    return measured


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print time, byte floor, their ratio and the bandwidth reached."""
    session = getattr(config, "_benchmarksession", None)
    rows = [] if session is None else [b for b in session.benchmarks if "floor_us" in b.extra_info]
    if not rows:
        return
    table = Table("operation", "backend", "shape", "dtype", "median us", "byte floor us", "ratio", "GB/s")
    for row in rows:
        info, median = row.extra_info, row.stats.median * 1e6
        table.add_row(
            info["op"], info["backend"], info["shape"], info["dtype"], f"{median:.1f}", f"{info['floor_us']:.1f}",
            f"{median / info['floor_us']:.1f}x", f"{info['bytes'] / median / 1e3:.1f}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    for device in sorted({row.extra_info["backend"].split("/")[1] for row in rows}):
        machine = measure.machine(torch.device(device))
        console.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
