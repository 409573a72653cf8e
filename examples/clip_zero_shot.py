"""Zero-shot classification by CLIP, with and without merging in its vision tower.

    python examples/clip_zero_shot.py photo.jpg --label "a cat" --label "a temple" --r 8 --r 16

MODEL and WEIGHTS are names of open_clip's. Only images merge: the text tower stays as it is, so text is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import open_clip
import torch
from PIL import Image
from torch import Tensor

from tome import evaluate, measure, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, device, random_weights


class Answer(NamedTuple):
    """What a schedule makes of all images."""

    shares: Tensor  # [B, K], of each text
    cosine: float  # of the images' features with those of the unpatched model
    seconds: float  # of all images, the median


@torch.inference_mode()
def zero_shot(model: Any, images: Tensor, texts: Tensor, schedules: Sequence[schedule.Schedule]) -> dict[str, Answer]:
    """Which text describes an image best, by the unpatched model and with each schedule; they take turns.

    Args:
        model: a CLIP of open_clip's, unpatched.
        images: [B, 3, H, W].
        texts: token numbers [K, L].
        schedules: what r may be.

    """
    variants = {"unpatched": model} | {f"r = {r}": evaluate.twin(model, r) for r in schedules}
    calls = {name: partial(variant.encode_image, images, normalize=True) for name, variant in variants.items()}
    seconds = measure.time_calls(calls, images.device, warm_up=1, runs=5, progress=False)
    base, described = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    found = {}
    for name, call in calls.items():
        features = call()
        shares = (model.logit_scale.exp() * features @ described.T).softmax(dim=-1)
        found[name] = Answer(shares, float((features * base).sum(dim=-1).mean()), median(seconds[name]))
    return found


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
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in photos]).to(where)
    texts = open_clip.get_tokenizer(name)([f"a photo of {label}" for label in labels]).to(where)
    print(f"{'':>14} {'cosine':>7} {'images/s':>9}  answers")
    for told, answer in zero_shot(model.eval().to(where), images, texts, schedules).items():
        shares, best = answer.shares.max(dim=-1)
        answers = (f"{p.name} {labels[i]} {share:.0%}" for p, i, share in zip(photos, best, shares, strict=True))
        print(f"{told:>14} {answer.cosine:7.4f} {len(images) / answer.seconds:9.1f}  {', '.join(answers)}")


if __name__ == "__main__":
    main()
