"""Video: VideoMAE of transformers, whose 1568 tokens of 16 frames merge across space and time.

    python examples/video.py clip.gif --r 64 --r 96
    python examples/video.py frames/ --r 64

A clip is whatever PIL reads as frames (GIF, WebP, APNG), or a folder of images in the order of their names; over a
photograph the camera pans. MODEL is on the model hub, or in a folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import tome
from tome import measure
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
    """VideoMAE with a head, patched; random weights take the shape of VideoMAE-B, or of a folder's configuration."""
    if not random_weights:
        model = VideoMAEForVideoClassification.from_pretrained(name)
    elif Path(name).is_dir():
        model = VideoMAEForVideoClassification(VideoMAEConfig.from_pretrained(name))
    else:
        model = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=400))
    return tome.patch.transformers(model.eval())


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
    model(x)  # warms up
    base = None
    print(f"{'r':>10} {'tokens':>7} {'seconds':>8} {'cosine':>7}  answer")
    for r in (0, *schedules):
        model.r = r
        seconds, out = measure.timed(partial(model, x), where)
        logits = out.logits
        base = logits if base is None else base
        cosine = torch.cosine_similarity(logits, base).item()
        share, label = logits.softmax(dim=-1).max(dim=-1)
        told = f"{model.config.id2label[label.item()]} {share.item():.0%}"
        print(f"{r!s:>10} {tome.merged(model, x).count():7} {seconds:8.2f} {cosine:7.4f}  {told}")


if __name__ == "__main__":
    main()
