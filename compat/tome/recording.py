"""What the operations of a thread ran on, and why: the notes that :mod:`tome.report` reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

PART = "part"  # a note that is of no operation: what follows is of the part that its reason names


class Call(NamedTuple):
    """An operation, the backend that ran it ("reference" or "cuda"; None: it could not be used), and why."""

    op: str
    backend: str | None
    reason: str | None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] | None = None  # of the instance: torch.compile watches no class attribute


_thread = _Thread()


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collect the calls of this thread's operations."""
    outer, _thread.calls = _thread.calls, []
    try:
        yield _thread.calls
    finally:
        _thread.calls = outer


def record(op: str, backend: str | None, reason: str | None = None) -> None:
    """Note a call, if anyone collects them."""
    if _thread.calls is not None:
        _thread.calls.append(Call(op, backend, reason))


def is_recording() -> bool:
    """Whether this thread's calls are collected."""
    return _thread.calls is not None
