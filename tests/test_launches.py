"""Every launch that the operators plan is one that CUDA accepts: grid, threads and shared memory, static included."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import Gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE, HEAD_DIMS
from torch import Tensor

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

GPUS = {
    "8.0": Gpu(163 << 10, 164 << 10, 108),
    "8.6 and 8.9": Gpu(99 << 10, 100 << 10, 84),
    "9.0 and 10.0": Gpu(227 << 10, 228 << 10, 132),
    "12.0": Gpu(99 << 10, 100 << 10, 170),
}
LENGTHS = [*range(2, 66), *range(66, 2100, 7), 577, 4096, 8191, 16384, 20000]
GPU = st.sampled_from(list(GPUS.values()))
DTYPES = st.sampled_from(HALF_AND_SINGLE)
BATCHES = st.integers(0, 300)
TOKENS = st.integers(1, 20000) | st.integers(1, 700)
CHANNELS = st.integers(1, 5000) | st.sampled_from((384, 768, 1024, 1152, 1280, 1664, 4096))
# More examples than a law has: nothing is computed.
MANY = settings(max_examples=10 * settings().max_examples)


def memory(*shape: int, dtype: torch.dtype = torch.float32, aligned: bool = True) -> Tensor:
    """A tensor of up to 2^28 elements, the batch cut short. Nothing of it is touched, so it takes no memory."""
    count = int(torch.Size(shape[1:]).numel())
    batch = min(shape[0], max(1, (1 << 28) // max(count, 1)))
    start = 0 if aligned else 1
    return torch.empty(batch * count + start, dtype=dtype)[start:].view(batch, *shape[1:])


def match(shape: tuple[int, ...], r: int, prefix: int, gpu: Gpu, dtype: torch.dtype, aligned: bool) -> int:
    return emulator.planned("bipartite_match", memory(*shape, dtype=dtype, aligned=aligned), r, prefix, gpu=gpu)


@pytest.mark.parametrize("gpu", GPUS)
def test_matching_of_every_length_and_width(gpu: str) -> None:
    for n in LENGTHS:
        for d in (1, *range(8, 257, 8), 255):
            assert match((1, 1, n, d), n // 2, 0, GPUS[gpu], torch.float32, False) in (1, 2)


def test_a_block_just_below_what_needs_no_asking() -> None:
    """Dynamic shared memory below 48 KiB that exceeds it with the kernel's own."""
    for n in range(560, 600):
        assert match((1, 1, n, 1), n // 2, 0, GPUS["9.0 and 10.0"], torch.float32, False) == 1


def test_shared_memory_that_was_refused_is_asked_for_again() -> None:
    assert emulator.second_grant(96 << 10, 64 << 10) == 1


@MANY
@given(
    *(BATCHES, st.integers(1, 24), TOKENS, st.integers(1, 256), st.integers(0, 5)),
    *(st.floats(0, 1), DTYPES, st.booleans(), GPU),
)
def test_matching(
    batch: int, heads: int, n: int, d: int, prefix: int, share: float, dtype: torch.dtype, aligned: bool, gpu: Gpu
) -> None:
    free = n + 1
    r = max(1, int(share * free / 2))
    assert (match((batch, heads, prefix + free, d), r, prefix, gpu, dtype, aligned) == 0) == (batch == 0)


@MANY
@given(BATCHES, TOKENS, CHANNELS, DTYPES, st.booleans(), st.booleans(), GPU, st.data())
def test_merging(
    batch: int, n: int, channels: int, dtype: torch.dtype, aligned: bool, sized: bool, gpu: Gpu, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, n) | st.just(n))
    x = memory(batch, n, channels, dtype=dtype, aligned=aligned)
    y = memory(x.shape[0], tokens, channels, dtype=dtype, aligned=aligned)
    slot, size = memory(x.shape[0], n, dtype=torch.int32), memory(x.shape[0], n) if sized else None
    launches = min(batch, 1)
    assert emulator.planned("merge", x, slot, tokens, size, gpu=gpu) == launches
    assert emulator.planned("unmerge", y, slot, gpu=gpu) == launches
    assert emulator.planned("merge_backward", y, slot, size, memory(x.shape[0], tokens), gpu=gpu) == launches
    assert emulator.planned("unmerge_backward", x, slot, tokens, gpu=gpu) == launches


@MANY
@given(BATCHES, TOKENS, CHANNELS, *[DTYPES] * 5, *[st.booleans()] * 4, GPU, st.data())
def test_norms(
    batch: int, n: int, channels: int, dtype: torch.dtype, branch_dtype: torch.dtype, norm_dtype: torch.dtype,
    weight_dtype: torch.dtype, gamma_dtype: torch.dtype, aligned: bool, merging: bool, has_branch: bool, scaled: bool,
    gpu: Gpu, data: st.DataObject,
) -> None:  # fmt: skip
    branch_dtype = branch_dtype if dtype is torch.float32 else dtype
    merging &= has_branch
    tokens = data.draw(st.integers(1, n)) if merging else n
    x = memory(batch, n, channels, dtype=dtype, aligned=aligned)
    batch = x.shape[0]
    branch = memory(batch, n, channels, dtype=branch_dtype, aligned=aligned) if has_branch else None
    slot, size = (memory(batch, n, dtype=torch.int32), memory(batch, n)) if merging else (None, None)
    weight, gamma = memory(channels, dtype=weight_dtype), memory(channels, dtype=gamma_dtype)
    gamma = gamma if scaled and has_branch else None
    launches = min(batch, 1)
    parameters = (weight, None, 1e-5, gamma, norm_dtype, True)
    assert emulator.planned("merge_add_norm", x, branch, slot, tokens, size, *parameters, gpu=gpu) == launches
    merged, y = memory(batch, tokens, channels, dtype=dtype), memory(batch, tokens, channels, dtype=norm_dtype)
    stats, total = memory(batch, tokens, 2), memory(batch, tokens) if merging else None
    back = (merged, y, merged, stats, slot, size, total, weight, gamma, n, branch_dtype)
    assert emulator.planned("merge_add_norm_backward", *back, gpu=gpu) == launches
    assert emulator.planned("column_sums", y, merged, stats, gpu=gpu) == 2
    for steps in ([slot], []) if merging else ([],):
        grid = memory(batch, tokens if steps else n, channels, dtype=dtype, aligned=aligned)
        waiting = memory(*grid.shape, dtype=branch_dtype) if has_branch else None
        assert emulator.planned("restore", grid, waiting, steps, gamma, gpu=gpu) == launches
    assert emulator.planned("quick_gelu", x, gpu=gpu) == launches
    assert emulator.planned("swiglu", x, x, gpu=gpu) == launches
    assert emulator.planned("swiglu_norm", x, x, max(1, channels - 1), None, None, 1e-5, gpu=gpu) == launches
    if merging:
        assert emulator.planned("follow", [slot], gpu=gpu) == launches


@MANY
@given(
    *(BATCHES, st.integers(1, 24), st.integers(1, 24), TOKENS, st.sampled_from(HEAD_DIMS) | st.just(88)),
    *(DTYPES, DTYPES, *[st.booleans()] * 5, GPU),
)
def test_places(
    batch: int, heads: int, key_heads: int, n: int, d: int, dtype: torch.dtype, table_dtype: torch.dtype,
    aligned: bool, placed: bool, long: bool, is_half: bool, is_back: bool, gpu: Gpu,
) -> None:  # fmt: skip
    q = memory(batch, heads + key_heads, n, d, dtype=dtype, aligned=aligned)
    q, k = q.split((heads, key_heads), dim=1)
    table = memory(n, 2 * d, dtype=table_dtype)
    n, table = min(n, table.shape[0]), table[:n]
    q, k = q[:, :, :n], k[:, :, :n]
    home = memory(q.shape[0], n, dtype=torch.int64 if long else torch.int32) if placed else None
    assert emulator.planned("rotate", q, k, table, home, 0, is_half, is_back, gpu=gpu) == min(batch, 1)
    slot = memory(q.shape[0], n, dtype=torch.int32)
    home = home if long else None
    bias = memory(heads, min(n, 512), min(n, 512), dtype=dtype, aligned=aligned)
    where, size = memory(q.shape[0], min(n, 512), dtype=torch.int64), memory(q.shape[0], min(n, 512))
    assert emulator.planned("pair_bias", bias, where, size if placed else None, gpu=gpu) == min(batch, 1)
    assert emulator.planned("homes", slot, max(1, n - d), home, None, gpu=gpu) == min(batch, 1)


@MANY
@given(
    *(BATCHES, st.integers(1, 40), TOKENS, TOKENS, st.sampled_from(HEAD_DIMS)),
    *(st.sampled_from(HALF_AND_SINGLE[1:]), st.booleans(), st.booleans(), GPU),
)
def test_attention(
    batch: int, heads: int, queries: int, keys: int, d: int, dtype: torch.dtype, aligned: bool, sized: bool, gpu: Gpu
) -> None:
    q = memory(batch, heads, max(queries, keys), d, dtype=dtype, aligned=aligned)
    q, k = q[:, :, :queries], q[:, :, :keys]
    size = memory(q.shape[0], keys) if sized else None
    assert emulator.planned("attention", q, k, k, size, 0.1, gpu=gpu) == min(batch, 1)
    assert emulator.planned("attention_training", q, k, k, size, 0.1, gpu=gpu) == min(batch, 1)
    lse = memory(q.shape[0], heads, queries)
    launches = emulator.planned("attention_backward", q, q, k, k, q, lse, size, 0.1, gpu=gpu)
    assert launches == 0 if batch == 0 else launches in (1, 2)
