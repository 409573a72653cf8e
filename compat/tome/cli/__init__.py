"""The command line ``tome``: info, bench, visualize. A wrong argument ends in one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from tome.cli.arguments import STOPPED
from tome.cli.commands import cli

__all__ = ["cli", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        result = cli.main(args=args, prog_name="tome", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.Abort:
        click.echo(STOPPED, err=True)
        sys.exit(130)
    except click.ClickException as error:
        click.echo("tome: error: " + " ".join(error.format_message().split()), err=True)
        sys.exit(2)
