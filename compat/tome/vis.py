"""Draw which patches were merged."""

from __future__ import annotations

import colorsys
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["generate_colormap", "make_visualization"]


def generate_colormap(N: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """N bright RGB colours with channels in [0, 1]; the same seed gives the same colours."""
    generator = random.Random(seed)
    return [colorsys.hsv_to_rgb(generator.random(), 0.4 + 0.6 * generator.random(), 1.0) for _ in range(N)]


def make_visualization(
    img: Image.Image,
    source: Tensor,
    patch_size: int = 16,
    class_token: bool = True,
    prefix: int | None = None,
) -> Image.Image:
    """Each group of merged patches filled with its mean colour and outlined.

    Args:
        img: the image as the model saw it, RGB, its height and width multiples of ``patch_size``.
        source: which token went where, of one image: the slot map int32 [N] or [1, N], or the adjacency matrix
            [M, N] or [1, M, N] (1 where original token j went into final token i).
        patch_size: pixels of one side of a patch.
        class_token: the first token is no patch.
        prefix: how many leading tokens are no patches, where that is not 0 or 1.

    Returns:
        An image of the size of ``img``. Groups of several patches have coloured outlines.

    Raises:
        ValueError: a size that does not fit.

    """
    from PIL import Image

    width, height = img.size
    rows, columns = height // patch_size, width // patch_size
    skip = int(class_token) if prefix is None else prefix
    slot = _slot(source)[skip:]
    if (rows * patch_size, columns * patch_size) != (height, width) or slot.numel() != rows * columns:
        raise ValueError(
            f"{slot.numel()} patches of {patch_size} pixels behind {skip} prefix tokens do not tile an image of "
            f"{width} x {height} pixels"
        )
    _, group = slot.unique(return_inverse=True)
    pixels = group.view(rows, columns).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    colours = torch.frombuffer(bytearray(img.convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3)
    count = pixels.flatten().bincount()
    totals = torch.zeros(len(count), 3, dtype=torch.float64).index_add(0, pixels.flatten(), colours.double())
    mean = totals / count[:, None]

    border = _border(pixels)
    outline = 255 * torch.tensor(generate_colormap(len(count)), dtype=torch.float64)
    outline[count == patch_size * patch_size] = 0.0  # a patch on its own
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


def _border(pixels: Tensor) -> Tensor:
    """Pixels whose left or upper neighbour, or whose right or lower one, is of another group."""
    across = pixels[:, 1:] != pixels[:, :-1]
    down = pixels[1:] != pixels[:-1]
    border = torch.zeros_like(pixels, dtype=torch.bool)
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border
