"""Tables of figures, and what ``tome evaluate`` prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tome.cli import files
from tome.cli.labels import place
from tome.evaluate import Result, pareto

NAMED = 5  # broken images that are named one by one
SHARES = {"top1": "top-1", "top5": "top-5", "same_top1": "same top-1"}


def rate(images_per_second: float) -> str:
    """Three digits: no two runs agree in more."""
    return f"{float(f'{images_per_second:.3g}'):.10g}"


class Cells(NamedTuple):
    """A table of text: the heads of its columns, its rows, and what the heads mean."""

    heads: list[str]
    rows: list[list[str]]
    note: str

    def of(self, *heads: str, note: str) -> Cells:
        """Some of the columns."""
        chosen = [self.heads.index(head) for head in heads]
        return Cells(list(heads), [[row[i] for i in chosen] for row in self.rows], note)

    def show(self, console: Console, title: str) -> None:
        """Print it."""
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print(escape(self.note), soft_wrap=True)


def cells(rows: dict[str, Result], tokens: dict[str, tuple[int, ...]]) -> Cells:
    """Answers and speed, a row for each schedule."""
    shares = {
        key: title for key, title in SHARES.items() if any(getattr(row, key) is not None for row in rows.values())
    }
    has_logits = any(row.kl is not None for row in rows.values())
    made = [
        [
            name,
            f"{tokens[name][0]}-{tokens[name][-1]}",
            *(f"{100 * getattr(row, key):.2f}%" for key in shares),
            f"{row.cosine:.4f}",
            *([f"{row.kl:.3g}"] if row.kl is not None else []),
            rate(row.images_per_second),
            f"{row.speedup:.2f}x",
        ]
        for name, row in rows.items()
    ]
    answers = "same top-1: the unpatched model's answer. KL: of the logits from the unpatched model's, in nats. "
    features = "cosine: of the pooled features with the unpatched model's."
    heads = ["r", "tokens", *shares.values(), "cosine", *(["KL"] if has_logits else []), "im/s", "speed-up"]
    return Cells(heads, made, (answers if has_logits else "") + features)


def show(
    rows: dict[str, Result], tokens: dict[str, tuple[int, ...]], run: dict[str, Any], conditions: dict[str, Any]
) -> None:
    """The table, and what is to be known of the run."""
    console = Console(width=max(Console().width, 100))  # figures cut short are worse than a long line
    cells(rows, tokens).show(console, "against the unpatched model, same run")
    for line in about(rows, run, conditions):
        console.print(escape(line), soft_wrap=True)
    console.print(escape(", ".join(f"{name} {short(value)}" for name, value in conditions.items())), soft_wrap=True)


def curve(rows: dict[str, Result]) -> tuple[list[tuple[float, float]], str]:
    """Throughput and accuracy, without labels agreement, of each schedule, and what the second is."""
    graded = all(row.top1 is not None for row in rows.values())
    points = [(row.images_per_second, 100 * row.top1 if row.top1 is not None else row.cosine) for row in rows.values()]
    return points, "top-1, %" if graded else "cosine with the unpatched model"


def draw(rows: dict[str, Result], conditions: dict[str, Any], file: Path, format_: str) -> None:
    """Accuracy, without labels agreement, against measured throughput, with the front of what nothing else beats."""
    pyplot = files.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    points, ordinate = curve(rows)
    front = [points[i] for i in pareto(points)]
    axes.step(*zip(*front, strict=True), where="post", color="tab:orange", linewidth=1, label="Pareto front", zorder=1)
    base, *merged = points
    axes.scatter(*base, color="0.4", zorder=3)
    axes.scatter(*zip(*merged, strict=True), color="tab:blue", zorder=3)
    names = [next(iter(rows)), *(f"r={name}" for name in list(rows)[1:])]
    axes.set_xlabel("images/s of the model alone")
    axes.set_ylabel(ordinate)
    device = conditions.get("gpu", conditions["cpu"])
    weights = f"{conditions['model']}, weights: {conditions['weights']}, {conditions['data']}"
    axes.set_title(f"{weights}\nbatch {conditions['batch size']}, {conditions['dtype']}, {device}", fontsize=8)
    axes.margins(x=0.14, y=0.14)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(loc="lower left", fontsize=8)
    place(axes, points, [f"{name}, {row.speedup:.2f}x" for name, row in zip(names, rows.values(), strict=True)])
    try:
        figure.savefig(file, dpi=150, format=format_)
    finally:
        pyplot.close(figure)


def about(rows: dict[str, Result], run: dict[str, Any], conditions: dict[str, Any]) -> list[str]:
    """What is to be known of a run, in sentences."""
    lines = []
    broken = run["broken"]
    seen = f"{run['images']} images"
    if broken:
        more = ", ..." if len(broken) > NAMED else ""
        seen += f"; {len(broken)} broken and left out: {', '.join(broken[:NAMED])}{more}"
    if run["ignored"]:
        seen += f"; files that are no images: {run['ignored']}"
    lines.append(seen)
    alone, whole = (rate(run[f"{part}_images_per_second"]) for part in ("model", "run"))
    lines.append(
        f"all {len(rows)} in turn: {alone} images/s of the models alone, {whole} of the whole run, which "
        f"waited for images for {100 * run['waited']:.1f}% of its time"
    )
    lines += [f"r {name}: {row.nonfinite} images gave no finite output" for name, row in rows.items() if row.nonfinite]
    return lines + random_weights(conditions)


def random_weights(conditions: dict[str, Any]) -> list[str]:
    """What to say of figures of an untrained model."""
    told = "the weights are random: speed is right, but agreement says nothing of a trained model"
    return [told] if conditions["weights"] == "random" else []


def short(value: Any) -> str:
    """A condition of a run, in one line."""
    if isinstance(value, dict):
        return " ".join(f"{key} {short(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
