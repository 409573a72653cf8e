"""Loading the kernels: where the library lies, what it was built for, and what stands in its way."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

MODULE = "tome_cuda._kernels"
FIX = "TOME_BUILD_CUDA=1 pip install --force-reinstall --no-deps token-merging"
OLDEST_TORCH = (2, 11)


class LibraryError(RuntimeError):
    """The kernels can't be loaded; the message gives the reason and the fix."""


class BuildInfo(NamedTuple):
    """What a library was built with and for."""

    path: str
    torch: str  # the oldest torch it runs under
    cuda: str  # of the compiler
    cutlass: str
    archs: tuple[str, ...]  # as in TOME_CUDA_ARCHS: "90a-real", "80-virtual"


class _Loaded(NamedTuple):
    info: BuildInfo | None
    reason: str | None


def find() -> Path | None:
    """The library's file, beside this one or wherever an editable install keeps it; None if there is none."""
    suffix = ".abi3.so"
    beside = Path(__file__).with_name("_kernels" + suffix)
    if beside.exists():
        return beside
    try:
        spec = importlib.util.find_spec(MODULE)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


@functools.cache
def _load() -> _Loaded:
    if _torch_version() < OLDEST_TORCH:
        return _Loaded(None, f"torch {torch.__version__} is too old for the kernels; they need torch >= 2.11")
    path = find()
    if path is None:
        return _Loaded(None, f"the kernels are not built; build them with: {FIX}")
    try:
        # Lazy binding: on a machine without a GPU the CUDA half of torch is missing, and is never called.
        library = ctypes.CDLL(os.fspath(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
        describe = library.tome_cuda_build_info
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"the kernels at {path} can't be loaded ({error}); rebuild them with: {FIX}")
    describe.restype = ctypes.c_char_p
    told = json.loads(describe())
    info = BuildInfo(
        path=os.fspath(path),
        torch=told["torch"],
        cuda=told["cuda"],
        cutlass=told["cutlass"],
        archs=tuple(told["archs"].split(",")),
    )
    return _Loaded(info, None)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def missing() -> str | None:
    """Load the library once; None when it is there, else the reason and the fix."""
    return _load().reason


def build_info() -> BuildInfo:
    """What the library was built with and for.

    Raises:
        LibraryError: there is no library, or it can't be loaded.
    """
    info, reason = _load()
    if info is None:
        raise LibraryError(reason)
    return info


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` runs on a GPU of this compute capability.

    Machine code runs on its own generation from its own revision on, or on exactly its GPU where the name ends
    in "a"; PTX runs on every GPU that is not older.
    """
    major, minor = capability
    for arch in archs:
        name, _, kind = arch.partition("-")
        number = int(name.rstrip("af"))
        if kind == "virtual":
            if number <= 10 * major + minor:
                return True
        elif name.endswith("a"):
            if number == 10 * major + minor:
                return True
        elif number // 10 == major and number % 10 <= minor:
            return True
    return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def unsupported_device(index: int) -> str | None:
    """None when the library has code for CUDA device ``index``, else the reason."""
    return _unsupported_device(index)


@functools.cache
def _unsupported_device(index: int) -> str | None:
    info, reason = _load()
    if info is None:
        return reason
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(info.archs, (major, minor)):
        return None
    return (
        f"the kernels were built for {', '.join(info.archs)} and not for {torch.cuda.get_device_name(index)} "
        f"({major}.{minor}); rebuild them with: TOME_CUDA_ARCHS={major}{minor}-real {FIX}"
    )
