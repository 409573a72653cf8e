"""The CUDA kernels on a CPU: built by the system's C++ compiler against a small emulator of CUDA's threads.

The emulator (include/) runs the unchanged kernel sources, one fibre per thread. It checks index arithmetic,
barriers, alignment and rounding; it can't check speed, real concurrency or the compiler for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cuda_ext" / "csrc"
SOURCES = ("match/fused.cu", "match/tiled.cu", "merge/gather.cu", "merge/spread.cu",
           "attention/resident.cu", "attention/streamed.cu")  # fmt: skip
FLAGS = ("-std=c++17", "-O1", "-mf16c", "-mfma", "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BIPARTITE, RUNS, LISTED = range(3)
HOPPER_SHARED_BYTES = 227 << 10
SMALL_SHARED_BYTES = 99 << 10
STATIC_BYTES = 8 << 10  # the most static shared memory of a kernel: kStaticReserve of launch.cuh
MARGIN = 64  # poisoned elements around every output


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    return None if shutil.which("g++") else "no g++ to build the emulator with"


@functools.cache
def library() -> ctypes.CDLL:
    """Build the emulated kernels, once."""
    with tempfile.TemporaryDirectory(prefix="cuda-emulator-") as folder:
        objects = []
        for source in (*(KERNELS / name for name in SOURCES), HERE / "emulated.cpp"):
            objects.append(f"{folder}/{source.stem}.o")
            command = ["g++", *FLAGS, f"-I{HERE / 'include'}", f"-I{KERNELS}", "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", objects[-1]], check=True)
        subprocess.run(["g++", "-shared", "-o", f"{folder}/emulated.so", *objects], check=True)
        return ctypes.CDLL(f"{folder}/emulated.so")


class Guarded:
    """An output tensor between two stretches of poison."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = int(torch.Size(shape).numel())
        self.whole = torch.empty(count + 2 * MARGIN, dtype=dtype)
        self.whole.view(torch.uint8).fill_(0xA5)
        self.expected = self.whole.clone()
        self.tensor = self.whole[MARGIN : MARGIN + count].view(shape)

    def check(self) -> Tensor:
        """The output, once the poison around it is found intact."""
        for edge in (slice(0, MARGIN), slice(self.whole.numel() - MARGIN, None)):
            assert torch.equal(self.whole[edge].view(torch.uint8), self.expected[edge].view(torch.uint8))
        return self.tensor


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _longs(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    row = tensor.shape[-1] * size
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and row % 16 == 0
        and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    )


def match(
    keys: Tensor,
    sources: int,
    targets: int,
    merged: int,
    prefix: int,
    pairing: int = BIPARTITE,
    run: int = 0,
    lists: tuple[Tensor, Tensor] | None = None,
    tiled: bool = False,
    shared_bytes: int = HOPPER_SHARED_BYTES,
    seed: int = 0,
) -> Tensor:
    """The slot map of one of the two matching kernels."""
    heads = keys.shape[1] if keys.dim() == 4 else 1
    head_stride = keys.stride(1) if keys.dim() == 4 else 0
    batch, (tokens, channels) = keys.shape[0], keys.shape[-2:]
    padded = (channels + 15) // 16 * 16
    slot = Guarded((batch, tokens), torch.int32)
    metric = Guarded((batch * (sources + targets) * 2 * padded,), torch.float16)
    best = Guarded((batch * sources,), torch.int64)
    done = Guarded((batch,), torch.int32)
    library().emulated_match(
        _address(keys),
        _longs(keys.stride(0), head_stride, keys.stride(-2), keys.stride(-1)),
        _address(lists[0] if lists else None),
        _address(lists[1] if lists else None),
        *(_address(guarded.tensor) for guarded in (slot, metric, best, done)),
        *(DTYPES[keys.dtype], batch, heads, tokens, channels, prefix, sources, targets, merged, run, pairing),
        *(int(_is_aligned(keys)), shared_bytes, int(tiled), seed),
    )
    for guarded in (metric, best, done):
        guarded.check()
    return slot.check()


def plan(shape: tuple[int, int, int, int], prefix: int, dtype: torch.dtype, aligned: bool, gpu: tuple[int, int]) -> int:
    """How many launches matching plans for keys [B, H, N, D] on a GPU with so many bytes per block and multiprocessor.

    Raises:
        AssertionError: CUDA would refuse one of them.

    """
    why = ctypes.create_string_buffer(200)
    batch, heads, tokens, channels = shape
    launches: int = library().emulated_plan(
        *(batch, heads, tokens, channels, prefix, DTYPES[dtype], int(aligned), *gpu, why, len(why))
    )
    assert not why.value, f"{shape}, prefix {prefix}, {dtype}: {why.value.decode()}"
    return launches


def gather(
    x: Tensor,
    slot: Tensor,
    tokens: int,
    size: Tensor | None,
    weighted: bool = True,
    block_outputs: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Merge, or where not ``weighted`` the gradient of an unmerge."""
    batch, length, channels = x.shape
    out = Guarded((batch, tokens, channels), x.dtype)
    total = Guarded((batch, tokens), torch.float32)
    strides = (*x.stride(), *slot.stride(), *((0, 0) if size is None else size.stride()))
    library().emulated_gather(
        *(_address(x), _address(out.tensor), _address(total.tensor if weighted else None)),
        *(_address(slot), _address(size), _longs(*strides)),
        *(DTYPES[x.dtype], batch, length, tokens, channels, block_outputs),
        *(int(_is_aligned(x) and _is_aligned(out.tensor)), seed),
    )
    return out.check(), total.check()


def spread(x: Tensor, slot: Tensor, size: Tensor | None, total: Tensor | None, seed: int = 0) -> Tensor:
    """Unmerge, or with ``total`` the gradient of a merge."""
    batch, tokens, channels = x.shape
    length = slot.shape[1]
    out = Guarded((batch, length, channels), x.dtype)
    strides = (*x.stride(), *slot.stride(), *((0, 0) if size is None else size.stride()))
    library().emulated_spread(
        *(
            _address(x),
            _address(out.tensor),
            _address(total),
            _address(slot),
            _address(size),
            _longs(*strides),
        ),
        *(DTYPES[x.dtype], batch, length, tokens, channels),
        *(int(_is_aligned(x) and _is_aligned(out.tensor)), seed),
    )
    return out.check()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    scale: float,
    streamed: bool = False,
    teams: int = 0,
    splits: int = 0,
    shared_bytes: int = HOPPER_SHARED_BYTES,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention [B, Nq, H, D] by one of two kernels, and log-sum-exps; ``teams`` and ``splits`` overrule the plan."""
    batch, heads, queries, head_dim = q.shape
    out = Guarded((batch, queries, heads, head_dim), q.dtype)
    lse = Guarded((batch, heads, (queries + 31) // 32 * 32), torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0) if size is None else size.stride()))
    library().emulated_attention(
        *(_address(t) for t in (q, k, v, size, out.tensor)),
        _longs(*strides),
        *(DTYPES[q.dtype], batch, heads, queries, k.shape[2], head_dim, ctypes.c_float(scale)),
        *(int(_is_aligned(q) and _is_aligned(k) and _is_aligned(v)), int(streamed), teams, splits),
        *(_address(lse.tensor), shared_bytes, seed),
    )
    return out.check(), lse.check()
