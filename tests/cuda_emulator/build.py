"""Building the emulated library: kernels and host code of csrc/, unchanged, by the system's C++ compiler."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "cuda_ext" / "csrc"
BUILDS = HERE.parents[1] / "build" / "cuda-emulator"
TORCH = Path(torch.__file__).parent
READ = {".cu", ".cuh", ".h", ".hpp", ".cpp"}
FLAGS = (
    *("-std=c++17", "-O1", "-mf16c", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),  # which takes a jump to another stack for a mistake
    *(f"-I{HERE / 'include'}", f"-I{CSRC}", "-x", "c++", "-c"),
)
HOST_FLAGS = (
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-isystem", str(TORCH / "include")),
    *("-Wno-attributes", "-DTOME_ARCHS=80-virtual", "-DTOME_CUDA_VERSION=0", "-DTOME_CUTLASS_VERSION=0"),
    *("-include", str(HERE / "host.h")),
)


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    return None if shutil.which("g++") else "no g++ to build the emulator with"


def library() -> ctypes.CDLL:
    """The emulated library, built once for all processes and runs that have the same sources.

    Raises:
        CalledProcessError: the compiler fails; it isn't asked again.

    """
    built = _library()
    if isinstance(built, ctypes.CDLL):
        return built
    raise built


@functools.cache
def _library() -> ctypes.CDLL | subprocess.CalledProcessError:
    read = [path for folder in (CSRC, HERE) for path in sorted(folder.rglob("*.*")) if path.suffix in READ]
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    told = [compiler, torch.__version__.encode(), repr((FLAGS, HOST_FLAGS)).encode()]
    told += [part for path in read for part in (bytes(path), path.read_bytes())]
    name = hashlib.sha256(b"\0".join(told)).hexdigest()[:16] + ".so"
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILDS / name).exists():
            for earlier in BUILDS.glob("*.so"):
                earlier.unlink()
            try:
                _build(BUILDS / name)
            except subprocess.CalledProcessError as error:
                return error
    return ctypes.CDLL(str(BUILDS / name))


def _build(library: Path) -> None:
    kernels = [path for path in CSRC.glob("*/*.cu") if not path.name.startswith("hopper")]
    elsewhere = {CSRC / "product" / "cublaslt.cpp"}  # a library for GPUs
    host = [CSRC / "binding.cpp", *{*CSRC.glob("*/*.cpp")} - elsewhere, HERE / "host.cpp", HERE / "plans.cpp"]
    with tempfile.TemporaryDirectory(prefix="cuda-emulator-") as folder:

        def compiled(source: Path) -> str:
            name = f"{folder}/{source.parent.name}-{source.name}.o"
            flags = HOST_FLAGS if source in host else ()
            subprocess.run(["g++", *flags, *FLAGS, str(source), "-o", name], check=True)
            return name

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, {*kernels, *host, *HERE.glob("*.cpp")}))
        links = (f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,-z,lazy")
        subprocess.run(["g++", "-shared", "-o", f"{folder}/whole.so", *objects, *links], check=True)
        shutil.copy(f"{folder}/whole.so", library.with_suffix(".part"))
        library.with_suffix(".part").rename(library)  # only what is whole has the name
