"""The command lines that give again what is on a page of ``tome report``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tome import schedule
from tome.cli.arguments import RANDOM_WEIGHTS
from tome.cli.setup import Options


def literal(r: schedule.Schedule) -> str:
    """A schedule as ``--r`` takes it."""
    return f"{r[0]},{r[1]}" if isinstance(r, tuple) else json.dumps(r, separators=(",", ":"))


def bench(options: Options, schedules: Sequence[schedule.Schedule]) -> str:
    """Of the table of speeds."""
    return _line("bench", options.model, *_runs(options), *_batch(options), *_each(schedules))


def evaluate(options: Options, schedules: Sequence[schedule.Schedule]) -> str:
    """Of answers against speed."""
    limit = () if options.limit is None else ("--limit", options.limit)
    return _line("evaluate", options.model, *_images(options), *limit, *_batch(options), *_each(schedules))


def tune(options: Options, wish: str, images: int) -> str:
    """Of the schedule."""
    return _line(
        "tune", options.model, *_images(options), *wish.split(), "--limit", images, *_batch(options), "--json",
        "tuned.json",
    )  # fmt: skip


def visualize(options: Options, r: schedule.Schedule, photos: Sequence[str]) -> str | None:
    """Of the pictures; None where they are of no files, or where it would see them in another way."""
    others = (options.mean, options.std, options.crop, options.interpolation, options.autocast)
    if any(others) or options.dtype != "float32" or not photos or not all(Path(photo).is_file() for photo in photos):
        return None
    own = ("--model", options.model, *_weights(options))
    return _line("visualize", *photos, *own, *_each([r]), "--layers", "--sheet", "merges.png")


def report(options: Options, own: Sequence[object]) -> str:
    """Of the page."""
    limit = () if options.limit is None else ("--limit", options.limit)
    given = (*limit, *_batch(options), *_each(options.schedules))
    return _line("report", options.model, *_images(options), *given, *own)


def _line(*words: object) -> str:
    return shlex.join(["tome", *map(str, words)])


def _each(schedules: Sequence[schedule.Schedule]) -> list[str]:
    return [word for r in schedules for word in ("--r", literal(r))]


def _batch(options: Options) -> list[object]:
    return ["--batch-size", options.batch_size]


def _weights(options: Options) -> list[object]:
    """Which model, beside its name."""
    words: list[object] = [] if options.checkpoint is None else ["--checkpoint", options.checkpoint]
    if options.random_weights:
        words.append(RANDOM_WEIGHTS)
    if options.image_size is not None:
        words += ["--image-size", "x".join(map(str, options.image_size))]
    return words


def _runs(options: Options) -> list[object]:
    """What runs, and on what."""
    words = [word for word in _weights(options) if word != RANDOM_WEIGHTS]  # as it is in tome bench anyhow
    if options.dtype != "float32":
        words += ["--dtype", options.dtype]
    for key in ("autocast", "device"):
        if getattr(options, key) is not None:
            words += [f"--{key}", getattr(options, key)]
    return words


def _images(options: Options) -> list[object]:
    """The options of :func:`tome.cli.arguments.images`."""
    words: list[object] = ["--data", options.data]
    for key in ("root", "workers", "crop", "interpolation"):
        if getattr(options, key) is not None:
            words += [f"--{key}", getattr(options, key)]
    for key in ("mean", "std"):
        if getattr(options, key) is not None:
            words += [f"--{key}", ",".join(map(str, getattr(options, key)))]
    if not options.labels:
        words.append("--no-labels")
    if options.random_weights:
        words.append(RANDOM_WEIGHTS)
    return words + _runs(options)
