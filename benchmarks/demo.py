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
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tome
from tome import cost, measure, patch, schedule, vis
from tome.cli.models import create_model
from tome.cli.visualize import see
from tome.data import digits

ARCHITECTURE: dict[str, Any] = {
    "img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 5, "num_heads": 3,
}  # fmt: skip
EPOCHS = 20
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
    rows = evaluate(model, *test)
    console.print(table(rows))
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
        seconds = fit(model, *digits()[0])
        torch.save(model.state_dict(), weights)
        console.print(f"trained for {EPOCHS} epochs in {seconds:.0f} s; weights: {weights}", soft_wrap=True)
    return model.eval()


def fit(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Train the model as it is, without merging; returns the seconds it took."""
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    # On so little data positions are learned slowly from timm's small start.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    batches = len(images) // 64
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=EPOCHS * batches)
    begin = time.perf_counter()
    for _ in track(range(EPOCHS), "training on digits"):
        order = torch.randperm(len(images))
        for batch in order[: batches * 64].view(batches, 64):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return time.perf_counter() - begin


def evaluate(model: VisionTransformer, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Accuracy and throughput of the unpatched model and of every schedule, measured in turns in one run."""
    variants: dict[str, Any] = {"unpatched": model}
    for r in SCHEDULES:
        variant: Any = patch.timm(copy.deepcopy(model))
        variant.r = r
        variants[str(r)] = variant
    batch = images[:256]
    calls = {name: (lambda v=v: v(batch)) for name, v in variants.items()}
    seconds = measure.time_calls(calls, torch.device("cpu"), warm_up=3, runs=15)
    tokens = cost.tokens(model)
    rows = []
    with torch.inference_mode():
        for name, variant in variants.items():
            plan = schedule.plan(getattr(variant, "r", 0), ARCHITECTURE["depth"], tokens)
            hits = (variant(images).argmax(1) == labels).float().mean().item()
            median = statistics.median(seconds[name])
            rows.append(
                {
                    "schedule": name,
                    "tokens": " ".join(map(str, plan.tokens)),
                    "gflops": cost.flops(model, getattr(variant, "r", 0)) / 1e9,
                    "throughput": len(batch) / median,
                    "speedup": statistics.median(seconds["unpatched"]) / median,
                    "accuracy": 100 * hits,
                }
            )
    for row in rows:
        row["change"] = row["accuracy"] - rows[0]["accuracy"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """One row a schedule."""
    result = Table(
        "r", "tokens per layer", "GFLOPs", "images/s", "speed-up", "accuracy", "change",
        title="token merging without retraining, handwritten digits",
    )  # fmt: skip
    for row in rows:
        result.add_row(
            row["schedule"],
            row["tokens"],
            f"{row['gflops']:.4f}",
            f"{row['throughput']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['accuracy']:.2f} %",
            f"{row['change']:+.2f}",
        )
    return result


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against throughput."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    base, *merged = (row for row in rows if row["schedule"] != "0")
    axes.axhline(base["accuracy"], color="0.8", linewidth=1, zorder=0)
    axes.axvline(base["throughput"], color="0.8", linewidth=1, zorder=0)
    axes.scatter([base["throughput"]], [base["accuracy"]], color="0.4", label="unpatched", zorder=3)
    axes.scatter(
        [row["throughput"] for row in merged], [row["accuracy"] for row in merged], color="tab:blue",
        label="token merging, no retraining", zorder=3,
    )  # fmt: skip
    middle = (base["throughput"] + max(row["throughput"] for row in merged)) / 2
    for row in merged:
        is_right = row["throughput"] > middle  # whose labels would leave the frame
        axes.annotate(
            f"r={row['schedule']}", (row["throughput"], row["accuracy"]), xytext=(-5 if is_right else 5, 5),
            textcoords="offset points", fontsize=7, ha="right" if is_right else "left",
        )  # fmt: skip
    axes.set_xlabel("images/s (CPU)")
    axes.set_ylabel("test accuracy, %")
    axes.margins(x=0.12, y=0.12)
    axes.legend(loc="lower left", fontsize=8)
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
