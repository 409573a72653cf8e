"""The commands and their arguments. PyTorch is imported by what a command runs, once its arguments have been read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tome import __version__, schedule
from tome.cli import arguments, examples, files


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=examples.COMPLETION)
@click.version_option(__version__)
def cli() -> None:
    """Faster Vision Transformers by merging similar tokens (arXiv 2210.09461).

    MODEL is a name of timm's, hf-hub:REPOSITORY or local-dir:FOLDER, both of timm's models; or hf:NAME or hf:FOLDER
    (transformers), torchvision:NAME, open_clip:NAME or open_clip:NAME/WEIGHTS (its vision tower), or module:function,
    which returns a model.
    """
    arguments.check_environment()


@cli.command(epilog=examples.BENCH)
@click.argument("model", metavar="MODEL")
@arguments.schedules
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@arguments.dtype
@arguments.autocast
@arguments.device
@arguments.checkpoint
@arguments.image_size
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
    image_size: tuple[int, int] | None,
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
        model, schedules, batch_size, dtype, autocast, device, checkpoint, image_size, backends, compiled, cuda_graph,
        runs, warm_up, json_file, plot_file,
    )  # fmt: skip


@cli.command(epilog=examples.EVALUATE)
@click.argument("model", metavar="MODEL")
@arguments.images
@arguments.schedules
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images, spread over all.")
@click.option("--batch-size", type=arguments.CountOrAutoType(), default="auto", show_default=True,
              help="auto: on a GPU the largest that fits, on a CPU 16.")  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Run everything under torch.compile.")
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


@cli.command(epilog=examples.TUNE)
@click.argument("model", metavar="MODEL")
@arguments.images
@arguments.wishes
@click.option("--limit", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
              help="Only N images, spread over all.")  # fmt: skip
@click.option("--batch-size", type=arguments.CountOrAutoType(), default="auto", show_default=True,
              help="Whose time counts; auto: on a GPU the largest that fits up to 256, on a CPU 16.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path),
              help="Write the schedule, for --r FILE.json and tome.schedule.load, and the figures.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the tokens of each layer.")
def tune(**options: Any) -> int:
    """Find MODEL's schedule, layer by layer, for these images and this machine, without training.

    Of a given speed it is the one with the least error, within a given error the fastest; the error is that against the
    unpatched model, so no labels are needed. Constant r and (r, -1) stand beside it at the same measured speed. Exit
    code 1: nothing does what was asked for, and the nearest is shown.
    """
    wish = arguments.wish(options)
    if wish is None:
        raise click.UsageError(f"choose one of {arguments.WISHES}")
    arguments.check_dtypes(options["dtype"], options["autocast"])
    arguments.check_weights(options["checkpoint"], options["random_weights"])
    files.check_outputs(options["json_file"], options["plot_file"])
    with arguments.loading():
        from tome.cli import tune as work
        from tome.cli.setup import Options
        from tome.tune import Wish
    return work.run(Options(schedules=(0,), compiled=False, resume=False, **options), Wish(*wish))


@cli.command(epilog=examples.REPORT)
@click.argument("model", metavar="MODEL")
@arguments.images
@arguments.schedules
@arguments.wishes
@click.option("--no-tune", is_flag=True,
              help="Without a tuned schedule. [default: tune for 1.5 times the speed without merging]")  # fmt: skip
@click.option("--tune-images", type=click.IntRange(min=2), default=64, show_default=True, metavar="N",
              help="Tune on N of the images.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images, spread over all.")
@click.option("--batch-size", type=arguments.CountOrAutoType(), default="auto", show_default=True,
              help="auto: on a GPU the largest that fits, up to 256, on a CPU 16.")  # fmt: skip
@click.option("--pictures", type=click.IntRange(min=1), default=4, show_default=True, metavar="N",
              help="Draw the merges of N images.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True,
              help="The page.")  # fmt: skip
def report(no_tune: bool, tune_images: int, pictures: int, out: Path, **options: Any) -> int:
    """Write one page of HTML about MODEL with merging, on images and this machine.

    The tuned schedule, speed, accuracy or agreement against speed, tokens per layer, merges of some images, and the
    commands that give each part again. The page needs no network. Exit code 1: no schedule does what was asked for, and
    the page is of the nearest.
    """
    wish = arguments.wish(options)
    if wish is not None and no_tune:
        raise click.UsageError(f"choose one of {arguments.WISHES} and --no-tune")
    arguments.check_dtypes(options["dtype"], options["autocast"])
    arguments.check_weights(options["checkpoint"], options["random_weights"])
    files.check(out, "--out")
    with arguments.loading():
        from tome.cli import report as work
        from tome.cli.setup import Options
        from tome.tune import Wish
    given = Options(compiled=False, resume=False, json_file=None, plot_file=None, **options)
    return work.run(given, not no_tune, None if wish is None else Wish(*wish), tune_images, pictures, out)


@cli.command(epilog=examples.INFO)
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


@cli.command(epilog=examples.HOSTS)
def hosts() -> None:
    """Show which models of which libraries can be patched, and why others cannot."""
    with arguments.loading():
        from tome.cli import info as work
    work.show_hosts()


@cli.command(epilog=examples.VISUALIZE)
@click.argument(
    "images", nargs=-1, required=True, metavar="IMAGE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)  # fmt: skip
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--r", type=arguments.ScheduleType(), default="16", show_default=True,
              help="8 or 8,-1.0 or [8,8,4] or 0.05.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the pictures.")
@arguments.checkpoint
@arguments.random_weights
@arguments.image_size
@click.option("--layers", is_flag=True, help="Draw the merges layer by layer, not only the last.")
@click.option("--gif", is_flag=True, help="Write an animation of the layers, NAME_merged.gif.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw all images into this one file, a row each.")
def visualize(
    images: tuple[Path, ...],
    model: str,
    r: schedule.Schedule,
    out: Path,
    checkpoint: Path | None,
    random_weights: bool,
    image_size: tuple[int, int] | None,
    layers: bool,
    gif: bool,
    sheet: Path | None,
) -> None:
    """Draw each IMAGE as the model sees it, beside its merged patches: one colour and outline a group.

    Writes NAME_merged.png for each image; pretrained weights are the default.
    """
    arguments.check_weights(checkpoint, random_weights)
    if gif and (layers or sheet is not None):
        raise click.UsageError(f"choose one of --gif and {'--layers' if layers else '--sheet'}")
    targets = _targets(images, out, ".gif" if gif else ".png")
    if sheet is None:
        files.make_folder(out, "--out")
        for target in targets:
            files.check(target, "--out")
    else:
        files.check(sheet, "--sheet")
    with arguments.loading():
        from tome.cli import visualize as work
    work.run(images, targets, model, r, checkpoint, random_weights, image_size, layers, sheet)


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


def _targets(images: tuple[Path, ...], out: Path, suffix: str) -> list[Path]:
    """One file an image; images of the same name are numbered, so that none overwrites another."""
    targets: list[Path] = []
    for image in images:
        target, number = out / f"{image.stem}_merged{suffix}", 2
        while target in targets:
            target, number = out / f"{image.stem}_merged_{number}{suffix}", number + 1
        targets.append(target)
    return targets
