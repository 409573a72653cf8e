"""What ``tome bench`` prints and draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tome import backend
from tome.cli import files
from tome.cli.labels import three_digits

# What leaves a table that the terminal is too narrow for, the first first.
DISPENSABLE = ("share", "MiB", "GFLOPs", "ms", "allowed", "merging", "spread", "tokens")
MEANINGS = {
    "ms": "median of a batch",
    "spread": "quartile distance / median, - of a single run",
    "MiB": "most memory that a pass adds",
    "speed-up": "measured",
    "merging": "against r = 0 of the same path; the rest is the kernels'",
    "allowed": "FLOPs unpatched / FLOPs merged",
    "share": "speed-up / allowed",
}


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
    spread_percent: float | None  # of a single run there is none
    peak_mib: float
    first_call_s: float
    speedup: float
    merging: float | None
    allowed: float

    @property
    def share(self) -> float:
        """The part of the speed-up that the saved arithmetic allows."""
        return self.speedup / self.allowed


def _cells(row: Result) -> dict[str, str]:
    return {
        "r": escape(str(Variant(row.r, row.backend, row.mode))),
        "tokens": f"{row.tokens[0]}-{row.tokens[-1]}",
        "GFLOPs": f"{row.gflops:.2f}",
        "im/s": three_digits(row.images_per_second),
        "ms": three_digits(row.median_ms),
        "spread": "-" if row.spread_percent is None else f"{row.spread_percent:.{int(row.spread_percent < 10)}f}%",
        "MiB": f"{row.peak_mib:.0f}",
        "speed-up": f"{row.speedup:.2f}x",
        "merging": "" if row.merging is None else f"{row.merging:.2f}x",
        "allowed": f"{row.allowed:.2f}x",
        "share": f"{row.share:.2f}",
    }


def show(results: list[Result], conditions: dict[str, str]) -> None:
    """The table, and what its columns mean."""
    rows = [_cells(row) for row in results]
    shown = list(rows[0])
    for name in ("", *DISPENSABLE):
        shown = [each for each in shown if each != name]
        table = Table(title="against the unpatched model, same run", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.show_edge = False
        for each in shown:
            table.add_column(each, justify="left" if each == "r" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[each] for each in shown))
        width = Console(width=1000).measure(table).maximum
        if width <= Console().width:
            break
    console = Console(width=max(Console().width, width))  # figures cut short are worse than a long line
    console.print(table)
    meanings = ". ".join(f"{name}: {MEANINGS[name]}" for name in shown if name in MEANINGS)
    left_out = ", ".join(name for name in rows[0] if name not in shown)
    more = f" A wider terminal also shows {left_out}; --json has all." if left_out else ""
    console.print(f"The unpatched model has fused attention. {meanings}.{more}", soft_wrap=True)
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True)


# Who merges, as the legend of a plot has it.
MERGED_BY = {
    "none": ("0.6", "unpatched"),
    "cuda": ("tab:green", "merged by the kernels (cuda)"),
    "reference": ("tab:blue", "merged by plain PyTorch (reference)"),
}


def _merged_by(row: Result, conditions: dict[str, str]) -> str:
    if row.r == "none" or row.backend in MERGED_BY:
        return "none" if row.r == "none" else row.backend
    return "cuda" if "gpu" in conditions and backend.extension_problem() is None else "reference"


def draw(results: list[Result], conditions: dict[str, str], file: Path, format_: str) -> None:
    """A bar a row, the first on top: names and figures have room at the sides."""
    pyplot = files.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 1.6 + 0.32 * len(results)), layout="constrained")
    for who, (colour, label) in MERGED_BY.items():
        own = [i for i, row in enumerate(results) if _merged_by(row, conditions) == who]
        if own:
            axes.barh(own, [results[i].images_per_second for i in own], color=colour, label=label)
    names = [str(Variant(row.r, row.backend, row.mode)) for row in results]
    figures = [f"{three_digits(row.images_per_second)}/s, {row.speedup:.2f}x" for row in results]
    axes.set_yticks(range(len(results)), names)
    axes.secondary_yaxis("right").set_yticks(range(len(results)), figures)
    axes.invert_yaxis()
    axes.set_ylabel("r")
    axes.set_xlabel("images/s, and against unpatched")
    device = conditions.get("gpu", conditions["cpu"])
    figure.suptitle(
        f"{conditions['model']}, batch {conditions['batch size']}, {conditions['dtype']}\n{device}",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=len(MERGED_BY), fontsize=8)
    try:
        figure.savefig(file, dpi=150, format=format_)
    finally:
        pyplot.close(figure)
