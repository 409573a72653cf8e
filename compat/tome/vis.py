"""Draw which patches were merged."""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["draw", "generate_colormap", "make_visualization", "sheet"]

LEAST_SIDE = 448  # pixels
GAP = 8


def generate_colormap(N: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """N bright RGB colours with channels in [0, 1]; the same seed gives the same colours."""
    generator = random.Random(seed)
    return [colorsys.hsv_to_rgb(generator.random(), 0.4 + 0.6 * generator.random(), 1.0) for _ in range(N)]


def draw(image: Image.Image, slot: Tensor, grid: tuple[int, int], least: int = LEAST_SIDE) -> Image.Image:
    """Each group of merged patches filled with its mean colour and outlined: one colour of outline a group.

    Args:
        image: what the model saw, RGB, of any size: it is resized to the size of the result.
        slot: which token went where, of one image: the slot map int32 [N] or [1, N] (``tome.merged(...).slot``), or
            the adjacency matrix [M, N] or [1, M, N]. The last rows * columns tokens are the patches, row by row.
        grid: (rows, columns) of the patches.
        least: pixels of the shorter side, at least.

    Returns:
        An image in which every patch is a square of as many pixels as any other. A patch on its own is outlined in
        black, and thinner.

    Raises:
        ValueError: fewer tokens than patches, a batch of several images, or no map.

    """
    from PIL import Image

    rows, columns = grid
    found = _slot(source=slot)
    if min(rows, columns) < 1 or found.numel() < rows * columns:
        raise ValueError(f"slot has {found.numel()} tokens, too few for a grid of {rows} x {columns} patches")
    side = math.ceil(least / min(rows, columns))
    resized = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.LANCZOS)
    return _drawn(resized, found[-rows * columns :].view(rows, columns), max(1, side // 14))


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Pictures in rows on white, each with its caption below.

    Args:
        rows: pictures with captions ("" for none), of any sizes.

    Raises:
        ValueError: no pictures.

    """
    from PIL import Image, ImageDraw, ImageFont

    if not any(rows):
        raise ValueError("there are no pictures for a sheet")
    font = ImageFont.load_default(size=18)
    line = 28 if any(caption for row in rows for _, caption in row) else 0
    width = max(sum(picture.width + GAP for picture, _ in row) for row in rows) - GAP
    height = sum(max(picture.height for picture, _ in row) + line + GAP for row in rows) - GAP
    drawn = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(drawn)
    top = 0
    for row in rows:
        left = 0
        for picture, caption in row:
            drawn.paste(picture, (left, top))
            pen.text((left + 2, top + picture.height + 3), caption, fill="black", font=font)
            left += picture.width + GAP
        top += max(picture.height for picture, _ in row) + line + GAP
    return drawn


def make_visualization(
    img: Image.Image,
    source: Tensor,
    patch_size: int = 16,
    class_token: bool = True,
    prefix: int | None = None,
) -> Image.Image:
    """As :func:`draw`, in the size of the image and by the names of the original package.

    Args:
        img: the image as the model saw it, RGB, its height and width multiples of ``patch_size``.
        source: as ``slot`` of :func:`draw`.
        patch_size: pixels of one side of a patch.
        class_token: the first token is no patch.
        prefix: how many leading tokens are no patches, where that is not 0 or 1.

    Returns:
        An image of the size of ``img``. Groups of several patches have coloured outlines.

    Raises:
        ValueError: a size that does not fit.

    """
    width, height = img.size
    rows, columns = height // patch_size, width // patch_size
    skip = int(class_token) if prefix is None else prefix
    slot = _slot(source)[skip:]
    if (rows * patch_size, columns * patch_size) != (height, width) or slot.numel() != rows * columns:
        raise ValueError(
            f"{slot.numel()} patches of {patch_size} pixels behind {skip} prefix tokens do not tile an image of "
            f"{width} x {height} pixels"
        )
    return _drawn(img.convert("RGB"), slot.view(rows, columns), 1)


def _drawn(image: Image.Image, slot: Tensor, thickness: int) -> Image.Image:
    """An RGB image whose patches, each where ``slot`` [rows, columns] says, are filled by groups and outlined."""
    from PIL import Image

    side = image.height // slot.shape[0]
    _, group, patches = slot.unique(return_inverse=True, return_counts=True)
    pixels = group.repeat_interleave(side, 0).repeat_interleave(side, 1)
    colours = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3)
    totals = torch.zeros(len(patches), 3, dtype=torch.float64).index_add(0, pixels.flatten(), colours.double())
    mean = totals / (patches * side * side)[:, None]
    outline = 255 * torch.tensor(generate_colormap(len(patches)), dtype=torch.float64)
    is_alone = patches == 1
    outline[is_alone] = 0.0
    border = torch.where(is_alone[pixels], _border(pixels, 1), _border(pixels, thickness))
    drawn = torch.where(border[:, :, None], outline[pixels], mean[pixels]).round().to(torch.uint8)
    return Image.fromarray(drawn.numpy())


def _slot(source: Tensor) -> Tensor:
    source = source.detach().cpu()
    integer = not source.is_floating_point()
    if source.dim() == (2 if integer else 3):
        if source.shape[0] != 1:
            raise ValueError(f"source must be of one image, got a batch of {source.shape[0]}")
        source = source[0]
    if source.dim() != (1 if integer else 2):
        raise ValueError(f"source must be a slot map [N] or an adjacency matrix [M, N], got {tuple(source.shape)}")
    return source.long() if integer else source.argmax(dim=0)


def _border(pixels: Tensor, thickness: int) -> Tensor:
    """Pixels with one of another group in the same row or column, at most ``thickness`` pixels away."""
    border = torch.zeros_like(pixels, dtype=torch.bool)
    for step in range(1, thickness + 1):
        across = pixels[:, step:] != pixels[:, :-step]
        down = pixels[step:] != pixels[:-step]
        border[:, step:] |= across
        border[:, :-step] |= across
        border[step:] |= down
        border[:-step] |= down
    return border
