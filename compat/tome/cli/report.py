"""``tome report``: everything that the other commands tell of a model and images, as one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from tome import data, evaluate, schedule, tune
from tome.cli import bench, files, models, page, reproduce, visualize
from tome.cli import evaluate as evaluation
from tome.cli import tune as tuning
from tome.cli.processes import Place
from tome.cli.setup import UNPATCHED, Options, Setup
from tome.tune.proof import TUNED, seconds_of

STEPS = 3  # layers of a row of pictures
RIVALS = 2  # schedules beside them, behind their last layer
GAIN = 1.5  # by merging, that is tuned for if nothing is asked for
TRIED = 20  # images in place of one that is broken


def run(options: Options, tunes: bool, wish: tune.Wish | None, calibration: int, count: int, out: Path) -> int:
    """Tune, evaluate, measure, draw, and write the page; the exit code."""
    setup = Setup(options, models.find_device(options.device))
    with models.failing_in_a_line():
        batch_size = options.batch_size or setup.batch_size(tuning.MOST_IMAGES)
        options = replace(options, batch_size=batch_size)
        found = None
        if tunes:
            wish = wish or _usual_wish(setup, batch_size)
            calibration = min(calibration, len(setup.images.dataset))
            found = tuning.tuned(options, setup, _some(setup, calibration), wish)
        named = {str(r): r for r in setup.schedules}
        shown: dict[str, schedule.Schedule] = named
        if found is not None:
            shown = {row.name: row.r for row in found.found.rows[1:]}
            for name, r in shown.items():
                setup.add(name, r)
        with evaluation.measured(options, setup, Place(setup.device)) as figures:
            assert figures is not None  # of one process
        speeds: tuple[schedule.Schedule, ...] = (*setup.schedules, *([] if found is None else [found.found.r]))
        x = torch.randn(batch_size, *setup.size, device=setup.device, dtype=setup.dtype)
        benched = bench.measured(options.model, setup.base, x, speeds, options.autocast)
        photos = list(_photos(setup, count))
        drawn, reason = [], "there was no image that could be read"
        try:
            drawn = _drawn(setup, photos, dict(list(shown.items())[-RIVALS - 1 :]))
        except visualize.GridError as error:
            reason = f"{options.model} cannot be drawn: {error}"
    contents = page.Contents(
        figures,
        {name: plan.tokens for name, plan in setup.plans.items()},
        benched,
        _commands(options, wish, calibration, count, speeds, named | shown, photos, out),
        found,
        wish,
        drawn,
        reason,
    )
    text = page.render(contents)
    with files.replacing(out) as file:
        file.write_bytes(text.encode("utf-8", "replace"))  # names of files may hold any byte
    _tell(contents, out, len(text))
    return 0 if found is None or found.found.is_met else tuning.UNMET


def _usual_wish(setup: Setup, batch_size: int) -> tune.Wish:
    """GAIN times the speed without merging: on a GPU the kernels alone may be faster than the unpatched model."""
    faster = 1.0
    if setup.device.type == "cuda":
        x = torch.randn(batch_size, *setup.size, device=setup.device, dtype=setup.dtype)
        nothing = (0,) * setup.shape[0]
        alike = {UNPATCHED: nothing, TUNED: nothing}
        seconds = seconds_of(setup.base, x, alike, lambda: models.autocast_to(setup.autocast, setup.device))
        faster = max(1.0, seconds[UNPATCHED] / seconds[TUNED])
    return tune.Wish("speedup", round(GAIN * faster, 1))


def _some(setup: Setup, count: int) -> data.Images:
    """Some of the images, spread as ``--limit`` spreads them."""
    whole = setup.images.dataset
    return setup.images._replace(dataset=data.ImageDataset(whole.source, whole.transform, count))


def _photos(setup: Setup, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Images spread over all, and another in place of a broken one."""
    whole = setup.images.dataset
    photos: Any = data.ImageDataset(whole.source, lambda image: image, len(whole))  # type: ignore[arg-type, return-value]
    count = min(count, len(photos))
    for k in range(count):
        first, end = (each * len(photos) // count for each in (k, k + 1))
        for i in range(first, min(end, first + TRIED)):
            item = photos[i]
            if not isinstance(item, data.Broken):
                yield whole.source.name(i * len(whole.source) // len(whole)), item[0]
                break


def _drawn(
    setup: Setup, photos: Sequence[tuple[str, Image.Image]], shown: dict[str, schedule.Schedule]
) -> list[page.Drawn]:
    """Each image as the model sees it, steps of the last schedule, and what the others leave."""
    *rivals, main = shown
    twins = {name: evaluate.twin(setup.base, r) for name, r in shown.items()}
    layers = visualize.merging_layers(setup.plans[main])
    drawn = []
    for name, photo in track(photos, "drawing", transient=True):
        with models.autocast_to(setup.autocast, setup.device):
            seen = {each: visualize.see(twin, photo, transform=setup.pixels) for each, twin in twins.items()}
        (image, count), *steps = seen[main].strip(layers, STEPS)
        pictures = [page.Picture.of(image, f"as the model sees it: {count}", f"{name} as the model sees it")]
        pictures += [
            page.Picture.of(step, f"{main}, {told}", f"{name}, patches merged by the schedule {main}: {told}")
            for step, told in steps
        ]
        for rival in rivals:
            slot = seen[rival].slots[-1]
            told = f"at the end: {visualize.count_of(slot)} tokens"
            alt = f"{name}, patches merged by the schedule {rival} {told}"
            pictures.append(page.Picture.of(seen[rival].drawn(slot), f"{rival}, {told}", alt))
        drawn.append(page.Drawn(name, pictures))
    return drawn


def _commands(
    options: Options,
    wish: tune.Wish | None,
    calibration: int,
    count: int,
    speeds: Sequence[schedule.Schedule],
    schedules: dict[str, schedule.Schedule],
    photos: Sequence[tuple[str, Image.Image]],
    out: Path,
) -> dict[str, str]:
    """What gives each part of the page again, by the name of the part."""
    asked = "--no-tune" if wish is None else tuning.asked(wish)
    own = [*asked.split(), *([] if wish is None else ["--tune-images", calibration]), "--pictures", count, "--out", out]
    found = {"This page": reproduce.report(options, own)}
    if wish is not None:
        found["The tuned schedule"] = reproduce.tune(options, asked, calibration)
    found["Speed"] = reproduce.bench(options, speeds)
    found["Answers against speed"] = reproduce.evaluate(options, list(schedules.values()))
    main = list(schedules)[-1]
    line = reproduce.visualize(options, schedules[main], [name for name, _ in photos])
    if line is not None:
        found[f"Merges, {main}" if main == TUNED else f"Merges, r = {main}"] = line
    return found


def _tell(contents: page.Contents, out: Path, size: int) -> None:
    rows, console = contents.figures.rows, Console()
    name = TUNED if contents.made is not None else UNPATCHED
    if contents.made is not None and contents.wish is not None and not contents.made.found.is_met:
        told = f"no schedule was found that does {tuning.asked(contents.wish)}; this is of the nearest:"
        console.print(told, soft_wrap=True, markup=False)
    tuned = f", tuned: {rows[name].speedup:.2f}x, cosine {rows[name].cosine:.4f}" if name == TUNED else ""
    merged = ", ".join(r for r in rows if r != UNPATCHED)
    told = f"{out}: r {merged} on {contents.figures.run['images']} images{tuned} ({size / 1e6:.1f} MB)"
    console.print(told, soft_wrap=True, markup=False)
