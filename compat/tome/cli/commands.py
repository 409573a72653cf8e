"""The commands and their arguments. PyTorch is imported by what a command runs, once its arguments have been read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tome import schedule
from tome.cli import arguments, files

INFO = """\b
Examples:
  tome info
  TOME_BACKEND=reference tome info
  tome info vit_base_patch16_224 --r 8 --dtype float16 --device cuda
"""
BENCH = """\b
Examples:
  tome bench vit_small_patch16_224 --r 8 --r 16 --r 16,-1.0
  tome bench vit_base_patch16_224 --r 16 --batch-size 256 --dtype float16 --device cuda --compile
  tome bench vit_tiny_patch16_224 --r 0.05 --batch-size 1 --device cuda --cuda-graph --json out.json --plot out.png
"""
EVALUATE = """\b
Examples:
  tome evaluate vit_small_patch16_224 --data photos/ --r 8 --r 16 --r 16,-1.0
  tome evaluate my_models:digits_vit --data digits --mean 0.5 --std 0.5 --crop 1.0 --json out.json --plot out.png
  tome evaluate vit_base_patch16_224 --data ImageNet --root /data/imagenet --dtype float16 --device cuda
  torchrun --nproc-per-node 8 -m tome evaluate vit_base_patch16_224 --data val/ --json out.json --resume
"""
HOSTS = """\b
Examples:
  tome hosts
  tome info torchvision:vit_b_16 --r 8
  tome bench hf:facebook/dinov2-base --r 8
"""
VISUALIZE = """\b
Examples:
  tome visualize photo.jpg --r 16,-1.0 --out merged/
  tome visualize a.jpg b.png --model vit_small_patch16_224 --r 8 --random-weights
  tome visualize photo.jpg --model vit_base_patch16_224 --checkpoint weights.safetensors
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="token-merging")
def cli() -> None:
    """Faster Vision Transformers by merging similar tokens (arXiv 2210.09461).

    MODEL is a name of timm's, hf-hub:REPOSITORY or local-dir:FOLDER, both of timm's models; or hf:NAME or hf:FOLDER
    (transformers), torchvision:NAME, open_clip:NAME or open_clip:NAME/WEIGHTS (its vision tower), or module:function,
    which returns a model.
    """
    arguments.check_environment()


@cli.command(epilog=BENCH)
@click.argument("model", metavar="MODEL")
@arguments.schedules
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@arguments.dtype
@arguments.autocast
@arguments.device
@arguments.checkpoint
@click.option(
    "--backend",
    "backends",
    type=click.Choice(arguments.BACKENDS),
    multiple=True,
    help="Who merges; repeat it to compare. Without it TOME_BACKEND chooses.",
)
@click.option("--compile", "compiled", is_flag=True, help="Also measure both sides under torch.compile.")
@click.option("--cuda-graph", is_flag=True, help="Replay each variant as a CUDA graph.")
@click.option("--runs", type=click.IntRange(min=1), default=15, show_default=True, help="Measured passes.")
@click.option("--warm-up", type=click.IntRange(min=0), default=3, show_default=True, help="Passes before them.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw throughput.")
def bench(
    model: str,
    schedules: tuple[schedule.Schedule, ...],
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device: str | None,
    checkpoint: Path | None,
    backends: tuple[str, ...],
    compiled: bool,
    cuda_graph: bool,
    runs: int,
    warm_up: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure MODEL, with random weights, unpatched and with token merging, taking turns."""
    arguments.check_dtypes(dtype, autocast)
    if cuda_graph and device == "cpu":
        raise click.BadParameter("needs --device cuda, not cpu", param_hint="--cuda-graph")
    files.check_outputs(json_file, plot_file)
    with arguments.loading():
        from tome.cli import bench as work
    work.run(
        model, schedules, batch_size, dtype, autocast, device, checkpoint, backends, compiled, cuda_graph, runs,
        warm_up, json_file, plot_file,
    )  # fmt: skip


@cli.command(epilog=EVALUATE)
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True,
              help="A folder of images, or of folders, one a class; a dataset of torchvision; or digits.")  # fmt: skip
@click.option("--root", type=click.Path(path_type=Path), help="Where the dataset of torchvision's lies.")
@arguments.schedules
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images, spread over all.")
@click.option("--no-labels", "labels", flag_value=False, default=True, help="Folders are no classes: agreement only.")
@click.option("--batch-size", type=arguments.CountOrAutoType(), default="auto", show_default=True,
              help="auto: on a GPU the largest that fits, on a CPU 16.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=0),
              help="Processes that read images. [default: the cores where there is a GPU, else none]")  # fmt: skip
@arguments.dtype
@arguments.autocast
@click.option("--compile", "compiled", is_flag=True, help="Run everything under torch.compile.")
@arguments.device
@arguments.checkpoint
@click.option(arguments.RANDOM_WEIGHTS, "random_weights", is_flag=True, help="An untrained model, no download.")
@click.option("--image-size", type=click.IntRange(min=1), help="Instead of the model's own, where it can take others.")
@click.option("--mean", type=arguments.NumbersType(), help="0.5 or 0.485,0.456,0.406, instead of the model's.")
@click.option("--std", type=arguments.NumbersType(positive=True), help="Likewise.")
@click.option("--crop", type=click.FloatRange(0, 1, min_open=True), help="What is left of the shorter edge.")
@click.option("--interpolation", type=click.Choice(arguments.INTERPOLATIONS), help="How images are resized.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw accuracy or agreement against speed.")
@click.option("--resume", is_flag=True, help="Go on where a run with the same --json was interrupted.")
def evaluate(**options: Any) -> None:
    """Measure what merging does to MODEL's answers and to its speed, on images, against the unpatched model.

    Top-1 and top-5 where there are labels, and agreement with the unpatched model: cosine of the pooled features, the
    same answer, KL divergence of the logits. Under torchrun the processes share the images.
    """
    arguments.check_dtypes(options["dtype"], options["autocast"])
    arguments.check_weights(options["checkpoint"], options["random_weights"])
    files.check_outputs(options["json_file"], options["plot_file"])
    files.check_partial(options["json_file"], options["resume"])
    with arguments.loading():
        from tome.cli import evaluate as work
        from tome.cli.setup import Options
    work.run(Options(**options))


@cli.command(epilog=INFO)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--r", type=arguments.ScheduleType(), default="8", show_default=True, help="Schedule: 8 or 8,-1.0 or 0.05."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@arguments.dtype
@arguments.autocast
@arguments.device
@arguments.checkpoint
def info(
    model: str | None,
    r: schedule.Schedule,
    batch_size: int,
    dtype: str,
    autocast: str | None,
    device: str | None,
    checkpoint: Path | None,
) -> None:
    """Show each operation and backend, whether it is available or why not, and versions for a bug report.

    With MODEL: run it once with random weights, and show block by block what ran on which backend, and why. The
    options are about that run.
    """
    arguments.check_dtypes(dtype, autocast)
    with arguments.loading():
        from tome.cli import info as work
    if model is None:
        work.show_backends()
    else:
        work.show_parts(model, r, batch_size, dtype, autocast, device, checkpoint)


@cli.command(epilog=HOSTS)
def hosts() -> None:
    """Show which models of which libraries can be patched, and why others cannot."""
    with arguments.loading():
        from tome.cli import info as work
    work.show_hosts()


@cli.command(epilog=VISUALIZE)
@click.argument(
    "images", nargs=-1, required=True, metavar="IMAGE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)  # fmt: skip
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--r", type=arguments.ScheduleType(), default="16", show_default=True,
              help="8 or 8,-1.0 or [8,8,4] or 0.05.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the pictures.")
@arguments.checkpoint
@click.option(arguments.RANDOM_WEIGHTS, "random_weights", is_flag=True, help="An untrained model, no download.")
def visualize(
    images: tuple[Path, ...],
    model: str,
    r: schedule.Schedule,
    out: Path,
    checkpoint: Path | None,
    random_weights: bool,
) -> None:
    """Draw each IMAGE as the model sees it, beside its merged patches: one colour and outline a group.

    Writes NAME_merged.png for each image; pretrained weights are the default.
    """
    arguments.check_weights(checkpoint, random_weights)
    files.make_folder(out, "--out")
    targets = _targets(images, out)
    for target in targets:
        files.check(target, "--out")
    with arguments.loading():
        from tome.cli import visualize as work
    work.run(images, targets, model, r, checkpoint, random_weights)


def run(args: Sequence[str] | None) -> int:
    """Run the command line, and return its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C.

    """
    try:
        result = cli.main(args=args, prog_name="tome", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        click.echo("tome: error: " + " ".join(error.format_message().split()), err=True)
        return 2
    return result if isinstance(result, int) else 0


def _targets(images: tuple[Path, ...], out: Path) -> list[Path]:
    """One file an image; images of the same name are numbered, so that none overwrites another."""
    targets: list[Path] = []
    for image in images:
        target, number = out / f"{image.stem}_merged.png", 2
        while target in targets:
            target, number = out / f"{image.stem}_merged_{number}.png", number + 1
        targets.append(target)
    return targets
