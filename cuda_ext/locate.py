"""Print where the build finds torch, CUTLASS and the CUDA compiler, one path or version a line."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"cannot find the Python package {name!r} in {sys.executable}")
    return Path(next(iter(spec.submodule_search_locations)))


def pypi_toolkit() -> Path:
    """The folder that the wheels of cuda-toolkit share: nvidia/cu13 and the like, the newest with an nvcc."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    found = [nvcc for folder in folders for nvcc in folder.glob("cu*/bin/nvcc")]
    if not found:
        sys.exit("cannot find nvcc among the installed packages; pip install 'cuda-toolkit[nvcc,cudart,cccl,cublas]'")
    return max(found, key=lambda nvcc: int(nvcc.parts[-3].removeprefix("cu"))).parent.parent


def first_match(pattern: str, text: str) -> str:
    """The groups of the first match, joined by dots."""
    match = re.search(pattern, text, re.DOTALL)
    if match is None:
        sys.exit(f"cannot read a version: nothing matches {pattern!r}")
    return ".".join(match.groups())


def main() -> None:
    """Print the seven lines that CMakeLists.txt reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvcc", default="", help="a system nvcc instead of PyPI's")
    nvcc = parser.parse_args().nvcc
    toolkit = Path(nvcc).resolve().parent.parent if nvcc else pypi_toolkit()
    libraries = [p for p in (toolkit / "lib64", toolkit / "lib") if (p / "libcudart_static.a").exists()]
    if not libraries:
        sys.exit(f"cannot find libcudart_static.a under {toolkit}")
    if not (toolkit / "include" / "cublasLt.h").exists():
        sys.exit(
            f"cannot find cublasLt.h under {toolkit}; pip install 'cuda-toolkit[cublas]', or the toolkit's own package"
        )
    cutlass = package_folder("cutlass_library") / "source" / "include"
    version = first_match(
        r"CUTLASS_MAJOR (\d+).*?CUTLASS_MINOR (\d+).*?CUTLASS_PATCH (\d+)",
        (cutlass / "cutlass" / "version.h").read_text(),
    )
    compiler = toolkit / "bin" / "nvcc"
    told = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    print(package_folder("torch"), cutlass, version, compiler, toolkit / "include", libraries[0], sep="\n")
    print(first_match(r"release (\d+)\.(\d+)", told))


if __name__ == "__main__":
    main()
