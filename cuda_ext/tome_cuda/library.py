"""Loading the kernels: where the library lies, what it was built for, and what stands in its way."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .remedy import build_command

MODULE = f"{__package__}._kernels"
OLDEST_TORCH = (2, 11)  # TORCH_TARGET_VERSION in CMakeLists.txt


class LibraryError(RuntimeError):
    """The kernels can't be loaded; the message gives the reason and the fix."""


class BuildInfo(NamedTuple):
    """What a library was built with and for."""

    path: str
    torch: str  # the oldest torch it runs under
    cuda: str  # of the compiler
    cutlass: str
    archs: tuple[str, ...]  # as in TOME_CUDA_ARCHS: "90a-real", "80-virtual"
    head_dims: tuple[int, ...]  # that attention takes
    max_channels: int  # of a metric
    least_scale: float  # of attention
    max_steps: int  # merges that are followed in one launch
    least_rows: int  # from which on a linear layer and its GELU are surely one product, where they can be


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
    path = find()
    if path is None:
        return _Loaded(None, f"the kernels of the CUDA extension are not built. Fix: {build_command()}")
    # Asked before loading: with lazy binding a function that torch lacks would end the process.
    if _version(torch.__version__) < OLDEST_TORCH:
        return _Loaded(None, _newer_torch(".".join(map(str, OLDEST_TORCH))))
    try:
        # Lazy binding: on a machine without a GPU the CUDA half of torch is missing, and is never called.
        library = ctypes.CDLL(os.fspath(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
        describe = library.tome_cuda_build_info
        describe.restype = ctypes.c_char_p
        info = _read(path, json.loads(describe()))
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"the kernels at {path} cannot be loaded ({error}). Fix: {build_command()}")
    except KeyError as error:
        return _Loaded(
            None, f"the kernels at {path} are of another version (they tell no {error}). Fix: {build_command()}"
        )
    if _version(torch.__version__) < _version(info.torch):
        return _Loaded(None, _newer_torch(info.torch))
    return _Loaded(info, None)


def _read(path: Path, told: dict[str, Any]) -> BuildInfo:
    return BuildInfo(
        path=os.fspath(path),
        torch=told["torch"],
        cuda=told["cuda"],
        cutlass=told["cutlass"],
        archs=tuple(told["archs"].split(",")),
        head_dims=tuple(told["head_dims"]),
        max_channels=told["max_channels"],
        least_scale=told["least_scale"],
        max_steps=told["max_steps"],
        least_rows=told["least_rows"],
    )


def _newer_torch(needed: str) -> str:
    return f"the kernels need torch >= {needed}, this is {torch.__version__}. Fix: pip install 'torch>={needed}'"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def missing() -> str | None:
    """Load the library once; None when it is there, else the reason and the fix."""
    return _load().reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def info() -> BuildInfo:
    """What the library was built with and for.

    Raises:
        LibraryError: there is no library, or it can't be loaded.

    """
    loaded, reason = _load()
    if loaded is None:
        raise LibraryError(reason)
    return loaded


def build_info() -> dict[str, str]:
    """What the library was built with and for, to be read by people; empty where none can be loaded."""
    loaded = _load().info
    if loaded is None:
        return {}
    return {
        "kernels": loaded.path,
        "kernels for torch": f">= {loaded.torch}",
        "kernels for GPUs": ", ".join(loaded.archs),
        "kernels built with": f"CUDA {loaded.cuda}, CUTLASS {loaded.cutlass}",
    }


def unavailable() -> str | None:
    """Why no operation of this package can run on this machine, with the fix; None where they can."""
    reason: str | None = missing() or _no_gpu() or _old_driver()
    if reason is None:
        reasons = [unsupported_device(index) for index in range(torch.cuda.device_count())]
        reason = None if None in reasons else reasons[0]
    return reason


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return (
            f"this PyTorch ({torch.__version__}) was built without CUDA. "
            "Fix: install one that was built with it, https://pytorch.org/get-started/locally"
        )
    with warnings.catch_warnings():  # torch warns of a driver that it finds too old; so does the reason
        warnings.simplefilter("ignore")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    driver = _driver_version()
    found = "no NVIDIA driver" if driver is None else f"a driver for CUDA {driver[0]}.{driver[1]}"
    return (
        f"PyTorch (built for CUDA {torch.version.cuda}) can use no GPU; there is {found} here. "
        "Fix: run on a machine with an NVIDIA GPU and a driver for that version, and see CUDA_VISIBLE_DEVICES"
    )


def _old_driver() -> str | None:
    """The CUDA runtime inside the library runs on drivers of its own major version and newer ones."""
    driver, built = _driver_version(), _version(info().cuda)
    if driver is None or driver[0] >= built[0]:
        return None
    return (
        f"the driver supports CUDA {driver[0]}.{driver[1]}, the kernels were built with {built[0]}.{built[1]}. "
        f"Fix: update the driver, or build with an older nvcc: TOME_NVCC=/path/to/nvcc {build_command()}"
    )


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA version of the driver; None where there is no driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` runs on a GPU of this compute capability.

    A name that ends in "a" is for exactly its GPU, machine code and PTX alike. Else machine code runs on its own
    generation from its own revision on, as does PTX whose name ends in "f"; other PTX on every GPU that is not older.
    """
    major, minor = capability
    for arch in archs:
        name, _, kind = arch.partition("-")
        number = int(name.rstrip("af"))
        if name.endswith("a"):
            runs = number == 10 * major + minor
        elif kind == "virtual" and not name.endswith("f"):
            runs = number <= 10 * major + minor
        else:
            runs = number // 10 == major and number % 10 <= minor
        if runs:
            return True
    return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def unsupported_device(index: int) -> str | None:
    """None when the library has code for CUDA device ``index``, else the reason."""
    return _unsupported_device(index)


@functools.cache
def _unsupported_device(index: int) -> str | None:
    loaded, reason = _load()
    if loaded is None:
        return reason
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(loaded.archs, (major, minor)):
        return None
    return (
        f"the kernels were built for {', '.join(loaded.archs)} and not for {torch.cuda.get_device_name(index)} "
        f"({major}.{minor}). Fix: TOME_CUDA_ARCHS={major}{minor}-real {build_command()}"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def runs_hopper(index: int) -> bool:
    """Whether CUDA device ``index`` runs the kernels that are for compute capability 9.0 alone, and they are built."""
    return _runs_hopper(index)


@functools.cache
def _runs_hopper(index: int) -> bool:
    has_kernels = any(arch.startswith("90a-") for arch in info().archs)
    return has_kernels and torch.cuda.get_device_capability(index) == (9, 0)
