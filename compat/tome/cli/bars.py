"""What ``tome bench`` draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tome import backend
from tome.cli import files, tables

if TYPE_CHECKING:
    from tome.cli.bench import Result

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
    names = [row.name for row in results]
    figures = [f"{tables.rate(row.images_per_second)}/s, {row.speedup:.2f}x" for row in results]
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
