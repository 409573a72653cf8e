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
from types import ModuleType, TracebackType
from typing import Any

import torch

import tome_reference
from tome.recording import is_recording, record

CHOICES = ("auto", "reference", "cuda")
REFERENCE = (
    "the PyTorch reference, which on a GPU is slower than the unpatched model "
    "(0.49x to 0.55x of its images/s, ViT-B/16 at batch 256 on an H200)"
)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # of the instance: torch.compile watches no class attribute


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


def implementation(op: str, *args: Any, **kwargs: Any) -> ModuleType:
    """The package that computes ``op`` on these arguments, the first of which is the tokens, or a list of maps.

    Raises:
        BackendError: "cuda" was chosen and cannot run.

    """
    kernels, reason = extension(args[0] if args else next(iter(kwargs.values()), None))
    if kernels is not None:
        reason = kernels.why_not(op, *args, **kwargs)
        if reason is None:
            if is_recording():
                record(op, "cuda", kernels.remark(op, *args, **kwargs))
            return kernels
    if get_backend() == "cuda":
        raise BackendError(f"the CUDA backend cannot run {op}: {reason}")
    if is_recording():
        record(op, "reference", reason)
    return tome_reference


def extension(tokens: object) -> tuple[ModuleType | None, str | None]:
    """``tome_cuda`` where it is chosen for these tokens and usable, else None and the reason.

    Where the choice is "auto" and finds no extension for tokens on a GPU, it warns, once.
    """
    name = get_backend()
    if name == "reference":
        return None, "the reference was chosen"
    if name == "auto":
        if isinstance(tokens, (tuple, list)) and tokens:
            tokens = tokens[0]
        if not isinstance(tokens, torch.Tensor) or not tokens.is_cuda:
            return None, "the tokens are not on a GPU"
    problem: str | None = extension_problem()
    if problem is not None:
        if name == "auto":
            _warn_once(problem)
        return None, problem
    import tome_cuda  # here, so that torch.compile can trace it and importing tome loads no kernels

    return tome_cuda, None


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether the extension, rather than the reference, computes on these tokens."""
    return x.is_cuda and get_backend() != "reference" and extension_problem() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def extension_problem() -> str | None:
    """None where the CUDA extension is usable, else the reason and what mends it."""
    return _extension_problem()


@functools.cache  # every operation asks, and neither wheels nor GPUs change while a process runs
def _extension_problem() -> str | None:
    if importlib.util.find_spec("tome_cuda") is None:
        return "the package tome_cuda is missing. Fix: pip install --force-reinstall --no-deps token-merging"
    reason: str | None = importlib.import_module("tome_cuda").unavailable()
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"token merging runs on {REFERENCE}: {reason}", stacklevel=2)


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(CHOICES)}")
    return name
