"""Draw the pictures of the README and of docs/merging.md: real merges of DINOv2 ViT-S/14 with its real weights.

    python benchmarks/pictures.py

The weights and the photographs are those of benchmarks/dinov2.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from dinov2 import model, photograph
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tome import ops, patch
from tome.cli.visualize import Seen, see

matplotlib.use("Agg")
from matplotlib import patheffects, pyplot

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STRIP = {"size": 336, "r": 40}  # 24 x 24 patches; 577 tokens become 97
STRIP_OF = ("chelsea.png", "coffee.png")
STRIP_LAYERS = (4, 8, 12)
GAP, TOP = 12, 64  # pixels between pictures, and for the captions above them
LAYER = {"name": "coffee.png", "size": 112, "layer": 4, "r": 16}  # 8 x 8 patches


def see_photograph(host: Any, name: str, size: int) -> Seen:
    """What a patched model makes of the middle of a photograph."""
    photo = photograph(name)
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return see(host, photo.crop((left, top, left + side, top + side)), None, (size, size))


def strips(names: Sequence[str]) -> Image.Image:
    """A row for each photograph: itself, and its merged patches behind some layers, under one line of captions."""
    rows = [strip(name) for name in names]
    side = rows[0][0][0].width
    font = ImageFont.load_default(size=42)
    drawn = Image.new("RGB", (len(rows[0]) * (side + GAP) - GAP, TOP + len(rows) * (side + GAP) - GAP), "white")
    pen = ImageDraw.Draw(drawn)
    for i, (_, caption) in enumerate(rows[0]):
        pen.text((i * (side + GAP) + side / 2, TOP / 2), caption, fill="black", font=font, anchor="mm")
    for j, row in enumerate(rows):
        for i, (picture, _) in enumerate(row):
            drawn.paste(picture, (i * (side + GAP), TOP + j * (side + GAP)))
    return drawn


def strip(name: str) -> list[tuple[Image.Image, str]]:
    """A photograph and its merged patches behind some layers."""
    host = patch.timm(model(STRIP["size"]))
    host.r = STRIP["r"]
    seen = see_photograph(host, name, STRIP["size"])
    slots = {layer: seen.slots[layer - 1] for layer in STRIP_LAYERS}
    told = [(seen.drawn(slot), f"layer {layer}: {int(slot.max()) + 1} tokens") for layer, slot in slots.items()]
    return [(seen.picture(), f"{seen.slots[0].numel()} tokens"), *told]


def one_layer(name: str, size: int, layer: int, r: int) -> None:
    """Sources and targets of one layer, their pairs, and what merges."""
    found: list[tuple[Tensor, Tensor]] = []

    def watched(keys: Tensor, merged: int, prefix: int) -> Tensor:
        slot = ops.match(keys, merged, prefix)
        found.append((keys, slot))
        return slot

    host = patch.timm(model(size), matching=watched)
    host.r = [0] * (layer - 1) + [r]
    seen = see_photograph(host, name, size)
    ((keys, slot),) = found
    source, target, score = pairs(keys)
    merging = (slot[0, 1 + source] == slot[0, 1 + target]).nonzero()[:, 0]
    assert len(merging) == r
    assert set(merging.tolist()) == set(score.topk(r).indices.tolist())

    picture, side = seen.picture(), seen.picture().width // seen.grid[1]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.35), layout="constrained")
    titles = ("1  sources o, targets x", "2  best target of each", f"3  {r} best pairs merge")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=21, loc="left")
        axis.set_axis_off()
    halo = [patheffects.withStroke(linewidth=3, foreground="black")]
    at = torch.stack((torch.arange(len(slot[0]) - 1) % seen.grid[1], torch.arange(len(slot[0]) - 1) // seen.grid[1]))
    centre = ((at + 0.5) * side).T
    for axis in axes[:2]:
        axis.imshow(picture)
        for line in range(0, picture.width + 1, side):
            axis.axvline(line - 0.5, color="white", linewidth=0.5)
            axis.axhline(line - 0.5, color="white", linewidth=0.5)
    for places, marker in ((source, "o"), (source - 1, "x")):
        axes[0].scatter(*centre[places].T, marker=marker, color="white", s=36, path_effects=halo)
    for i in range(len(source)):
        (x, y), (u, v) = centre[source[i]].tolist(), centre[target[i]].tolist()
        is_merging = i in merging
        axes[1].annotate(
            "", (u, v), (x, y), zorder=3 if is_merging else 2,
            arrowprops={
                "arrowstyle": "-|>", "color": "#ffd400" if is_merging else "white",
                "linewidth": 2.4 if is_merging else 0.9, "path_effects": halo if is_merging else None,
                "shrinkA": 0, "shrinkB": 0, "connectionstyle": "arc3,rad=0.2",
            },
        )  # fmt: skip
    axes[2].imshow(seen.drawn(seen.slots[-1]))
    figure.savefig(IMAGES / "one_layer.png", dpi=110, bbox_inches="tight")


def pairs(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, the best target of each and their score, of patches numbered from 0, behind a class token."""
    metric = torch.nn.functional.normalize(keys[0, :, 1:].float().mean(dim=0), dim=-1)
    target, source = torch.arange(0, len(metric), 2), torch.arange(1, len(metric), 2)
    best = (metric[source] @ metric[target].T).max(dim=1)
    return source, target[best.indices], best.values


def main() -> None:
    """Draw all of them."""
    one_layer(**LAYER)
    strips(STRIP_OF).save(IMAGES / "merged_patches.png", optimize=True)


if __name__ == "__main__":
    main()
