"""What the build of the kernels takes for a failure: ptxas's reports of slow code."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).parents[1] / "cuda_ext" / "compile.py"
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4lookv' for 'sm_90a'
ptxas info    : Function properties for _Z4lookv
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers"""
SERIAL = (
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_Z4lookv'"
)


def report(stack: int = 0, stores: int = 0, loads: int = 0) -> str:
    return REPORT.format(stack=stack, stores=stores, loads=loads)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        (report(), None),
        (report(stack=8, stores=4, loads=8), "_Z4lookv (sm_90a): 8 bytes stack frame, 4 bytes spill stores"),
        (report(stack=16), "_Z4lookv (sm_90a): 16 bytes stack frame"),
        (SERIAL + "\n" + report(), "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized"),
    ],
)
def test_slow_code_fails_the_build_and_leaves_no_object(told: str, complaint: str | None, tmp_path: Path) -> None:
    made = tmp_path / "kernel.o"
    compiler = f"import sys; open(sys.argv[-1], 'w'); print({told!r})"
    command = [sys.executable, str(COMPILE), sys.executable, "-c", compiler, "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told in done.stdout
    assert (done.returncode == 0) == made.exists() == (complaint is None)
    assert complaint is None or complaint in done.stderr


def test_a_compiler_s_own_failure_is_passed_on() -> None:
    done = subprocess.run([sys.executable, str(COMPILE), sys.executable, "-c", "exit(3)"], check=False)
    assert done.returncode == 3


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the versions are those of x86-64")
@pytest.mark.skipif(not all(map(shutil.which, ("g++", "readelf"))), reason="needs g++ and binutils")
def test_a_library_linked_with_the_stand_ins_asks_for_an_old_glibc_and_loads(tmp_path: Path) -> None:
    code = """
        #include <dlfcn.h>
        #include <memory>
        #include <pthread.h>
        extern "C" int works() {
          pthread_t thread;
          auto shared = std::make_shared<int>(40);
          auto run = [](void* p) -> void* {
            auto copy = *(std::shared_ptr<int>*)p;
            *copy += copy.use_count();
            return p;
          };
          return pthread_create(&thread, nullptr, run, &shared) + pthread_join(thread, nullptr) == 0
              && dlsym(RTLD_DEFAULT, "malloc") ? *shared : 0;
        }"""
    (tmp_path / "a.cpp").write_text(code)
    subprocess.run([sys.executable, str(COMPILE.with_name("old_glibc.py")), str(tmp_path), "g++"], check=True)
    sources = [str(tmp_path / "a.cpp"), str(COMPILE.parent / "csrc" / "one_thread.cpp")]
    stand_ins = sorted(map(str, tmp_path.glob("lib*.so")))
    assert len(stand_ins) == 3
    made = tmp_path / "made.so"
    subprocess.run(["g++", "-shared", "-fPIC", *sources, *stand_ins, "-o", str(made)], check=True)
    told = subprocess.run(["readelf", "-V", str(made)], check=True, capture_output=True, text=True).stdout
    assert max(tuple(map(int, v.split("."))) for v in re.findall(r"\bGLIBC_([0-9.]+)", told)) <= (2, 27)
    assert ctypes.CDLL(str(made)).works() == 42
