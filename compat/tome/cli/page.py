"""The page of ``tome report``: what was measured, in one file of HTML that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader
from PIL import Image

from tome import backend, evaluate
from tome.cli import bench, charts, info, tables
from tome.cli.bench import Result
from tome.cli.evaluate import Figures
from tome.cli.setup import UNPATCHED
from tome.cli.tune import Made, asked, nothing_merges
from tome.cli.tune import cells as proof
from tome.tune import Wish
from tome.tune.proof import CONSTANT, FALLING, TUNED

COLOURS = ("s1", "s2", "s3", "s4", "s5")  # of templates/report.css
RIVALS = (CONSTANT, FALLING)  # what the tuned schedule is proved against
SHORTENED = {"cpu", "python", "torch", "timm", "gpu", "cuda", "driver"}  # conditions that facts tell of more fully


@dataclass(frozen=True)
class Picture:
    """One on the page."""

    source: str
    width: int
    height: int
    caption: str
    alt: str

    @staticmethod
    def of(image: Image.Image, caption: str, alt: str) -> Picture:
        """As a JPEG within the page."""
        data = io.BytesIO()
        image.save(data, format="jpeg", quality=85, subsampling=0)  # outlines are of one pixel
        source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        return Picture(source, image.width, image.height, caption, alt)


class Drawn(NamedTuple):
    """An image of the user's, and what is left of it."""

    name: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Contents:
    """What is on the page."""

    figures: Figures
    tokens: dict[str, tuple[int, ...]]  # of each schedule
    benched: list[Result]
    commands: dict[str, str]
    made: Made | None = None
    wish: Wish | None = None
    drawn: list[Drawn] = field(default_factory=list)
    drawn_not: str = ""  # why there are none


def render(contents: Contents) -> str:
    """HTML."""
    loader = PackageLoader("tome.cli")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["most"] = _most
    return environment.get_template("report.html").render(_context(contents)).lstrip()


def _context(contents: Contents) -> dict[str, Any]:
    rows, run, conditions = contents.figures
    points, ordinate = tables.curve(rows)
    shown = {name: point for name, point in zip(rows, points, strict=True) if all(map(math.isfinite, point))}
    graded = all(row.top1 is not None for row in rows.values())
    kinds = _kinds(list(rows))
    marks = [
        charts.Point(*point, name if name == UNPATCHED else f"{name} {rows[name].speedup:.2f}x", kinds[name])
        for name, point in shown.items()
    ]
    series = _series(contents)
    return {
        "conditions": conditions,
        "environment": _environment(contents),
        "lead": _lead(conditions, run["images"]),
        "images": run["images"],
        "tiles": _tiles(contents),
        "tiles_note": "Measured on your images, all schedules and the unpatched model taking turns. The other tables "
        "are of runs of their own: where they differ, that is the noise of this machine.",
        "tuned": _tuned(contents),
        "bench": _benched(contents),
        "graded": graded,
        "scatter": charts.scatter(
            marks, evaluate.pareto(list(shown.values())), "images/s of the model alone", ordinate
        ) if marks else [],
        "scatter_told": "Scatter plot. " + "; ".join(
            f"{name}: {tables.rate(x)} images/s, {ordinate.partition(',')[0]} {y:.4g}"
            for name, (x, y) in shown.items()
        ),
        "evaluated": tables.cells(rows, contents.tokens),
        "about": tables.about(rows, run, conditions),
        "tokens": charts.lines(
            series, kinds, "layer that the tokens enter; last: behind all layers", "tokens of an image"
        ),
        "tokens_told": "Line chart. " + "; ".join(f"{name}: {_listed(each)}" for name, each in series.items()),
        "tokens_lead": "The tuned schedule beside constant r and (r, -1) of the same measured speed."
        if contents.made is not None
        else "How many tokens enter each layer.",
        "series": {name: kinds[name] for name in series},
        "drawn": contents.drawn,
        "drawn_not": contents.drawn_not,
        "commands": contents.commands,
    }  # fmt: skip


def _lead(conditions: dict[str, Any], images: int) -> str:
    weights = conditions["weights"]
    weights = "weights of " + weights if "." in weights else f"{weights} weights"
    autocast = "" if conditions["autocast"] == "None" else f" under autocast to {conditions['autocast']}"
    device = conditions.get("gpu", conditions["cpu"])
    runs = f"batch {conditions['batch size']} in {conditions['dtype']}{autocast} on {device}"
    return f"{weights[0].upper()}{weights[1:]}, {images} images of {conditions['data']}, {runs}"


def _tiles(contents: Contents) -> list[dict[str, str]]:
    """The schedule that matters in four figures: the tuned one, or the fastest."""
    rows = contents.figures.rows
    name = TUNED if contents.made is not None else max(rows, key=lambda each: rows[each].speedup)
    base, row, tokens = rows[UNPATCHED], rows[name], contents.tokens[name]
    told = "tuned schedule" if name == TUNED else "unpatched model" if name == UNPATCHED else f"r = {name}"
    near = {"what": "Agreement", "value": f"{row.cosine:.4f}", "than": "mean cosine of the pooled features"}
    if row.top1 is not None and base.top1 is not None:
        points = f"{100 * (row.top1 - base.top1):+.2f}".replace("-", "\N{MINUS SIGN}")
        near = {"what": "Top-1, points", "value": points, "than": f"{100 * base.top1:.2f}% to {100 * row.top1:.2f}%"}
    return [
        {"what": "Speed-up", "value": f"{row.speedup:.2f}\N{MULTIPLICATION SIGN}", "than": told},
        near,
        {"what": "Images per second", "value": tables.rate(row.images_per_second),
         "than": f"{tables.rate(base.images_per_second)} unpatched"},
        {"what": "Tokens left", "value": str(tokens[-1]), "than": f"of {tokens[0]}"},
    ]  # fmt: skip


def _tuned(contents: Contents) -> dict[str, Any] | None:
    if contents.made is None or contents.wish is None:
        return None
    found = contents.made.found
    file = json.dumps({"r": found.r, "met": found.is_met, "conditions": contents.made.conditions}, indent=2) + "\n"
    return {
        "asked": asked(contents.wish),
        "is_met": found.is_met,
        "nothing": nothing_merges(found, contents.wish),
        "images": int(contents.made.conditions["images"]),
        "literal": f"model.r = {found.r}",
        "json": "data:application/json;base64," + base64.b64encode(file.encode()).decode(),
        "cells": proof(found),
    }


def _benched(contents: Contents) -> tables.Cells:
    named = {"none": UNPATCHED}
    if contents.made is not None:
        named[str(contents.made.found.r)] = TUNED
    return bench.cells([replace(row, r=named.get(row.r, row.r)) for row in contents.benched])


def _series(contents: Contents) -> dict[str, tuple[int, ...]]:
    """Tokens per layer: of the tuned schedule and its rivals, else of all."""
    wanted = [*RIVALS, TUNED] if contents.made is not None else list(contents.tokens)
    return {name: contents.tokens[name] for name in wanted if name in contents.tokens}


def _kinds(names: list[str]) -> dict[str, str]:
    """The colour of each schedule."""
    others = [name for name in names if name not in (UNPATCHED, TUNED, *RIVALS)]
    kinds = {name: COLOURS[0] if RIVALS[0] in names else COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return kinds | {UNPATCHED: "base", TUNED: "tuned", CONSTANT: "s2", FALLING: "s3"}


def _environment(contents: Contents) -> dict[str, str]:
    conditions = contents.figures.conditions
    return {
        "made": datetime.now().astimezone().isoformat(" ", "minutes"),
        **{name: tables.short(value) for name, value in conditions.items() if name not in SHORTENED},
        "backend": backend.get_backend(),
        "CPU": conditions["cpu"],
        **info.facts(),
    }


def _listed(tokens: tuple[int, ...]) -> str:
    return ", ".join(map(str, tokens))


def _most(cells: tables.Cells) -> float:
    """The greatest speed-up of a table."""
    at = cells.heads.index("speed-up")
    return max(float(row[at][:-1]) for row in cells.rows)
