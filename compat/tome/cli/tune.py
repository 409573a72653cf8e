"""``tome tune``: the schedule for a model, images and this machine, found without training and proved in a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tome import data, measure, tune
from tome.cli import files, models
from tome.cli.setup import Options, Setup

UNMET = 1  # the exit code where no schedule does what was asked for


def run(options: Options, wish: tune.Wish) -> int:
    """Tune, print, and write what was asked for; the exit code."""
    device = models.find_device(options.device)
    setup = Setup(options, device)
    x, labels, broken = _images(options, setup)
    columns = (TextColumn("tuning"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(done: float, what: str) -> None:
            bar.update(task, completed=done, description=what)

        try:
            with models.failing_in_a_line():
                found = tune.tune(
                    setup.base,
                    x,
                    wish,
                    options.batch_size or 16,
                    labels,
                    lambda: models.autocast_to(options.autocast, device),
                    tell=tell,
                )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    conditions = {
        "model": options.model,
        "weights": options.weights(),
        "data": options.data,
        "images": str(len(x)),
        "batch size": str(options.batch_size),
        "dtype": options.dtype,
        "autocast": str(options.autocast),
        "wish": f"{wish.kind} {wish.value:g}",
        **measure.machine(device),
    }
    _show(found, wish, conditions, broken)
    if options.json_file is not None:
        written = {
            "r": found.r,
            "met": found.is_met,
            "wish": wish._asdict(),
            "conditions": conditions,
            "results": [asdict(row) for row in found.rows],
            "costs": asdict(found.costs),
        }
        files.write_json(options.json_file, written)
    if options.plot_file is not None:
        with files.replacing(options.plot_file) as file:
            _draw(found, conditions, file, options.plot_file.suffix[1:])
    return 0 if found.is_met else UNMET


def _images(options: Options, setup: Setup) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """All images at once, in the model's dtype, their labels where they mean something, and those that are broken."""
    read = list(data.batches(setup.images, options.batch_size or 16, options.workers or 0, torch.device("cpu")))
    broken = [name for batch in read for name in batch.broken]
    whole = [batch for batch in read if len(batch.x)]
    if not whole:
        raise click.UsageError(f"none of the images of {options.data} can be read: {broken[0]}, ...")
    labels = torch.cat([batch.label for batch in whole]) if setup.labelled and setup.classes is not None else None
    return torch.cat([batch.x for batch in whole]).to(setup.device, setup.dtype), labels, broken


def _show(found: tune.Tuned, wish: tune.Wish, conditions: dict[str, str], broken: list[str]) -> None:
    console = Console(width=max(Console().width, 100))
    has_classes = found.tuned.drop == found.tuned.drop  # else NaN
    title = "at one measured speed, against the unpatched model, same run"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "tokens", "1 - cosine", *(["drop"] if has_classes else []), "ms", "speed-up"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            escape(row.name),
            f"{row.tokens[0]}-{row.tokens[-1]}",
            f"{max(row.distance, 0.0):.2e}",
            *([f"{row.drop:.2f}"] if has_classes else []),
            f"{1e3 * row.seconds:.2f}",
            f"{row.speedup:.2f}x",
        )
    console.print(table)
    drop = "drop: points of top-1 accuracy, or without labels images of another class, in percent. "
    console.print(
        "1 - cosine: of the pooled features to the unpatched model's, mean. " + (drop if has_classes else "")
        + "constant r and (r, -1): in whole tokens, brought to the speed of the tuned schedule.",
        soft_wrap=True,
    )  # fmt: skip
    for name in broken:
        console.print(escape(f"not read: {name}"), soft_wrap=True)
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True, markup=False)
    if not found.is_met:
        asked = f"{wish.kind.replace('_', '-')} {wish.value:g}"
        console.print(f"no schedule was found that does --{asked}; this is the nearest:", soft_wrap=True, markup=False)
    console.print(f"model.r = {found.r}", soft_wrap=True, markup=False)


def _draw(found: tune.Tuned, conditions: dict[str, str], file: Path, format_: str) -> None:
    """Tokens that enter each layer."""
    pyplot = files.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles: dict[str, Any] = {"tuned": {"color": "tab:orange", "linewidth": 2.5}}
    for row in found.rows[1:]:
        label = f"{row.name}: {row.speedup:.2f}x, 1 - cosine {row.distance:.1e}"
        axes.plot(range(len(row.tokens)), row.tokens, marker="o", markersize=3, label=label, **styles.get(row.name, {}))
    axes.set_xlabel("layer that the tokens enter; last: behind all layers")
    axes.set_ylabel("tokens")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{conditions['model']}, {conditions['data']}, batch {conditions['batch size']}, {conditions['dtype']}\n"
        f"{conditions.get('gpu', conditions['cpu'])}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=150, format=format_)
    finally:
        pyplot.close(figure)
