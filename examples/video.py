"""Video: VideoMAE of transformers, whose 1568 tokens of 16 frames merge across space and time.

    python examples/video.py clip.gif --r 64 --r 96
    python examples/video.py frames/ --r 64

A clip is whatever PIL reads as frames (GIF, WebP, APNG), or a folder of images in the order of their names; over a
photograph the camera pans. MODEL is on the model hub, or in a folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from tome import evaluate, measure
from tome.cli import models
from tome.cli.arguments import ScheduleType, device, random_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip(path: Path, count: int, size: int) -> Tensor:
    """The frames of a clip, evenly chosen, as the model takes them: float32 [1, count, 3, size, size]."""
    if path.is_dir():
        frames = [Image.open(file).convert("RGB") for file in sorted(path.iterdir())]
    else:
        with Image.open(path) as film:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
    if len(frames) == 1:  # a photograph: from its left edge to its right one
        frames = [ImageOps.fit(frames[0], (size, size), centering=(i / (count - 1), 0.5)) for i in range(count)]
    chosen = [frames[i * len(frames) // count] for i in range(count)]
    seen = torch.stack([pil_to_tensor(ImageOps.fit(frame, (size, size))) for frame in chosen])
    x: Tensor = normalize(seen.float() / 255, MEAN, STD)
    return x[None]


def load(name: str, random_weights: bool) -> Any:
    """VideoMAE with a head; random weights take the shape of VideoMAE-B, or of a folder's configuration."""
    if not random_weights:
        model = VideoMAEForVideoClassification.from_pretrained(name)
    elif Path(name).is_dir():
        model = VideoMAEForVideoClassification(VideoMAEConfig.from_pretrained(name))
    else:
        model = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=400))
    return model.eval()


@click.command()
@click.argument("path", metavar="CLIP", type=click.Path(exists=True, path_type=Path))
@click.option("--model", "name", default="MCG-NJU/videomae-base-finetuned-kinetics", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(64, 96), show_default=True)
@device
@random_weights
@torch.inference_mode()
def main(path: Path, name: str, schedules: tuple[Any, ...], device: str | None, random_weights: bool) -> None:
    """Tell what happens in CLIP, without merging and with each --r."""
    torch.manual_seed(0)
    where = models.find_device(device)
    model = load(name, random_weights).to(where)
    x = clip(path, model.config.num_frames, model.config.image_size).to(where)
    variants = {"unpatched": model} | {f"r = {r}": evaluate.twin(model, r) for r in schedules}
    calls = {told: partial(variant, x) for told, variant in variants.items()}
    seconds = measure.time_calls(calls, where, warm_up=1, runs=3, progress=False)
    base = model(x).logits
    print(f"{'':>14} {'seconds':>8} {'cosine':>7}  answer")
    for told, call in calls.items():
        logits = call().logits
        share, label = logits.softmax(dim=-1).max(dim=-1)
        answer = f"{model.config.id2label[label.item()]} {share.item():.0%}"
        cosine = torch.cosine_similarity(logits, base).item()
        print(f"{told:>14} {median(seconds[told]):8.2f} {cosine:7.4f}  {answer}")


if __name__ == "__main__":
    main()
