"""The command line ``tome``; ``tome --help`` lists its commands. A wrong argument ends in one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

__all__ = ["cli", "main"]

STOPPED = "tome: stopped\n"

if TYPE_CHECKING:
    from tome.cli.commands import cli
else:

    def __getattr__(name):
        if name != "cli":
            raise AttributeError(f"module 'tome.cli' has no attribute {name!r}")
        from tome.cli.commands import cli

        return cli


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        from tome.cli.commands import run  # within reach of Ctrl-C, like all that takes time

        code = run(args)
    except KeyboardInterrupt:
        sys.stderr.write(STOPPED)
        code = 130
    sys.exit(code)
