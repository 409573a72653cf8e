"""Dense features of a model that merges: a linear head tells from restored tokens what each pixel belongs to.

    python examples/dense.py brick.png coffee.png flower.jpg --model vit_small_patch14_dinov2.lvd142m --r 8 --r 16

The images are mosaics of the photographs, so their masks are known; the head is trained on the photographs' left halves
and tested on the right ones. Behind its blocks a patched model has the full grid again. MODEL is timm's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from tome import cost, data, measure, patch, schedule
from tome.cli import models
from tome.cli.arguments import ScheduleType, random_weights


def mosaics(photos: Tensor, count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 3, size, size], each of a region of every photograph [K, 3, H, W], and their masks."""
    generator = torch.Generator().manual_seed(seed)
    k, _, height, width = photos.shape
    pixels = torch.cartesian_prod(torch.arange(size), torch.arange(size)).float()
    centres = size * torch.rand(count, k, 2, generator=generator)
    masks = torch.cdist(pixels.expand(count, -1, -1), centres).argmin(dim=-1).unflatten(1, (size, size))
    corners = torch.rand(count, k, 2, generator=generator) * torch.tensor([height - size, width - size])
    masks, images = masks.to(photos.device), photos.new_empty(count, 3, size, size)
    for image, mask, places in zip(images, masks, corners.long().tolist(), strict=True):
        for i, (y, x) in enumerate(places):
            image.copy_(photos[i, :, y : y + size, x : x + size].where(mask == i, image))
    return images, masks


@torch.no_grad()
def features(model: Any, images: Tensor, r: schedule.Schedule) -> Tensor:
    """The patches' features [B, C, rows, columns] of images uint8 [B, 3, H, W], restored to the full grid."""
    model.r, pixels = r, data.pixels(model)
    tokens = torch.cat([model.forward_features(pixels.normalised(batch)) for batch in images.split(16)])
    return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, model.patch_embed.grid_size).contiguous()


def fit(grid: Tensor, masks: Tensor, classes: int, steps: int = 150) -> nn.Module:
    """A linear head that tells the classes of patches [B, C, rows, columns], by the pixel in the middle of each."""
    torch.manual_seed(0)
    target = F.interpolate(masks[:, None].float(), grid.shape[2:], mode="nearest-exact")[:, 0].long()
    head = nn.Conv2d(grid.shape[1], classes, 1, device=grid.device)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(grid), target).backward()
        optimizer.step()
    return head


@torch.no_grad()
def mean_iou(head: nn.Module, grid: Tensor, masks: Tensor, classes: int) -> float:
    """Intersection over union of what the head says of each pixel with the masks, the mean of the classes."""
    found = F.interpolate(head(grid), masks.shape[1:], mode="bilinear").argmax(dim=1)
    pairs = torch.bincount((classes * masks + found).flatten(), minlength=classes**2).view(classes, classes)
    return float((pairs.diag() / (pairs.sum(dim=0) + pairs.sum(dim=1) - pairs.diag())).mean())


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "name", default="vit_small_patch16_224", show_default=True)
@click.option("--r", "schedules", type=ScheduleType(), multiple=True, default=(4, 8, 12, 16), show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Mosaics, of each half.")
@random_weights
def main(
    photos: tuple[Path, ...], name: str, schedules: tuple[schedule.Schedule, ...], count: int, random_weights: bool
) -> None:
    """Train linear heads on mosaics of PHOTOS, and tell their IoU with and without merging."""
    torch.manual_seed(0)
    where = models.find_device(None)
    model = patch.timm(models.load(name, not random_weights, where).model)
    size, k = cost.input_size(model)[1], len(photos)
    fitted = [ImageOps.fit(Image.open(path).convert("RGB"), (3 * size, 3 * size // 2)) for path in photos]
    halves = torch.stack([pil_to_tensor(photo) for photo in fitted]).to(where).chunk(2, dim=-1)
    (x, masks), (test_x, test_masks) = (mosaics(half, count, size, seed) for seed, half in enumerate(halves))
    unmerged = None
    print(f"{'r':>10} {'mean IoU':>9} {'by the head of r = 0':>21} {'images/s':>9}")
    for r in (0, *schedules):
        head = fit(features(model, x, r), masks, k)
        unmerged = unmerged or head
        seconds, grid = measure.timed(partial(features, model, test_x, r), where)
        own, kept = (mean_iou(each, grid, test_masks, k) for each in (head, unmerged))
        print(f"{r!s:>10} {own:9.1%} {kept:21.1%} {count / seconds:9.1f}")


if __name__ == "__main__":
    main()
