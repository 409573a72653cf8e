"""Fine-tune with merging in a plain loop: each step merges as inference will, so steps are faster and need less memory.

    python examples/train.py photos/ --model vit_small_patch16_224 --r 13 --out model.pt
    python examples/train.py digits --model examples.finetune:digits_vit --r 8 --epochs 10 --lr 1e-3

DATA has a folder of each class in DATA/train and in DATA/val, or is ``digits``; MODEL is timm's. Augmentation, mixed
precision, several GPUs and going on after an interruption are in examples/finetune.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy

import tome
from tome import data, datasets, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, device, random_weights


@torch.inference_mode()
def top1(model: Any, images: data.Images, batch_size: int, r: schedule.Schedule) -> float:
    """The share of images whose class a model tells with r."""
    model.eval().r = r
    batches = data.batches(images, batch_size, 0, next(model.parameters()).device)
    right = [(model(batch.x).argmax(dim=1) == batch.label).float() for batch in batches]
    return float(torch.cat(right).mean())


@click.command()
@click.argument("data_dir", metavar="DATA")
@click.option("--model", "name", default="vit_small_patch16_224", show_default=True)
@click.option("--r", type=ScheduleType(), default=8, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--lr", type=float, default=1e-4, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("model.pt"), show_default=True)
@device
@random_weights
def main(
    data_dir: str,
    name: str,
    r: schedule.Schedule,
    epochs: int,
    batch_size: int,
    lr: float,
    out: Path,
    device: str | None,
    random_weights: bool,
) -> None:
    """Train a model on the images of DATA with --r, and write its weights, which are those of an unpatched model."""
    torch.manual_seed(0)
    where, root = models.find_device(device), Path(data_dir)
    sources = (
        [datasets.Folder(root / split) for split in ("train", "val")]
        if data_dir != "digits"
        else [
            datasets.Digits(train=True),
            datasets.Digits(),
        ]
    )
    model, told = models.load(name, not random_weights, where)
    pixels = data.pixels(model, told())
    train, val = (data.Images.of(each, pixels, data_dir) for each in sources)
    model.reset_classifier(len(train.classes or ()))
    tome.patch.timm(model.to(where))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    updates = epochs * -(-len(train.dataset) // batch_size)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)
    for epoch in range(epochs):
        model.train().r = r
        order = torch.randperm(len(train.dataset)).tolist()
        begin, total = time.perf_counter(), 0.0
        for batch in data.batches(train, batch_size, 0, where, order=order):
            loss = cross_entropy(model(batch.x), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            total += loss.item() * len(batch.x)
        speed = len(order) / (time.perf_counter() - begin)
        merged, unmerged = (top1(model, val, batch_size, each) for each in (r, 0))
        figures = f"loss {total / len(order):.3f}  top-1 {merged:.1%} (unmerged {unmerged:.1%})  {speed:.0f} images/s"
        print(f"epoch {epoch + 1}/{epochs}  r {r}  {figures}")
    torch.save(model.state_dict(), out)
    print(f"weights: {out}")


if __name__ == "__main__":
    main()
