"""``tome visualize``: which patches of a photograph were merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from tome import backend, data, patch, schedule, vis
from tome.cli import files, models
from tome.patch.model import patched_in

SHUFFLED = ("ViTMAE",)  # in the names of classes


def run(
    images: Sequence[Path],
    targets: Sequence[Path],
    model_name: str,
    r: schedule.Schedule,
    checkpoint: Path | None,
    random_weights: bool,
) -> None:
    """Draw each image into its target."""
    photos = [_open(path) for path in images]
    torch.manual_seed(0)
    model, pixels = models.load(model_name, pretrained=not random_weights, checkpoint=checkpoint)
    plan = models.checked_plan(model_name, models.patched_shape(model), r)
    told = pixels()
    model.r = r
    for photo, target in track(list(zip(photos, targets, strict=True)), "drawing", transient=True):
        try:
            picture = draw(model, photo, told)
        except backend.BackendError as error:
            raise click.ClickException(str(error)) from error
        except GridError as error:
            raise click.UsageError(f"{model_name} cannot be drawn: {error}") from error
        with files.replacing(target) as file:
            picture.save(file, format="png")
    console = Console()
    for target in targets:
        console.print(f"{target}: {plan.tokens[0]} -> {plan.tokens[-1]} tokens", soft_wrap=True)


class GridError(ValueError):
    """The patches behind the prefix tokens are not the image's, row by row."""


def draw(model: Any, photo: Image.Image, told: dict[str, Any] | None = None) -> Image.Image:
    """The photograph as the patched model sees it, beside its groups of merged patches.

    Args:
        model: a patched one.
        photo: RGB.
        told: of how the model wants its images, what its library says; the rest is as timm has it.

    Raises:
        GridError: nobody knows which patch a token is of.

    """
    inner: Any = patched_in(model)
    if any(word in type(inner).__name__ for word in SHUFFLED):
        raise GridError(f"{type(inner).__name__} hides patches and shuffles the others")
    transform = data.pixels(model, told)
    seen = transform(photo)
    with torch.inference_mode():
        slot = patch.merged(model, transform.normalised(seen[None])).slot
    assert slot is not None
    shown = Image.fromarray(seen.permute(1, 2, 0).contiguous().numpy())
    prefix = inner._tome_prefix()[0]
    patches = slot.shape[1] - prefix
    size = round((shown.width * shown.height / patches) ** 0.5)
    try:
        merged = vis.make_visualization(shown, slot, size, prefix=prefix)
    except ValueError as error:
        raise GridError(str(error)) from error
    both = Image.new("RGB", (2 * shown.width + 8, shown.height), "white")
    both.paste(shown, (0, 0))
    both.paste(merged, (shown.width + 8, 0))
    return both


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            photo: Image.Image = image.convert("RGB")
            return photo
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise click.BadParameter(f"{path} is not a readable image", param_hint="IMAGE") from error
