"""``tome visualize``: which patches of a photograph were merged, layer by layer if wanted."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tome import backend, cost, data, ops, schedule, vis
from tome.cli import files, models
from tome.patch.model import patched_in
from tome.tokens import kept

SHUFFLED = ("ViTMAE",)  # in the names of classes
CHANNELS = 3
MOST_LAYERS = 6  # of a strip, the image beside them
FRAME_MS, LAST_FRAME_MS = 600, 2000


class GridError(ValueError):
    """The patches behind the prefix tokens are not the image's, row by row."""


class Seen(NamedTuple):
    """What a patched model made of an image."""

    image: Image.Image  # as it saw it, RGB
    grid: tuple[int, int]  # rows and columns of patches
    slots: list[Tensor]  # the slot map int32 [N] behind each merge, first to last

    def picture(self) -> Image.Image:
        """The image, in the size of the drawings."""
        drawn = self.drawn(self.slots[-1])
        return self.image.resize(drawn.size, Image.Resampling.LANCZOS)

    def drawn(self, slot: Tensor) -> Image.Image:
        """The merged patches of a map."""
        return vis.draw(self.image, slot, self.grid)

    def pair(self) -> list[tuple[Image.Image, str]]:
        """The image beside what is left of it behind the last layer."""
        return [(self.picture(), ""), (self.drawn(self.slots[-1]), "")]

    def strip(self, layers: Sequence[int], most: int = MOST_LAYERS) -> list[tuple[Image.Image, str]]:
        """The image, then what merges leave of it, evenly chosen; ``layers``: which layer made each map."""
        count = min(most, len(self.slots))
        chosen = [round((i + 1) * len(self.slots) / count) - 1 for i in range(count)]
        told = [(self.drawn(self.slots[i]), f"layer {layers[i]}: {count_of(self.slots[i])} tokens") for i in chosen]
        return [(self.picture(), f"{self.slots[0].numel()} tokens"), *told]


def run(
    images: Sequence[Path],
    targets: Sequence[Path],
    model_name: str,
    r: schedule.Schedule,
    checkpoint: Path | None,
    random_weights: bool,
    image_size: tuple[int, int] | None = None,
    layers: bool = False,
    sheet: Path | None = None,
) -> None:
    """Draw each image into its target: a picture, or steps where it is a GIF; or all of them on one sheet."""
    photos = [_open(path) for path in images]
    torch.manual_seed(0)
    model, pixels = models.load(model_name, pretrained=not random_weights, checkpoint=checkpoint)
    if image_size is not None:
        inner = getattr(model, "trunk", model)  # of open_clip's wrapper
        models.set_image_size(model_name, inner, image_size, "--image-size")
    plan = models.checked_plan(model_name, _shape(model, image_size), r)
    told = pixels()
    model.r = r
    rows, counts = [], []
    for photo, target in track(list(zip(photos, targets, strict=True)), "drawing", transient=True):
        try:
            seen = see(model, photo, told, image_size)
        except backend.BackendError as error:
            raise click.ClickException(str(error)) from error
        except GridError as error:
            raise click.UsageError(f"{model_name} cannot be drawn: {error}") from error
        counts.append((seen.slots[0].numel(), count_of(seen.slots[-1])))
        merging = merging_layers(plan)
        if target.suffix == ".gif":
            _animate(seen, target)
            continue
        rows.append(seen.strip(merging[: len(seen.slots)]) if layers else seen.pair())
        if sheet is None:
            _save(vis.sheet([rows.pop()]), target)
    if sheet is not None:
        _save(vis.sheet(rows), sheet)
    console = Console()
    for target, (first, last) in zip(targets if sheet is None else [sheet], counts, strict=False):
        console.print(f"{target}: {first} -> {last} tokens", soft_wrap=True)
    if random_weights:
        console.print("the weights are random: a trained model merges other patches")


def see(
    model: Any,
    photo: Image.Image,
    told: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    transform: data.Pixels | None = None,
) -> Seen:
    """Run a patched model on a photograph.

    Args:
        model: a patched one.
        photo: of any mode.
        told: of how the model wants its images, what its library says; the rest is as timm has it.
        image_size: height and width, where they are not the model's own.
        transform: how the model wants its images, where that is known already.

    Raises:
        GridError: nobody knows which patch a token is of, or the model takes no image of that size.

    """
    inner: Any = patched_in(model)
    if any(word in type(inner).__name__ for word in SHUFFLED):
        raise GridError(f"{type(inner).__name__} hides patches and shuffles the others")
    if transform is None:
        size = cost.input_size(model) if image_size is None else (CHANNELS, *image_size)
        transform = data.pixels(model, told, size)
    height, width = transform.config["input_size"][1:]
    shown, like = transform(photo), next(model.parameters())
    options = {}
    if image_size is not None and "interpolate_pos_encoding" in inspect.signature(inner.forward).parameters:
        options["interpolate_pos_encoding"] = True
    with torch.inference_mode(), kept() as found:
        try:
            model(transform.normalised(shown[None].to(like.device)).to(like.dtype), **options)
        except (AssertionError, ValueError, RuntimeError) as error:
            if image_size is None or isinstance(error, backend.BackendError):
                raise
            raise GridError(f"it takes no image of {height} x {width} pixels") from error
    tokens = found[-1]
    prefix, n = inner._tome_prefix()[0], (tokens.steps[0].shape[1] if tokens.steps else tokens.count())
    rows = round(((n - prefix) * height / width) ** 0.5)
    columns = (n - prefix) // max(rows, 1)
    if rows * columns != n - prefix:
        raise GridError(
            f"{n - prefix} patches behind {prefix} prefix tokens tile no image of {width} x {height} pixels"
        )
    slots = [ops.follow(tokens.steps[: i + 1])[0].cpu() for i in range(len(tokens.steps))]
    return Seen(
        Image.fromarray(shown.expand(CHANNELS, -1, -1).permute(1, 2, 0).contiguous().numpy()),
        (rows, columns),
        slots or [torch.arange(n, dtype=torch.int32)],
    )


def _shape(model: Any, size: tuple[int, int] | None) -> models.Shape:
    if size is not None:
        try:
            return models.patched_shape(model, (CHANNELS, *size))
        except (AssertionError, ValueError, RuntimeError):  # it takes none of this size, or wants to be told of it
            pass
    return models.patched_shape(model)


def merging_layers(plan: schedule.Plan) -> list[int]:
    """The layers, from 1 on, that make the maps of :class:`Seen`; the last where none merges."""
    return [i + 1 for i, merged in enumerate(plan.r) if merged] or [len(plan.r)]


def count_of(slot: Tensor) -> int:
    """How many tokens a map leaves."""
    return int(slot.max()) + 1


def _animate(seen: Seen, target: Path) -> None:
    frames = [seen.picture(), *map(seen.drawn, seen.slots)]
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    with files.replacing(target) as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], duration=times, loop=0)


def _save(picture: Image.Image, target: Path) -> None:
    with files.replacing(target) as file:
        picture.save(file, format="png")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            photo: Image.Image = image.convert("RGB")
            return photo
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise click.BadParameter(f"{path} is not a readable image", param_hint="IMAGE") from error
