"""Train a small Vision Transformer on handwritten digits, merge its tokens without retraining, measure and draw.

    python benchmarks/demo.py --out demo_output

The digits (8 x 8 pixels, enlarged to 16 x 16: 64 patches) and the photographs come with scikit-learn, so nothing is
downloaded. The trained weights are cached in the output folder.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from matplotlib import pyplot
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tome
from tome import cost, measure, patch, schedule, vis
from tome.cli.labels import place
from tome.cli.models import create_model
from tome.cli.tables import rate
from tome.cli.visualize import see
from tome.data import digits

ARCHITECTURE: dict[str, Any] = {
    "img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 5, "num_heads": 3,
}  # fmt: skip
EPOCHS = 12
DROPPED = 0.5  # patches that are left out while training: half the work, and the whole picture is all the easier
RATE = 2e-3
ROUNDS = 15  # of measuring, in each of which every schedule has its turn
SCHEDULES: list[schedule.Schedule] = [0, 4, (4, -1.0), 8, (8, -1.0), 12, (12, -1.0), 0.2]
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
PHOTO_SCHEDULE = (16, -1.0)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo_output"))
def main(out: Path) -> None:
    """Run the demonstration and write its pictures to OUT."""
    matplotlib.use("Agg")  # not of who imports the model
    console = Console()
    model = trained(out, console)
    _, test = digits()
    rows = evaluate(model, *test, console)
    console.print(table(rows))
    console.print("spread: quartiles of the rounds, in each of which all take turns. " + verdict(rows), soft_wrap=True)
    console.print(", ".join(f"{k} {v}" for k, v in measure.machine(torch.device("cpu")).items()), soft_wrap=True)
    plot(rows, out / "accuracy_throughput.png")
    photographs(out / "merged_patches.png")
    for name in ("accuracy_throughput.png", "merged_patches.png"):
        console.print(f"picture: {out / name}", soft_wrap=True)
    if rows[0]["accuracy"] < 95:
        raise click.ClickException(f"the model reaches only {rows[0]['accuracy']:.1f} % without merging, expected 95")


def trained(out: Path = Path("demo_output"), console: Console | None = None) -> VisionTransformer:
    """The model of the demonstration, from its output folder or trained into it: for ``tome evaluate``, too."""
    out.mkdir(parents=True, exist_ok=True)
    console = console or Console(stderr=True)
    weights = out / "digits_vit.pt"
    model: Any = VisionTransformer(**ARCHITECTURE)
    model.pretrained_cfg = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        console.print(f"trained weights: {weights} (remove the file to train again)", soft_wrap=True)
    else:
        seconds = fit(model, *digits()[0], console)
        torch.save(model.state_dict(), weights)
        console.print(f"trained for {EPOCHS} epochs in {seconds:.0f} s; weights: {weights}", soft_wrap=True)
    return model.eval()


def fit(model: VisionTransformer, images: Tensor, labels: Tensor, console: Console) -> float:
    """Train the model as it is, without merging; returns the seconds it took."""
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    # On so little data positions are learned slowly from timm's small start.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    model.patch_drop = PatchDropout(DROPPED)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    batches = len(images) // 64
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=EPOCHS * batches)
    begin = time.perf_counter()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        for batch in order[: batches * 64].view(batches, 64):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        if epoch % 2:  # lines, not a bar: whoever pipes this sees it going on, too
            console.print(f"training on digits: epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.3f}")
    model.patch_drop = nn.Identity()
    return time.perf_counter() - begin


def evaluate(model: VisionTransformer, images: Tensor, labels: Tensor, console: Console) -> list[dict[str, Any]]:
    """Accuracy and throughput of the unpatched model and of every schedule, measured in turns in one run."""
    variants: dict[str, Any] = {"unpatched": model}
    for r in SCHEDULES:
        variant: Any = patch.timm(copy.deepcopy(model))
        variant.r = r
        variants[str(r)] = variant
    batch = images[:256]
    calls = {name: (lambda v=v: v(batch)) for name, v in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(0, ROUNDS, 5):
        warm_up = 0 if done else 2
        for name, more in measure.time_calls(calls, torch.device("cpu"), warm_up, 5, progress=False).items():
            seconds[name] += more
        console.print(f"measuring {len(calls)} variants in turn: round {done + 5} of {ROUNDS}")
    tokens = cost.tokens(model)
    rows = []
    with torch.inference_mode():
        for name, variant in variants.items():
            plan = schedule.plan(getattr(variant, "r", 0), ARCHITECTURE["depth"], tokens)
            hits = (variant(images).argmax(1) == labels).float().mean().item()
            speed = statistics.quantiles((len(batch) / each for each in seconds[name]), n=4)
            speedup = compared(seconds["unpatched"], seconds[name])
            rows.append(
                {
                    "schedule": name,
                    "tokens": f"{plan.tokens[0]}-{plan.tokens[-1]}",
                    "gflops": cost.flops(model, getattr(variant, "r", 0)) / 1e9,
                    "throughput": speed[1],
                    "quartiles": (speed[0], speed[2]),
                    "speedup": speedup[1],
                    "spread": (speedup[0], speedup[2]),
                    "told": name == "unpatched" or not speedup[0] <= 1 <= speedup[2],
                    "accuracy": 100 * hits,
                }
            )
    for row in rows:
        row["change"] = row["accuracy"] - rows[0]["accuracy"]
    return rows


def compared(base: list[float], other: list[float]) -> list[float]:
    """Quartiles of the speed-ups round by round: what slows all of a round down, as other programs do, is in none."""
    return statistics.quantiles((a / b for a, b in zip(base, other, strict=True)), n=4)


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the figures say of speed, and of which schedules they say nothing."""
    _, *merged = (row for row in rows if row["schedule"] != "0")
    told = [row for row in merged if row["told"]]
    if len(told) < len(merged) / 2:
        return "No verdict: the machine is too busy, the spread exceeds the effect."
    faster = [row["schedule"] for row in told if row["speedup"] > 1]
    untold = [row["schedule"] for row in merged if not row["told"]]
    return f"Faster than unpatched: {', '.join(faster) or 'none'}." + (
        f" Not told from noise: {', '.join(untold)}." if untold else ""
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """One row a schedule."""
    result = Table(
        title="token merging without retraining, handwritten digits", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("r", "tokens", "GFLOPs", "images/s", "speed-up", "spread", "accuracy", "change"):
        result.add_column(name, justify="left" if name == "r" else "right", no_wrap=True)
    for row in rows:
        is_base = row["schedule"] == "unpatched"
        result.add_row(
            row["schedule"],
            row["tokens"],
            f"{row['gflops']:.4f}",
            rate(row["throughput"]),
            f"{row['speedup']:.2f}x" if row["told"] else "noise",
            "" if is_base else "{:.2f}-{:.2f}".format(*row["spread"]),
            f"{row['accuracy']:.2f} %",
            f"{row['change']:+.2f}",
        )
    return result


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against throughput, with the spread; no verdict on speed where the noise exceeds the effect."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    shown = base, *merged = [row for row in rows if row["schedule"] != "0"]
    axes.axhline(base["accuracy"], color="0.8", linewidth=1, zorder=0)
    axes.axvline(base["throughput"], color="0.8", linewidth=1, zorder=0)
    kinds = {
        "unpatched": ("0.4", "0.4", [base]),
        "token merging, no retraining": ("tab:blue", "tab:blue", [row for row in merged if row["told"]]),
        "speed not told from noise": ("tab:blue", "white", [row for row in merged if not row["told"]]),
    }
    for label, (colour, face, group) in kinds.items():
        if group:
            middle = [row["throughput"] for row in group]
            bars = [[abs(row["quartiles"][i] - row["throughput"]) for row in group] for i in (0, 1)]
            axes.errorbar(
                middle, [row["accuracy"] for row in group], xerr=bars, fmt="o", color=colour, markerfacecolor=face,
                elinewidth=1, label=label, zorder=3,
            )  # fmt: skip
    axes.set_xlabel("images/s on this CPU, median and quartiles")
    axes.set_ylabel("test accuracy, %")
    axes.margins(x=0.12, y=0.12)
    axes.legend(loc="lower left", fontsize=8)
    if verdict(rows).startswith("No verdict"):
        axes.set_title("the machine was too busy: these speeds tell nothing", color="tab:red", fontsize=9)
    place(
        axes,
        [(row["throughput"], row["accuracy"]) for row in shown],
        ["" if row is base else f"r={row['schedule']}" for row in shown],
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def photographs(file: Path) -> None:
    """Each photograph beside its merged patches, drawn with an untrained 224-pixel ViT: colour alone already groups."""
    torch.manual_seed(0)
    model: Any = tome.patch.timm(create_model("vit_small_patch16_224", pretrained=False))
    model.r = PHOTO_SCHEDULE
    pictures = [see(model, Image.fromarray(load_sample_image(name))).pair() for name in PHOTOGRAPHS]
    vis.sheet(pictures).save(file)


if __name__ == "__main__":
    main()
