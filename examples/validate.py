"""Top-1 with and without merging, on images of your own: what a schedule costs, by the library's functions.

    python examples/validate.py imagenet/val --model vit_small_patch16_224 --r 8 --r 16
    python examples/validate.py digits --model benchmarks.demo:trained --r 4 --r 8

DATA has a folder of each class, or is ``digits``; MODEL is whatever ``tome bench`` takes. ``tome evaluate`` does the
same with all that a long run needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
from torch import nn

from tome import data, evaluate, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, device, random_weights


def validate(
    model: nn.Module, images: data.Images, schedules: Sequence[schedule.Schedule], batch_size: int = 32
) -> dict[str, evaluate.Result]:
    """Accuracy, agreement and speed of the unpatched model and of each schedule, batch by batch in turns.

    Args:
        model: unpatched, in eval mode; its head is taken off.
        images: of :func:`tome.data.open_images`.
        schedules: what r may be.
        batch_size: images of a pass.

    """
    device = next(model.parameters()).device
    first = next(data.batches(images, 1, 0, device))
    base = evaluate.Split(model, first.x)
    variants = {"unpatched": base} | {f"r = {r}": evaluate.twin(base, r) for r in schedules}
    tally = evaluate.Tally()
    batches = data.batches(images, batch_size, 0, device)
    for _, part in evaluate.evaluate(variants, batches, batch_size, device):
        tally.add(part)
    labelled = images.classes is not None
    return dict(zip(variants, evaluate.results(tally, base.classes, labelled), strict=True))


@click.command()
@click.argument("data_dir", metavar="DATA")
@click.option("--model", "name", default="vit_small_patch16_224", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(8, 16), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="So many images, spread over all.")
@device
@random_weights
def main(
    data_dir: str,
    name: str,
    schedules: tuple[schedule.Schedule, ...],
    batch_size: int,
    limit: int | None,
    device: str | None,
    random_weights: bool,
) -> None:
    """Validate a model on the images of DATA, unpatched and with each --r."""
    torch.manual_seed(0)
    model, told = models.load(name, not random_weights, models.find_device(device))
    images = data.open_images(data_dir, data.pixels(model, told()), limit=limit)
    print(f"{'':>14} {'top-1':>8} {'same top-1':>11} {'cosine':>7} {'images/s':>9} {'speed-up':>9}")
    for label, found in validate(model, images, schedules, batch_size).items():
        top1, same = ("-" if share is None else f"{share:.2%}" for share in (found.top1, found.same_top1))
        speed = f"{found.images_per_second:9.0f} {found.speedup:8.2f}x"
        print(f"{label:>14} {top1:>8} {same:>11} {found.cosine:7.4f} {speed}")


if __name__ == "__main__":
    main()
