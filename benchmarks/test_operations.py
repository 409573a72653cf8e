"""Every operation on every backend that can run here, with its byte floor (each byte read once, written once)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import median_seconds, repeated

from tome import backend, ops, use_backend

SETS = 4  # of inputs, so that a GPU's cache does not hold the next one


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
MORE_ATTENTION = [Shape(256, 149, 12, 64, 16), Shape(256, 101, 12, 64, 16), Shape(32, 1369, 16, 64, 40)]
ACTIVATIONS = ("quick_gelu", "swiglu", "swiglu_norm", "linear_gelu")
PLACES = ("rotate", "rotate neighbours", "homes", "pair_bias")
MATCHING = ("match", "kth_match", "random_match", "set_match", "match+merge", "merge", "unmerge")
NORMS = ("add_norm", "merge_add_norm", "merge_add_norm autocast")
SDPA = ("sdpa without sizes", "sdpa with a mask")  # PyTorch's attention, to compare with
LINEAR = ("linear", "linear then gelu")  # PyTorch's linear layer and GELU, likewise
MORE_LINEAR = [Shape(256, 149, 12, 64, 16), Shape(256, 101, 12, 64, 16), Shape(256, 197, 16, 64, 16)]


def cases() -> list[Any]:
    every = (*MATCHING, "attention", *NORMS, *PLACES, *ACTIVATIONS)
    found = [(op, "reference", "cpu", torch.float32, shape) for op in every for shape in CPU]
    if torch.cuda.is_available():
        names = ["reference"] + (["cuda"] if backend.extension_problem() is None else [])
        found += [(op, name, "cuda", torch.float16, shape) for op in every for shape in GPU for name in names]
        found += [("attention", name, "cuda", torch.float16, shape) for shape in MORE_ATTENTION for name in names]
        found += [(op, "torch", "cuda", torch.float16, shape) for op in SDPA for shape in GPU + MORE_ATTENTION]
        found += [("linear_gelu", name, "cuda", torch.float16, shape) for shape in MORE_LINEAR for name in names]
        found += [(op, "torch", "cuda", torch.float16, shape) for op in LINEAR for shape in GPU + MORE_LINEAR]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}-{case[4]}".replace(" ", "_")) for case in found]


def prepare(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], list[Any]]:
    """The call, and every tensor that it must read."""
    b, n, channels = shape.batch, shape.n, shape.heads * shape.d
    packed = torch.randn(b, n, 3, shape.heads, shape.d, device=device).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x, branch = (torch.randn(b, n, channels, device=device).to(dtype) for _ in range(2))
    wide = x.float()
    size = torch.randint(1, 5, (b, n), device=device).float()
    slot, tokens = ops.match(k, shape.r, 0), n - shape.r  # no prefix: the last shape merges half of all tokens
    is_target = torch.arange(n, device=device) % 4 == 0
    sets = [chosen.nonzero()[:, 0].repeat(b, 1) for chosen in (~is_target, is_target)]
    weight = torch.ones(channels, device=device, dtype=dtype)
    weights = torch.ones(channels, device=device)
    merged = x[:, :tokens].contiguous()
    table, home = torch.randn(n, 2 * shape.d, device=device), torch.arange(n, device=device).repeat(b, 1)
    pairs, m = torch.randn(shape.heads, n, n, device=device).to(dtype), min(n, 600)  # no mask is larger than that
    hidden = torch.randn(b, n, 4 * channels, device=device).to(dtype)
    gate, value = hidden.chunk(2, dim=2)
    fc1 = torch.randn(4 * channels, channels, device=device).mul(channels**-0.5).to(dtype), hidden[0, 0]
    mask = size.log().to(dtype)[:, None, None, :]
    return {
        "match": (lambda: ops.match(k, shape.r, 0), [k]),
        "kth_match": (lambda: ops.kth_match(k, 2, 0), [k]),
        "random_match": (lambda: ops.random_match(k, shape.r, 0), [k]),
        "set_match": (lambda: ops.set_match(k, *sets, shape.r), [k, *sets]),
        "match+merge": (lambda: ops.merge(x, ops.match(k, shape.r, 0), tokens, size), [k, x, size]),
        "merge": (lambda: ops.merge(x, slot, tokens, size), [x, slot, size]),
        "unmerge": (lambda: ops.unmerge(merged, slot), [merged, slot]),
        "attention": (lambda: ops.attention(q, k, v, size), [q, k, v, size]),
        "rotate": (lambda: ops.rotate(q, k, table, home, 0, True), [q, k, table, home]),
        "rotate neighbours": (lambda: ops.rotate(q, k, table), [q, k, table]),
        "homes": (lambda: ops.homes(slot, tokens, home), [slot, home]),
        "quick_gelu": (lambda: ops.quick_gelu(hidden), [hidden]),
        "swiglu": (lambda: ops.swiglu(gate, value), [gate, value]),
        "swiglu_norm": (
            lambda: ops.swiglu_norm(gate, value, 2 * channels, None, None, 1e-6),
            [gate, value],
        ),
        "pair_bias": (lambda: ops.pair_bias(pairs, home[:, :m], size[:, :m]), [pairs, home[:, :m], size[:, :m]]),
        "linear_gelu": (lambda: ops.linear_gelu(x, *fc1), [x, *fc1]),
        "linear": (lambda: F.linear(x, *fc1), [x, *fc1]),
        "linear then gelu": (lambda: F.gelu(F.linear(x, *fc1)), [x, *fc1]),
        "sdpa without sizes": (lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v]),
        "sdpa with a mask": (lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), [q, k, v, mask]),
        "add_norm": (
            lambda: ops.merge_add_norm(x, branch, None, n, None, weight, weight, 1e-6)[:2],
            [x, branch, weight, weight],
        ),
        "merge_add_norm": (
            lambda: ops.merge_add_norm(x, branch, slot, tokens, size, weight, weight, 1e-6),
            [x, branch, slot, size, weight, weight],
        ),
        "merge_add_norm autocast": (
            lambda: ops.merge_add_norm(
                wide, branch, slot, tokens, size, weights, weights, 1e-6, norm_dtype=torch.float16
            ),
            [wide, branch, slot, size, weights, weights],
        ),
    }[op]


def bytes_of(tensors: Any) -> int:
    tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize(("op", "name", "device", "dtype", "shape"), cases())
def test_operation(benchmark, bandwidth, op, name, device, dtype, shape):
    device = torch.device(device)
    sets = SETS if device.type == "cuda" else 1
    with torch.inference_mode(), use_backend(None if name == "torch" else name):
        try:
            prepared = [prepare(op, shape, dtype, device) for _ in range(sets)]
            calls = [call for call, _ in prepared]
            moved = bytes_of(prepared[0][1]) + bytes_of(calls[0]())
        except backend.BackendError as error:
            pytest.skip(str(error))
        median = median_seconds(calls, device)
        benchmark.extra_info.update(
            op=op, backend=f"{name}/{device}", shape=str(shape), dtype=str(dtype).removeprefix("torch."), bytes=moved,
            floor_us=moved / bandwidth(device) * 1e6, median_us=median * 1e6,
        )  # fmt: skip
        timed = calls[0] if device.type == "cpu" else repeated(calls)

        def finished() -> None:
            timed()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
