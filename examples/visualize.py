"""Which patches of a photograph become one token: a row for each photograph, a picture for each schedule.

    python examples/visualize.py photo.jpg --model vit_base_patch16_224 --r 8 --r 16 --out merged.png

An area of one colour is one token, outlined in a colour of its own; patches that are still by themselves are outlined
in black. MODEL is timm's. ``tome visualize`` also draws layer by layer, other sizes and models of other libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

import tome
from tome import data, schedule, vis
from tome.cli import models
from tome.cli.arguments import ScheduleType, random_weights


@torch.inference_mode()
def pictures(model: Any, photo: Image.Image, schedules: Sequence[schedule.Schedule]) -> list[tuple[Image.Image, str]]:
    """The photograph as the model sees it, then its tokens behind the last layer with each schedule, with captions.

    Args:
        model: of timm, patched.
        photo: of any size.
        schedules: what r may be.

    """
    pixels = data.pixels(model)
    seen = pixels(photo)  # uint8 [3, H, W]
    image = Image.fromarray(seen.permute(1, 2, 0).numpy())
    drawn = []
    for r in schedules:
        model.r = r
        slot: Any = tome.merged(model, pixels.normalised(seen[None])).slot
        picture = vis.draw(image, slot, model.patch_embed.grid_size)
        drawn.append((picture, f"r = {r}: {slot.max() + 1} tokens"))
    whole = image.resize(drawn[0][0].size, Image.Resampling.LANCZOS)
    return [(whole, f"{slot.shape[1]} tokens"), *drawn]


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "name", default="vit_small_patch16_224", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(8, 16), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("merged.png"), show_default=True)
@random_weights
def main(
    photos: tuple[Path, ...], name: str, schedules: tuple[schedule.Schedule, ...], out: Path, random_weights: bool
) -> None:
    """Draw the merged patches of PHOTOS on one sheet."""
    torch.manual_seed(0)
    model = tome.patch.timm(models.load(name, not random_weights).model)
    rows = []
    for path in photos:
        with Image.open(path) as photo:
            rows.append(pictures(model, photo.convert("RGB"), schedules))
        print(f"{path.name}: {', '.join(caption for _, caption in rows[-1])}")
    vis.sheet(rows).save(out)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
