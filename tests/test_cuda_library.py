"""The built library as a file: what it needs, what it holds, and that it loads where there is no GPU."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cuda_emulator as emulator
import pytest
from strategies import HEAD_DIMS

import tome_cuda
from tome_cuda import library

SYMBOLS = Path(__file__).parent / "cuda_data" / "torch-2.11-symbols.txt"  # the C interface of the oldest torch
ALLOWED_LIBRARIES = {
    *("libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"),
    *("libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"),
}
NEWEST = {  # that manylinux_2_27 allows
    "GLIBC": (2, 27), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def path() -> str:
    found = library.find()
    if found is None:
        pytest.skip("the kernels are not built")
    return str(found)


def run(tool: str, *arguments: str) -> str:
    """The output of a tool of binutils or of PyPI's CUDA, or a skip where it is missing."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    program = shutil.which(tool) or next(map(str, sorted(wheels.glob(f"cu*/bin/{tool}"))), None)
    if program is None:
        pytest.skip(f"no {tool} here")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def test_every_torch_symbol_is_in_the_oldest_torch(path: str) -> None:
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).splitlines()]
    of_torch = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert of_torch
    assert of_torch <= set(SYMBOLS.read_text().split())


def test_no_symbol_of_the_unstable_interface_or_of_python(path: str) -> None:
    undefined = run("nm", "-D", "--undefined-only", path)
    assert not re.findall(r"_ZN\w*(?:2at|3c10|5torch)\w*", undefined)
    assert not re.findall(r"\b_?Py[A-Z_]\w*", undefined)
    assert not re.findall(r"\bcuda[A-Z]\w*", undefined)


def test_needs_no_libcudart_and_no_libpython(path: str) -> None:
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path)))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed <= ALLOWED_LIBRARIES


def test_binds_lazily(path: str) -> None:
    assert "BIND_NOW" not in run("readelf", "-d", path)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere it needs the glibc that it was built with")
@pytest.mark.parametrize("name", NEWEST)
def test_symbol_versions_are_old_enough(path: str, name: str) -> None:
    found = re.findall(rf"\b{name}_([0-9.]+)", run("readelf", "-V", path))
    assert found
    assert max(tuple(map(int, version.split("."))) for version in found) <= NEWEST[name]


def test_exports_one_function_only(path: str) -> None:
    defined = run("nm", "-D", "--defined-only", "--extern-only", path)
    functions = {line.split()[-1] for line in defined.splitlines() if " T " in line}
    assert functions <= {"tome_cuda_build_info", "_init", "_fini"}


def test_holds_the_architectures_it_names(path: str) -> None:
    inside = set(re.findall(r"\.(sm_\w+)\.cubin", run("cuobjdump", "--list-elf", path)))
    archs = library.info().archs
    assert inside == {"sm_" + arch.removesuffix("-real") for arch in archs if arch.endswith("-real")}
    ptx = set(re.findall(r"\.(sm_\w+)\.ptx", run("cuobjdump", "--list-ptx", path)))
    assert ptx == {"sm_" + arch.removesuffix("-virtual") for arch in archs if arch.endswith("-virtual")}


def test_tells_what_its_kernels_take(path: str) -> None:
    told = library.info()
    assert told.head_dims == HEAD_DIMS
    assert (told.max_channels, told.least_scale) == (256, 1e-30)
    assert told.max_steps >= 48  # a merge in each block of the deepest Vision Transformers


def test_no_kernel_uses_local_memory(path: str) -> None:
    report = run("cuobjdump", "--dump-resource-usage", path)
    kernels = re.findall(r"Function (\w*kernel\w*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert len(kernels) >= 30
    assert [kernel for kernel in kernels if kernel[2] != "0" or kernel[3] != "0"] == []


def test_loads_without_a_gpu_in_a_fresh_process(path: str) -> None:
    program = (
        "import sys, tome_cuda\n"
        "assert not any(m.startswith(('tome_reference', 'tome.')) or m == 'tome' for m in sys.modules)\n"
        "import torch\n"
        "assert not hasattr(torch.ops.tome_cuda, 'merge')\n"  # importing loads nothing
        "print(tome_cuda.build_info())\n"
        "assert hasattr(torch.ops.tome_cuda, 'merge')\n"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert str(tome_cuda.build_info()) in told.stdout


def test_static_shared_memory_stays_below_what_launches_reserve_for_it(path: str) -> None:
    """CUDA itself takes 1024 bytes of every block on some GPUs, and the report counts them."""
    report = run("cuobjdump", "--dump-resource-usage", path)
    static = [int(found) for found in re.findall(r"kernel\w*:\s+REG:\d+ STACK:\d+ SHARED:(\d+)", report)]
    assert static
    assert max(static) <= emulator.STATIC_BYTES + 1024


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("90a-real",), (9, 0), True),
        (("90a-real",), (10, 0), False),
        (("80-real",), (8, 6), True),
        (("86-real",), (8, 0), False),
        (("80-real",), (9, 0), False),
        (("80-virtual",), (9, 0), True),
        (("80-virtual",), (7, 5), False),
        (("100-real",), (10, 3), True),
        (("120-real",), (12, 1), True),
        (("100-real",), (12, 0), False),
        (("80-real", "120-real"), (12, 0), True),
        (("90a-virtual",), (9, 0), True),
        (("90a-virtual",), (10, 0), False),
        (("100f-real",), (10, 3), True),
        (("100f-virtual",), (10, 3), True),
        (("100f-virtual",), (12, 0), False),
        (("90-virtual",), (12, 0), True),
    ],
)
def test_runs_on(archs: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert library.runs_on(archs, capability) is runs


@pytest.mark.parametrize("file", sorted(Path(tome_cuda.__file__).parent.glob("*.py")), ids=lambda file: file.name)
def test_a_copy_under_another_name_would_import_itself(file: Path) -> None:
    """As the hub of kernels loads packages: relative imports, and nothing but torch and the standard library."""
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert {name.partition(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
