"""``tome evaluate``: accuracy, agreement with the unmerged model and speed of schedules, on images of one's own."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tome import data, evaluate, measure
from tome.cli import files, models, partial, processes, tables
from tome.cli.setup import Options, Setup


def run(options: Options) -> None:
    """Evaluate, print, and write what was asked for."""
    with processes.joined(options.device) as place, models.failing_in_a_line():
        setup = Setup(options, place.device)
        with measured(options, setup, place) as figures:
            if figures is not None:
                _report(options, setup, figures)


class Figures(NamedTuple):
    """What came out: a result for each schedule, facts of the run, and its conditions."""

    rows: dict[str, evaluate.Result]
    run: dict[str, Any]
    conditions: dict[str, Any]


@contextmanager
def measured(options: Options, setup: Setup, place: processes.Place) -> Iterator[Figures | None]:
    """Evaluate all schedules; the figures are the first process's. What an interruption leaves goes behind this."""
    count = len(setup.images.dataset)
    batch_size = min(place.gathered(options.batch_size or setup.batch_size()))
    workers = options.workers
    if workers is None:
        workers = place.cores() if place.device.type == "cuda" else 0
    conditions = {
        "model": options.model,
        "weights": options.weights(),
        "data": options.data,
        "dtype": options.dtype,
        "autocast": str(options.autocast),
        "compile": str(options.compiled),
        "pixels": {key: value for key, value in setup.pixels.config.items() if key != "input_size"},
        "input": "x".join(map(str, setup.size)),
        "batch size": str(batch_size),
        "workers": str(workers),
        "processes": str(place.world),
        **measure.machine(place.device),
    }
    same = ("model", "data", "dtype", "autocast", "compile", "input", "pixels")
    header: dict[str, Any] = {key: conditions[key] for key in same}
    header |= {"images": count, "r": list(setup.calls), "checksums": setup.checksums}
    header = json.loads(json.dumps(header))  # as it is read
    target = options.json_file
    if target is not None and files.is_written_directly(target):
        target = None  # nothing lies beside a device
    before = partial.read(target, header) if options.resume and target is not None else []
    total, order = _resumed(place.gathered(before), count)
    done = total.images + len(total.broken)
    if place.rank:
        total = evaluate.Tally()
    writer = partial.Writer(target, header, place.rank)
    read = data.batches(setup.images, batch_size, workers, place.device, place.rank, place.world, order)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with closing(writer), Progress(*columns, transient=True, disable=place.rank > 0) as bar:
            task = bar.add_task("", total=count, completed=done)
            for positions, tally in evaluate.evaluate(setup.calls, read, batch_size, place.device, options.compiled):
                writer.write(positions, tally)
                total.add(tally)
                done += place.world * len(positions)
                bar.update(task, completed=min(done, count))
    except KeyboardInterrupt:
        if target is not None and not place.rank:
            click.echo(f"tome: {min(done, count)} of {count} images are kept: --resume goes on", err=True)
        raise
    tallies = place.gathered(total)
    if not any(each.images for each in tallies):
        writer.remove()
        name = next(name for each in tallies for name in each.broken)
        raise click.UsageError(f"none of the images of {options.data} can be read: {name}, ...")
    figures = None
    if not place.rank:
        for other in tallies[1:]:
            total.add(other)
        figures = _figures(setup, total, conditions, sum(bool(each.images) for each in tallies))
    yield figures
    place.gathered(None)  # nothing is removed before the results are there
    writer.remove()


def _resumed(gathered: list[list[dict[str, Any]]], count: int) -> tuple[evaluate.Tally, Sequence[int]]:
    """What has been done, and the places of the images that are left."""
    total, done = evaluate.Tally(), bytearray(count)
    for lines in gathered:
        for line in lines:
            positions = line.pop("positions")
            if not done[positions[0]]:  # else several processes saw the same file
                total.add(evaluate.Tally(**line))
                for position in positions:
                    done[position] = 1
    if not any(done):
        return total, range(count)
    return total, array("l", (i for i in range(count) if not done[i]))


def _figures(setup: Setup, total: evaluate.Tally, conditions: dict[str, Any], busy: int) -> Figures:
    rows = dict(zip(setup.calls, evaluate.results(total, setup.classes, setup.labelled), strict=True))
    run = {
        "images": total.images,
        "broken": sorted(total.broken),
        "ignored": len(setup.images.dataset.source.ignored),
        "model_images_per_second": busy * total.images / total.model_seconds(),
        "run_images_per_second": busy * total.images / total.seconds,
        "waited": total.waited / total.seconds,
    }
    return Figures(rows, run, conditions)


def _report(options: Options, setup: Setup, figures: Figures) -> None:
    rows, run, conditions = figures
    tables.show(rows, {r: plan.tokens for r, plan in setup.plans.items()}, run, conditions)
    if options.json_file is not None:
        found = [{"r": r, "tokens": setup.plans[r].tokens, **asdict(row)} for r, row in rows.items()]
        files.write_json(options.json_file, {"conditions": conditions, "run": run, "results": found})
    if options.plot_file is not None:
        with files.replacing(options.plot_file) as file:
            tables.draw(rows, conditions, file, options.plot_file.suffix[1:])
