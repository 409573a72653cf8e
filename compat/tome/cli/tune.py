"""``tome tune``: the schedule for a model, images and this machine, found without training and proved in a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tome import data, measure, tune
from tome.cli import files, models, tables
from tome.cli.setup import Options, Setup

MOST_IMAGES = 256  # in a batch that is chosen here: more make tuning slow
READ_AT_ONCE = 16
UNMET = 1  # the exit code where no schedule does what was asked for


def run(options: Options, wish: tune.Wish) -> int:
    """Tune, print, and write what was asked for; the exit code."""
    setup = Setup(options, models.find_device(options.device))
    with models.failing_in_a_line():
        made = tuned(options, setup, setup.images, wish)
    _show(made, wish)
    found, conditions = made.found, made.conditions
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


class Made(NamedTuple):
    """What was found, under which conditions, and the images that cannot be read."""

    found: tune.Tuned
    conditions: dict[str, str]
    broken: list[str]


def tuned(options: Options, setup: Setup, images: data.Images, wish: tune.Wish) -> Made:
    """Tune on these images; what a run fails with is left to the caller (:func:`tome.cli.models.failing_in_a_line`).

    Raises:
        click.ClickException: the images are too few, or the wish is not one for this model.

    """
    device = setup.device
    batch_size = options.batch_size or setup.batch_size(MOST_IMAGES)
    x, labels, broken = _read(options, setup, images)
    columns = (TextColumn("tuning"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(done: float, what: str) -> None:
            bar.update(task, completed=done, description=what)

        try:
            found = tune.tune(
                setup.base,
                x,
                wish,
                batch_size,
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
        "batch size": str(batch_size),
        "dtype": options.dtype,
        "autocast": str(options.autocast),
        "wish": f"{wish.kind} {wish.value:.12g}",
        **measure.machine(device),
    }
    return Made(found, conditions, broken)


def _read(options: Options, setup: Setup, images: data.Images) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """All images at once, in the model's dtype, their labels where they mean something, and those that are broken."""
    read = list(data.batches(images, READ_AT_ONCE, options.workers or 0, torch.device("cpu")))
    broken = [name for batch in read for name in batch.broken]
    whole = [batch for batch in read if len(batch.x)]
    if not whole:
        raise click.UsageError(f"none of the images of {options.data} can be read: {broken[0]}, ...")
    labels = torch.cat([batch.label for batch in whole]) if setup.labelled and setup.classes is not None else None
    return torch.cat([batch.x for batch in whole]).to(setup.device, setup.dtype), labels, broken


def cells(found: tune.Tuned) -> tables.Cells:
    """The proof run, a row for each schedule."""
    has_classes = found.tuned.drop == found.tuned.drop  # else NaN
    rows = [
        [
            row.name,
            f"{row.tokens[0]}-{row.tokens[-1]}",
            f"{max(row.distance, 0.0):.2e}",
            *([f"{row.drop:.2f}"] if has_classes else []),
            f"{1e3 * row.seconds:.2f}",
            f"{row.speedup:.2f}x",
        ]
        for row in found.rows
    ]
    drop = "drop: points of top-1 accuracy, or without labels images of another class, in percent. "
    return tables.Cells(
        ["", "tokens", "1 - cosine", *(["drop"] if has_classes else []), "ms", "speed-up"],
        rows,
        "1 - cosine: of the pooled features to the unpatched model's, mean. " + (drop if has_classes else "")
        + "constant r and (r, -1): in whole tokens, brought to the speed of the tuned schedule.",
    )  # fmt: skip


def asked(wish: tune.Wish) -> str:
    """The option that a wish comes from."""
    return f"--{wish.kind.replace('_', '-')} {wish.value:.12g}"


def nothing_merges(found: tune.Tuned, wish: tune.Wish) -> str | None:
    """What there is to say where the kernels alone do what was asked for."""
    if not wish.is_of_time or not found.is_met or any(found.r):
        return None
    without = f"without merging the model is {found.tuned.speedup:.2f}x as fast as unpatched"
    return f"nothing has to merge for {asked(wish)}: {without}. Ask for more to see what merging gives."


def _show(made: Made, wish: tune.Wish) -> None:
    found, conditions, broken = made
    console = Console(width=max(Console().width, 100))
    cells(found).show(console, "at one measured speed, against the unpatched model, same run")
    for told in [f"not read: {name}" for name in broken] + tables.random_weights(conditions):
        console.print(escape(told), soft_wrap=True)
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True, markup=False)
    if not found.is_met:
        told = f"no schedule was found that does {asked(wish)}; this is the nearest:"
        console.print(told, soft_wrap=True, markup=False)
        if wish.is_of_time and "gpu" in conditions and found.costs.waits_for_host:
            console.print(
                f"at batch size {conditions['batch size']} a block takes nearly as long with a few tokens as with all: "
                "the host sets the pace, and merging saves nothing there. Try a larger --batch-size.",
                soft_wrap=True,
            )
    elif (nothing := nothing_merges(found, wish)) is not None:
        console.print(nothing, soft_wrap=True, markup=False)
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
