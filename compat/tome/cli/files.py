"""Files that a command writes: refused before the work if they cannot be written, whole or not there behind it."""

from __future__ import annotations

import glob
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click


def check(file: Path, option: str) -> None:
    """Refuse a file that cannot be written.

    Raises:
        click.BadParameter: with the reason.

    """
    folder = file.absolute().parent
    try:
        if not folder.is_dir():
            raise click.BadParameter(f"there is no folder {folder}", param_hint=option)
        with suppress(FileNotFoundError):
            file.stat()  # a name that is too long, in whatever version of Python
        if file.is_dir():
            raise click.BadParameter(f"{file} is a folder", param_hint=option)
        if file.exists() and not os.access(file, os.W_OK):
            raise click.BadParameter(f"cannot write {file}: Permission denied", param_hint=option)
        if not is_written_directly(file):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise click.BadParameter(f"cannot write {file}: {error.strerror}", param_hint=option) from error


def check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse a file for figures or a picture that cannot be written.

    Raises:
        click.UsageError: with the reason.

    """
    if json_file is not None:
        check(json_file, "--json")
    if plot_file is not None:
        check(plot_file, "--plot")
        check_picture(plot_file, "--plot")


def partial(target: Path) -> list[Path]:
    """What interrupted processes of this machine have left beside ``target``."""
    return sorted(target.parent.glob(f"{glob.escape(target.name)}.partial*.jsonl"))


def check_partial(target: Path | None, resume: bool) -> None:
    """Refuse to overwrite what an interrupted run has left, and to go on with what none can leave.

    Raises:
        click.UsageError: with the reason.

    """
    if resume and target is None:
        raise click.UsageError("--resume needs the --json of the run that was interrupted")
    if not resume and target is not None and partial(target):
        raise click.UsageError(f"{partial(target)[0]} is left from an interrupted run: use --resume, or remove it")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder, or find that it is there.

    Raises:
        click.BadParameter: it cannot be, with the reason.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot make the folder {folder}: {error.strerror}", param_hint=option) from error


def check_picture(file: Path, option: str) -> None:
    """Refuse a picture that matplotlib cannot draw: it is not installed, or does not know the name's suffix.

    Raises:
        click.UsageError: with the reason.

    """
    figure = pyplot().figure()
    try:
        figure.savefig(io.BytesIO(), format=file.suffix[1:])
    except Exception as error:  # some formats need other programs
        raise click.BadParameter(f"{file.name}: {str(error).splitlines()[0]}", param_hint=option) from error
    finally:
        pyplot().close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, which draws without a display.

    Raises:
        click.UsageError: it is not installed.

    """
    try:
        import matplotlib
    except ImportError as error:
        raise click.UsageError("--plot needs matplotlib: pip install 'token-merging[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a path beside ``file`` to write to, which takes its place if nothing goes wrong.

    Raises:
        click.ClickException: it could not be written, with the reason.

    """
    direct = is_written_directly(file)
    target = file if direct else file.with_name(f".tome-{os.getpid()}{file.suffix}")
    try:
        yield target
        if not direct:
            target.replace(file)
    except OSError as error:
        raise click.ClickException(f"cannot write {file}: {error.strerror}") from error
    finally:
        if not direct:
            target.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Write figures, whole; NaN, which JSON does not know, as null.

    Raises:
        click.ClickException: it could not be written, with the reason.

    """
    with replacing(file) as target:
        target.write_text(json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def is_written_directly(file: Path) -> bool:
    """Whether it is a device, a pipe or a link (/dev/stdout), which a new file must not replace."""
    return file.is_symlink() or (file.exists() and not file.is_file())
