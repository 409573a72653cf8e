"""What an interrupted evaluation leaves beside its JSON: a line for each batch, from which ``--resume`` goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click

from tome.cli import files
from tome.evaluate import Tally


def read(target: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of all files; the last of a file may be torn, and is then left out.

    Raises:
        click.UsageError: a file is of another run.

    """
    lines = []
    for file in files.partial(target):
        told, *rest = list(_lines(file)) or [header]
        wrong = next((key for key in header if told.get(key) != header[key]), None)
        if wrong is not None:
            raise click.UsageError(
                f"{file} is of a run with {wrong} {told.get(wrong)}, not {header[wrong]}: repeat that run or remove it"
            )
        lines += rest
    return lines


class Writer:
    """Appends a line for each batch, which is on the disk before the next begins.

    Args:
        target: the file whose place the lines hold; None writes nothing.
        header: the first line: what must be the same in a run that goes on.
        rank: which of several processes writes.

    """

    def __init__(self, target: Path | None, header: dict[str, Any], rank: int) -> None:
        self.target, self.header = target, header
        self.stream: BinaryIO | None = None
        self.name = f".partial{f'-{rank}' if rank else ''}.jsonl"

    def write(self, positions: list[int], tally: Tally) -> None:
        """The sums of the images in these places; the first makes the file."""
        if self.target is None:
            return
        file = self.target.with_name(self.target.name + self.name)
        try:
            if self.stream is None:
                self.stream = file.open("ab")
                whole = file.read_bytes().rfind(b"\n") + 1
                self.stream.truncate(whole)
                if not whole:
                    self._append(self.header)
            self._append({"positions": positions, **asdict(tally)})
        except OSError as error:
            raise click.ClickException(f"cannot write {file}: {error.strerror}") from error

    def close(self) -> None:
        """Nothing more is written."""
        if self.stream is not None:
            self.stream.close()

    def remove(self) -> None:
        """What they were kept for is done."""
        if self.target is not None:
            for file in files.partial(self.target):
                file.unlink(missing_ok=True)

    def _append(self, line: dict[str, Any]) -> None:
        assert self.stream is not None
        self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"cannot go on from {file} ({error}): remove it") from error
