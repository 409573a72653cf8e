"""The command line within this process, and cases of it that are refused."""

import pytest

import tome.cli


def run(capsys, *args):
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as exit_:
        tome.cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def bad(*case):
    """Arguments, and behind them what is to be said of them."""
    *args, message = case
    return pytest.param(args, message, id=" ".join(map(str, args))[:70])
