"""Zero-shot classification by CLIP, with and without merging in its vision tower.

    python examples/clip_zero_shot.py photo.jpg --label "a cat" --label "a temple" --r 8 --r 16

MODEL and WEIGHTS are names of open_clip's. Only images merge: the text tower stays as it is, so text is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import open_clip
import torch
from PIL import Image
from torch import Tensor

import tome
from tome import measure, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, device, random_weights


class Answer(NamedTuple):
    """What a schedule makes of all images."""

    r: schedule.Schedule
    shares: Tensor  # [B, K], of each text
    cosine: float  # of the images' features with those of r = 0
    seconds: float  # of all images, once


@torch.inference_mode()
def zero_shot(model: Any, images: Tensor, texts: Tensor, schedules: Sequence[schedule.Schedule]) -> Iterator[Answer]:
    """Which text describes an image best, without merging and with each schedule.

    Args:
        model: a CLIP of open_clip's, patched.
        images: [B, 3, H, W].
        texts: token numbers [K, L].
        schedules: what r may be.

    """
    described = model.encode_text(texts, normalize=True)
    base = None
    for r in (0, *schedules):
        model.r = r
        model.encode_image(images)  # warms up
        seconds, features = measure.timed(partial(model.encode_image, images, normalize=True), images.device)
        base = features if base is None else base
        shares = (model.logit_scale.exp() * features @ described.T).softmax(dim=-1)
        yield Answer(r, shares, float((features * base).sum(dim=-1).mean()), seconds)


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--label", "labels", multiple=True, default=("a temple", "a flower", "a cat"), show_default=True)
@click.option("--model", "name", default="ViT-B-16", show_default=True)
@click.option("--weights", default="datacomp_xl_s13b_b90k", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(8, 16), show_default=True)
@device
@random_weights
def main(
    photos: tuple[Path, ...],
    labels: tuple[str, ...],
    name: str,
    weights: str,
    schedules: tuple[schedule.Schedule, ...],
    device: str | None,
    random_weights: bool,
) -> None:
    """Tell which --label describes each of PHOTOS, without merging and with each --r."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=None if random_weights else weights)
    where = models.find_device(device)
    tome.patch.open_clip(model.eval().to(where))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in photos]).to(where)
    texts = open_clip.get_tokenizer(name)([f"a photo of {label}" for label in labels]).to(where)
    print(f"{'r':>10} {'cosine':>7} {'images/s':>9}  answers")
    for answer in zero_shot(model, images, texts, schedules):
        shares, best = answer.shares.max(dim=-1)
        told = (f"{p.name} {labels[i]} {share:.0%}" for p, i, share in zip(photos, best, shares, strict=True))
        rate = len(images) / answer.seconds
        print(f"{answer.r!s:>10} {answer.cosine:7.4f} {rate:9.1f}  {', '.join(told)}")


if __name__ == "__main__":
    main()
