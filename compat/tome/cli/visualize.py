"""``tome visualize``: which patches of a photograph were merged."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from tome import schedule, vis
from tome.cli.common import RANDOM_WEIGHTS, ScheduleType, create_model, patched
from tome.patch import timm_vit

EPILOG = """\b
Examples:
  tome visualize photo.jpg --r 16,-1.0 --out merged/
  tome visualize a.jpg b.png --model vit_small_patch16_224 --r 8 --random-weights
"""


@click.command("visualize", epilog=EPILOG)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--model", "model_name", default="vit_base_patch16_224", show_default=True, help="Name in timm.")
@click.option("--r", type=ScheduleType(), default="16", show_default=True, help="8 or 8,-1.0 or [8,8,4] or 0.05.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for the pictures."
)
@click.option(RANDOM_WEIGHTS, "random_weights", is_flag=True, help="Draw with an untrained model, no download.")
def command(images: tuple[Path, ...], model_name: str, r: schedule.Schedule, out: Path, random_weights: bool) -> None:
    """Draw each IMAGE as the model sees it, beside its merged patches: one colour and outline a group.

    Writes NAME_merged.png for each image; pretrained weights are the default.
    """
    photos = [_open(path) for path in images]
    torch.manual_seed(0)
    model = create_model(model_name, pretrained=not random_weights)
    merging, plan = patched(model_name, model, r)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot make the folder {out}: {error.strerror}", param_hint="--out") from error
    console = Console()
    targets = _targets(images, out)
    for photo, target in track(list(zip(photos, targets, strict=True)), "drawing", transient=True):
        draw(merging, photo).save(target)
    for target in targets:
        console.print(f"{target}: {plan.tokens[0]} -> {plan.tokens[-1]} tokens", soft_wrap=True)


def draw(model: timm_vit.PatchedViT, photo: Image.Image) -> Image.Image:
    """The photograph as the model sees it, beside its groups of merged patches."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    steps = create_transform(**config, is_training=False)
    pixels = steps(photo)
    with torch.inference_mode():
        slot = model.forward_tokens(pixels[None], trace=True).slot
    assert slot is not None
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen = (pixels * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    shown = Image.fromarray(seen.permute(1, 2, 0).contiguous().numpy())
    size = model.patch_embed.patch_size[0]
    merged = vis.make_visualization(shown, slot, size, prefix=model.num_prefix_tokens)
    both = Image.new("RGB", (2 * shown.width + 8, shown.height), "white")
    both.paste(shown, (0, 0))
    both.paste(merged, (shown.width + 8, 0))
    return both


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            photo: Image.Image = image.convert("RGB")
            return photo
    except FileNotFoundError as error:
        raise click.BadParameter(f"there is no file {path}", param_hint="IMAGE") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise click.BadParameter(f"{path} is not a readable image", param_hint="IMAGE") from error


def _targets(images: tuple[Path, ...], out: Path) -> list[Path]:
    """One file an image; images of the same name are numbered, so that none overwrites another."""
    targets: list[Path] = []
    for image in images:
        target, number = out / f"{image.stem}_merged.png", 2
        while target in targets:
            target, number = out / f"{image.stem}_merged_{number}.png", number + 1
        targets.append(target)
    return targets
