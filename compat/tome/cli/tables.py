"""What ``tome evaluate`` prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tome.cli import files
from tome.cli.labels import place, three_digits
from tome.evaluate import Result, pareto

NAMED = 5  # broken images that are named one by one
SHARES = {"top1": "top-1", "top5": "top-5", "same_top1": "same top-1"}


def show(
    rows: dict[str, Result], tokens: dict[str, tuple[int, ...]], run: dict[str, Any], conditions: dict[str, Any]
) -> None:
    """The table, and what is to be known of the run."""
    console = Console(width=max(Console().width, 100))  # figures cut short are worse than a long line
    table = Table(title="against the unpatched model, same run", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shares = {
        key: title for key, title in SHARES.items() if any(getattr(row, key) is not None for row in rows.values())
    }
    has_logits = any(row.kl is not None for row in rows.values())
    for name in ("r", "tokens", *shares.values(), "cosine", *(["KL"] if has_logits else []), "im/s", "speed-up"):
        table.add_column(name, justify="left" if name == "r" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            escape(name),
            f"{tokens[name][0]}-{tokens[name][-1]}",
            *(f"{100 * getattr(row, key):.2f}%" for key in shares),
            f"{row.cosine:.4f}",
            *([f"{row.kl:.3g}"] if row.kl is not None else []),
            three_digits(row.images_per_second),
            f"{row.speedup:.2f}x",
        )
    console.print(table)
    answers = "same top-1: the unpatched model's answer. KL: of the logits from the unpatched model's, in nats. "
    features = "cosine: of the pooled features with the unpatched model's."
    console.print((answers if has_logits else "") + features, soft_wrap=True)
    for line in _about(rows, run):
        console.print(escape(line), soft_wrap=True)
    console.print(escape(", ".join(f"{name} {_short(value)}" for name, value in conditions.items())), soft_wrap=True)


def draw(rows: dict[str, Result], conditions: dict[str, Any], file: Path, format_: str) -> None:
    """Accuracy, without labels agreement, against measured throughput, with the front of what nothing else beats."""
    pyplot = files.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    graded = all(row.top1 is not None for row in rows.values())
    points = [(row.images_per_second, 100 * row.top1 if row.top1 is not None else row.cosine) for row in rows.values()]
    front = [points[i] for i in pareto(points)]
    axes.step(*zip(*front, strict=True), where="post", color="tab:orange", linewidth=1, label="Pareto front", zorder=1)
    base, *merged = points
    axes.scatter(*base, color="0.4", zorder=3)
    axes.scatter(*zip(*merged, strict=True), color="tab:blue", zorder=3)
    names = [next(iter(rows)), *(f"r={name}" for name in list(rows)[1:])]
    axes.set_xlabel("images/s of the model alone")
    axes.set_ylabel("top-1, %" if graded else "cosine with the unpatched model")
    device = conditions.get("gpu", conditions["cpu"])
    weights = f"{conditions['model']}, weights: {conditions['weights']}, {conditions['data']}"
    axes.set_title(f"{weights}\nbatch {conditions['batch size']}, {conditions['dtype']}, {device}", fontsize=8)
    axes.margins(x=0.14, y=0.14)
    axes.legend(loc="lower left", fontsize=8)
    place(axes, points, [f"{name}, {row.speedup:.2f}x" for name, row in zip(names, rows.values(), strict=True)])
    try:
        figure.savefig(file, dpi=150, format=format_)
    finally:
        pyplot.close(figure)


def _about(rows: dict[str, Result], run: dict[str, Any]) -> list[str]:
    lines = []
    broken = run["broken"]
    seen = f"{run['images']} images"
    if broken:
        more = ", ..." if len(broken) > NAMED else ""
        seen += f"; {len(broken)} broken and left out: {', '.join(broken[:NAMED])}{more}"
    if run["ignored"]:
        seen += f"; files that are no images: {run['ignored']}"
    lines.append(seen)
    alone, whole = (three_digits(run[f"{part}_images_per_second"]) for part in ("model", "run"))
    lines.append(
        f"all {len(rows)} in turn: {alone} images/s of the models alone, {whole} of the whole run, which "
        f"waited for images for {100 * run['waited']:.1f}% of its time"
    )
    lines += [f"r {name}: {row.nonfinite} images gave no finite output" for name, row in rows.items() if row.nonfinite]
    return lines


def _short(value: Any) -> str:
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
