"""The CUDA kernels on a CPU: built by the system's C++ compiler against a small emulator of CUDA's threads.

The emulator (include/) runs the unchanged kernel sources, one fibre per thread. It checks index arithmetic,
barriers, alignment and rounding; it can't check speed, real concurrency or the compiler for the GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cuda_ext" / "csrc"
SOURCES = (
    *("match/fused.cu", "match/metric.cu", "match/tiled.cu", "merge/gather.cu", "merge/spread.cu"),
    *("norm/forward.cu", "norm/backward.cu", "attention/resident.cu", "attention/streamed.cu"),
    "restore/restore.cu",
)
FLAGS = (
    *("-std=c++17", "-O1", "-mf16c", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),  # which takes a jump to another stack for a mistake
)
READ = {".cu", ".cuh", ".h", ".hpp", ".cpp"}
BUILDS = HERE.parents[1] / "build" / "cuda-emulator"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BIPARTITE, RUNS, LISTED = range(3)
HOPPER_SHARED_BYTES = 227 << 10
SMALL_SHARED_BYTES = 99 << 10
STATIC_BYTES = 9 << 10  # the most static shared memory of a kernel: kStaticReserve of launch.cuh
MARGIN = 64  # poisoned elements around every output


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    return None if shutil.which("g++") else "no g++ to build the emulator with"


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels, built once for all processes and runs that have the same sources."""
    sources = [*(KERNELS / name for name in SOURCES), *sorted(HERE.glob("*.cpp"))]
    read = [path for folder in (KERNELS, HERE) for path in sorted(folder.rglob("*.*")) if path.suffix in READ]
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    told = [compiler, " ".join(FLAGS).encode(), *(part for path in read for part in (bytes(path), path.read_bytes()))]
    name = hashlib.sha256(b"\0".join(told)).hexdigest()[:16] + ".so"
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILDS / name).exists():
            for earlier in BUILDS.glob("*.so"):
                earlier.unlink()
            _build(sources, BUILDS / name)
    return ctypes.CDLL(str(BUILDS / name))


def _build(sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="cuda-emulator-") as folder:

        def compiled(source: Path) -> str:
            name = f"{folder}/{source.parent.name}-{source.stem}.o"
            command = ["g++", *FLAGS, f"-I{HERE / 'include'}", f"-I{KERNELS}", "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", name], check=True)
            return name

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        subprocess.run(["g++", "-shared", "-o", f"{folder}/whole.so", *objects], check=True)
        shutil.copy(f"{folder}/whole.so", library.with_suffix(".part"))
        library.with_suffix(".part").rename(library)  # only what is whole has the name


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


def _is_aligned(tensor: Tensor, boundary: int = 16) -> bool:
    size = tensor.element_size()
    row = tensor.shape[-1] * size
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % boundary == 0
        and row % boundary == 0
        and all(stride * size % boundary == 0 for stride in tensor.stride()[:-1])
    )


def _is_aligned_like(branch: Tensor | None, x: Tensor) -> bool:
    return branch is None or _is_aligned(branch, 16 * branch.element_size() // x.element_size())


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


def second_grant(needed: int, granted: int) -> int:
    """How many launches there are of a kernel that is first granted too little shared memory, then enough.

    Raises:
        AssertionError: CUDA would refuse the second one.

    """
    why = ctypes.create_string_buffer(200)
    launches: int = library().emulated_second_grant(needed, granted, why, len(why))
    assert not why.value, why.value.decode()
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


def merge_add_norm(
    x: Tensor,
    branch: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
    block_outputs: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merged x, y, the sizes and the statistics (mean, 1 / standard deviation) of every row.

    Without a branch nothing is merged, and the merged x is empty.
    """
    batch, length, channels = x.shape
    out = Guarded((0 if branch is None else batch, tokens, channels), x.dtype)
    y = Guarded((batch, tokens, channels), norm_dtype or x.dtype)
    total, stats = Guarded((batch, tokens), torch.float32), Guarded((batch, tokens, 2), torch.float32)
    parameters = (gamma, weight, bias)
    strides = [*x.stride(), *((0,) * 3 if branch is None else branch.stride())]
    for table in (slot, size):
        strides += (0, 0) if table is None else table.stride()
    strides += [0 if value is None else value.stride(0) for value in parameters]
    dtypes = [
        x.dtype,
        x.dtype if branch is None else branch.dtype,
        y.tensor.dtype,
        *(x.dtype if v is None else v.dtype for v in parameters),
    ]
    aligned = _is_aligned(x) and _is_aligned_like(branch, x)
    aligned &= all(v is None or (v.stride(0) == 1 and v.data_ptr() % 16 == 0) for v in parameters)
    library().emulated_norm(
        *(_address(t) for t in (x, branch, out.tensor, y.tensor, None if slot is None else total.tensor)),
        *(_address(t) for t in (stats.tensor, slot, size, *parameters)),
        *(_longs(*strides), (ctypes.c_int * 6)(*(DTYPES[dtype] for dtype in dtypes)), ctypes.c_float(eps)),
        *(batch, length, tokens, channels, block_outputs, int(aligned), seed),
    )
    return out.check(), y.check(), total.check(), stats.check()


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
) -> Tensor:
    """Attention [B, Nq, H, D] by one of two kernels; ``teams`` and ``splits`` overrule the plan."""
    batch, heads, queries, head_dim = q.shape
    out = Guarded((batch, queries, heads, head_dim), q.dtype)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0) if size is None else size.stride()))
    library().emulated_attention(
        *(_address(t) for t in (q, k, v, size, out.tensor)),
        _longs(*strides),
        *(DTYPES[q.dtype], batch, heads, queries, k.shape[2], head_dim, ctypes.c_float(scale)),
        *(int(_is_aligned(q) and _is_aligned(k) and _is_aligned(v)), int(streamed), teams, splits),
        *(shared_bytes, seed),
    )
    return out.check()


def merge_add_norm_backward(
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    merged: Tensor,
    stats: Tensor,
    slot: Tensor | None,
    size: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    length: int,
    branch_dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and branch."""
    batch, tokens, channels = merged.shape
    x, branch = (Guarded((batch, length, channels), dtype) for dtype in (merged.dtype, branch_dtype))
    strides: list[int] = []
    for value, dims in ((grad_x, 3), (grad_y, 3), (slot, 2), (size, 2), (total, 2), (weight, 1), (gamma, 1)):
        strides += (0,) * dims if value is None else value.stride()
    dtypes = [merged.dtype, merged.dtype if grad_y is None else grad_y.dtype, branch_dtype]
    dtypes += [merged.dtype if value is None else value.dtype for value in (weight, gamma)]
    rows = [value for value in (grad_x, grad_y, merged) if value is not None]
    aligned = all(_is_aligned(value, 16 * value.element_size() // merged.element_size()) for value in rows)
    aligned &= all(v is None or (v.stride(0) == 1 and v.data_ptr() % 16 == 0) for v in (weight, gamma))
    library().emulated_norm_backward(
        *(_address(t) for t in (grad_x, grad_y, merged, stats, x.tensor, branch.tensor)),
        *(_address(t) for t in (slot, size, total, weight, gamma)),
        *(_longs(*strides), (ctypes.c_int * 5)(*(DTYPES[dtype] for dtype in dtypes))),
        *(batch, length, tokens, channels, int(aligned), seed),
    )
    return x.check(), branch.check()


def column_sums(a: Tensor, b: Tensor, stats: Tensor | None, seed: int = 0) -> Tensor:
    """Sums over rows in slabs: of a, and of a times b, which statistics normalise."""
    batch, rows, channels = a.shape
    aligned = channels % 8 == 0 and _is_aligned(a) and _is_aligned(b)
    dtypes = (ctypes.c_int * 2)(DTYPES[a.dtype], DTYPES[b.dtype])
    numbers = (_longs(*a.stride(), *b.stride()), dtypes, batch, rows, channels, int(aligned), seed)
    slabs = library().emulated_columns(_address(a), _address(b), _address(stats), _address(None), *numbers)
    out = Guarded((slabs, 2, channels), torch.float32)
    library().emulated_columns(_address(a), _address(b), _address(stats), _address(out.tensor), *numbers)
    return out.check()


def _chain(steps: Sequence[Tensor]) -> tuple[object, ...]:
    strides = [stride for step in steps for stride in step.stride()]
    lengths = (ctypes.c_int * len(steps))(*(step.shape[1] for step in steps))
    return (ctypes.c_void_p * len(steps))(*(step.data_ptr() for step in steps)), _longs(*strides), lengths, len(steps)


def follow(steps: Sequence[Tensor], seed: int = 0) -> Tensor:
    """Where a chain of slot maps takes each token of the first."""
    out = Guarded(tuple(steps[0].shape), torch.int32)
    library().emulated_follow(*_chain(steps), _address(out.tensor), steps[0].shape[0], seed)
    return out.check()


def restore(
    x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None, block_rows: int = 32, seed: int = 0
) -> Tensor:
    """X + gamma * branch, unmerged along a chain of slot maps."""
    batch, tokens, channels = x.shape
    length = steps[0].shape[1] if steps else tokens
    out = Guarded((batch, length, channels), x.dtype)
    strides = [*x.stride(), *((0,) * 3 if branch is None else branch.stride())]
    strides += [0 if gamma is None else gamma.stride(0)]
    dtypes = [x.dtype, *(x.dtype if value is None else value.dtype for value in (branch, gamma))]
    aligned = _is_aligned(x) and _is_aligned(out.tensor) and _is_aligned_like(branch, x)
    aligned &= gamma is None or (gamma.stride(0) == 1 and gamma.data_ptr() % 16 == 0)
    library().emulated_restore(
        *(*_chain(steps), _address(x), _address(branch), _address(gamma), _longs(*strides)),
        *((ctypes.c_int * 3)(*(DTYPES[dtype] for dtype in dtypes)), _address(out.tensor)),
        *(batch, length, tokens, channels, block_rows, int(aligned), seed),
    )
    return out.check()
