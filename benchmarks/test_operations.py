"""Every operation on every backend that can run here, with its byte floor (each byte read once, written once)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tome import backend, ops, use_backend


@dataclass(frozen=True)
class Shape:
    """One layer: batch, tokens, heads, head dim, r."""

    batch: int
    n: int
    heads: int
    d: int
    r: int

    def __str__(self) -> str:
        return f"B{self.batch} N{self.n} H{self.heads} D{self.d} r{self.r}"


CPU = [Shape(16, 197, 6, 64, 16), Shape(1, 197, 12, 64, 16), Shape(2, 577, 16, 64, 23)]
GPU = [
    Shape(256, 197, 12, 64, 16),
    Shape(64, 577, 16, 64, 23),
    Shape(32, 1369, 16, 80, 40),
    Shape(8, 4096, 10, 64, 2048),
]
OPERATIONS = ("match", "kth_match", "random_match", "merge", "unmerge", "attention", "merge_add_norm")


def cases() -> list[Any]:
    found = [("reference", "cpu", torch.float32, shape) for shape in CPU]
    if torch.cuda.is_available():
        names = ["reference"] + (["cuda"] if backend.extension_problem() is None else [])
        found += [(name, "cuda", torch.float16, shape) for shape in GPU for name in names]
    return [pytest.param(op, *case, id=f"{op}-{case[0]}-{case[1]}-{case[3]}") for op in OPERATIONS for case in found]


def prepare(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], list[Any]]:
    """The call, and every tensor that it must read."""
    b, n, channels = shape.batch, shape.n, shape.heads * shape.d
    packed = torch.randn(b, n, 3, shape.heads, shape.d, device=device).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x, branch = (torch.randn(b, n, channels, device=device).to(dtype) for _ in range(2))
    size = torch.randint(1, 5, (b, n), device=device).float()
    slot, tokens = ops.match(k, shape.r, 0), n - shape.r  # no prefix: the last shape merges half of all tokens
    weight = torch.ones(channels, device=device, dtype=dtype)
    merged = x[:, :tokens].contiguous()
    return {
        "match": (lambda: ops.match(k, shape.r, 0), [k]),
        "kth_match": (lambda: ops.kth_match(k, 2, 0), [k]),
        "random_match": (lambda: ops.random_match(k, shape.r, 0), [k]),
        "merge": (lambda: ops.merge(x, slot, tokens, size), [x, slot, size]),
        "unmerge": (lambda: ops.unmerge(merged, slot), [merged, slot]),
        "attention": (lambda: ops.attention(q, k, v, size), [q, k, v, size]),
        "merge_add_norm": (
            lambda: ops.merge_add_norm(x, branch, slot, tokens, size, weight, weight, 1e-6),
            [x, branch, slot, size, weight, weight],
        ),
    }[op]


def bytes_of(tensors: Any) -> int:
    tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize(("op", "name", "device", "dtype", "shape"), cases())
def test_operation(benchmark, bandwidth, op, name, device, dtype, shape):
    device = torch.device(device)
    with torch.inference_mode(), use_backend(name):
        try:
            call, inputs = prepare(op, shape, dtype, device)
            out = call()
        except backend.BackendError as error:
            pytest.skip(str(error))
        moved = bytes_of(inputs) + bytes_of(out)
        benchmark.extra_info.update(
            op=op, backend=f"{name}/{device}", shape=str(shape), dtype=str(dtype).removeprefix("torch."), bytes=moved,
            floor_us=moved / bandwidth(device) * 1e6,
        )  # fmt: skip

        def timed() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(timed, rounds=20, warmup_rounds=5)
