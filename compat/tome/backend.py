"""Who computes an operation: the pure PyTorch reference or the CUDA extension.

``TOME_BACKEND=auto|reference|cuda`` and :func:`set_backend` choose for the process, :func:`use_backend` for one
thread. ``auto`` takes the extension for CUDA tensors where it can and the reference elsewhere. An explicit ``cuda``
raises where the extension cannot be used at all or cannot run an operation on these inputs (their device, dtype,
width); it never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

import tome_reference

CHOICES = ("auto", "reference", "cuda")
PART = "part"  # a record of :func:`recorded` that is no operation: what follows is of the part its reason names
INSTALL = "TOME_BUILD_CUDA=1 pip install . (in a checkout of token-merging)"


class Call(NamedTuple):
    """An operation, the backend that ran it ("reference" or "cuda"; None: it could not be used), and why."""

    op: str
    backend: str | None
    reason: str | None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # of the instance: torch.compile watches no class attribute
        self.calls: list[Call] | None = None


_thread = _Thread()
_process = os.environ.get("TOME_BACKEND", "auto")
_warned = False


class BackendError(RuntimeError):
    """The chosen backend cannot run this operation; the message says why."""


def get_backend() -> str:
    """The name in force in this thread: "auto", "reference" or "cuda".

    Raises:
        ValueError: TOME_BACKEND holds another name.

    """
    return _thread.name or _checked(_process)


def set_backend(name: str) -> None:
    """Choose the backend of the process: "auto", "reference" or "cuda".

    Raises:
        ValueError: another name.

    """
    global _process
    _process = _checked(name)


class use_backend:  # noqa: N801  # used like a function
    """Context manager: choose the backend for this thread, over whatever the process has chosen.

    Args:
        name: "auto", "reference" or "cuda"; None changes nothing.

    Raises:
        ValueError: another name.

    """

    def __init__(self, name: str | None) -> None:
        self.name = None if name is None else _checked(name)
        self.outer: list[str | None] = []

    def __enter__(self) -> None:
        self.outer.append(_thread.name)
        _thread.name = self.name or _thread.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.name = self.outer.pop()


def implementation(op: str, *args: object) -> ModuleType:
    """The package that computes ``op`` on these arguments, the first of which is the tokens or keys.

    Raises:
        BackendError: "cuda" was chosen and cannot run.

    """
    name = get_backend()
    if name == "reference":
        reason: str | None = "the reference was chosen"
    elif name == "auto" and not (args and isinstance(args[0], torch.Tensor) and args[0].is_cuda):
        reason = "the tokens are not on a GPU"
    else:
        reason = extension_problem()
        if reason is None:
            import tome_cuda  # here, so that torch.compile can trace it and importing tome loads no kernels

            reason = tome_cuda.why_not(op, *args)
            if reason is None:
                if _thread.calls is not None:
                    report(op, "cuda", tome_cuda.remark(op, *args))
                return tome_cuda
        elif name == "auto":
            _warn_once(reason)
        if name == "cuda":
            raise BackendError(f"the CUDA backend cannot run {op}: {reason}")
    report(op, "reference", reason)
    return tome_reference


def unrecorded_extension(x: torch.Tensor) -> ModuleType | None:
    """``tome_cuda`` where it computes on these tokens and nobody records the operations one by one."""
    if _thread.calls is not None or get_backend() == "reference":
        return None
    module = implementation("attention", x)
    return None if module is tome_reference else module


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collect what the operations of this thread run on, and why (:mod:`tome.report`)."""
    outer, _thread.calls = _thread.calls, []
    try:
        yield _thread.calls
    finally:
        _thread.calls = outer


def report(op: str, backend: str | None, reason: str | None = None) -> None:
    """Tell :func:`recorded` of an operation."""
    if _thread.calls is not None:
        _thread.calls.append(Call(op, backend, reason))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def extension_problem() -> str | None:
    """None where the CUDA extension is usable, else the reason and what mends it."""
    return _extension_problem()


@functools.cache  # every operation asks, and neither wheels nor GPUs change while a process runs
def _extension_problem() -> str | None:
    if importlib.util.find_spec("tome_cuda") is None:
        return f"the CUDA extension is not installed. Fix: {INSTALL}"
    reason: str | None = importlib.import_module("tome_cuda").unavailable()
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"token merging runs on the PyTorch reference: {reason}", stacklevel=2)


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(CHOICES)}")
    return name
