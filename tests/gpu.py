"""What every operator does on a GPU whatever it computes: the same bits again and on any stream, in a CUDA graph,
compiled, and its outputs written wholly, with nothing beside them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None]


def assert_same_bits(call: Call) -> None:
    """A hundred runs, and two streams at once."""
    first = tensors(call())
    for _ in range(100):
        assert all(map(torch.equal, first, tensors(call())))
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream(), torch.cuda.Stream()] * 5:
        with torch.cuda.stream(stream):
            results.append(tensors(call()))
    torch.cuda.synchronize()
    assert all(all(map(torch.equal, first, result)) for result in results)


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a CUDA graph, and the outputs that a replay fills."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def assert_replays(call: Call, inputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """A graph of ``call``, which reads ``inputs``, computes the same of other ones in their place."""
    graph, captured = capture(call)
    for old, new in zip(inputs, others, strict=True):
        old.copy_(new)
    graph.replay()
    assert all(map(torch.equal, tensors(captured), tensors(call())))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled in one graph, replayed as CUDA graphs."""
    with warnings.catch_warnings():  # importing the compiler of some versions of torch uses what torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, mode="reduce-overhead")


def assert_writes_nothing_else(call: Call, *sizes: int) -> None:
    """Outputs of so many bytes each, of whole steps of torch's allocator, land on poison and between more of it."""
    assert all(size % 512 == 0 for size in sizes)
    expected = tensors(call())
    torch.cuda.synchronize()
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):  # in which nothing else has left a gap
        rows = [[torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(9)] for size in sizes]
        gaps = [row.pop(4).data_ptr() for row in rows]  # given back when all are there: what fits the outputs best
        poison = [block for row in rows for block in row]
        outputs = tensors(call())
    torch.cuda.synchronize()
    assert {output.data_ptr() for output in outputs} == set(gaps)
    assert all(bool((block == 0xA5).all()) for block in poison)
    assert all(map(torch.equal, outputs, expected))
