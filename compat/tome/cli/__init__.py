"""The command line ``tome``: info, bench, visualize. A wrong argument ends in one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

COMMANDS = ("bench", "info", "visualize")


class _Commands(click.Group):
    """Loads a command's module, and what it imports, when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"tome.cli.{cmd_name}").command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="token-merging")
def cli() -> None:
    """Faster Vision Transformers by merging similar tokens (arXiv 2210.09461)."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        result = cli.main(args=args, prog_name="tome", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("tome: stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        click.echo("tome: error: " + " ".join(error.format_message().split()), err=True)
        sys.exit(2)
