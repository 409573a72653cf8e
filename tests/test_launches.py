"""Every launch that matching plans is one that CUDA accepts: grid, threads and shared memory, static included."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Shared memory in bytes: what a block may ask for, and what a multiprocessor has.
GPUS = {
    "8.0": (163 << 10, 164 << 10),
    "8.6 and 8.9": (99 << 10, 100 << 10),
    "9.0 and 10.0": (227 << 10, 228 << 10),
    "12.0": (99 << 10, 100 << 10),
}
LENGTHS = [*range(66), *range(66, 2100, 7), 577, 4096, 8191, 16384, 20000]


@pytest.mark.parametrize("gpu", GPUS)
def test_no_length_and_width_is_refused(gpu: str) -> None:
    for n in LENGTHS:
        for d in (1, *range(8, 257, 8), 255):
            emulator.plan((1, 1, n, d), 0, torch.float32, False, GPUS[gpu])


def test_a_block_just_below_what_needs_no_asking() -> None:
    """Dynamic shared memory below 48 KiB that exceeds it with the kernel's own."""
    for n in range(560, 600):
        assert emulator.plan((1, 1, n, 1), 0, torch.float32, False, GPUS["9.0 and 10.0"]) == 1


def test_shared_memory_that_was_refused_is_asked_for_again() -> None:
    assert emulator.second_grant(96 << 10, 64 << 10) == 1


@settings(deadline=None, max_examples=2000)
@given(
    batch=st.integers(0, 64),
    heads=st.integers(1, 24),
    n=st.one_of(st.integers(0, 20000), st.integers(0, 700)),
    d=st.integers(1, 256),
    prefix=st.integers(0, 5),
    dtype=st.sampled_from(list(emulator.DTYPES)),
    aligned=st.booleans(),
    gpu=st.sampled_from(list(GPUS.values())),
)
def test_no_drawn_shape_is_refused(
    batch: int, heads: int, n: int, d: int, prefix: int, dtype: torch.dtype, aligned: bool, gpu: tuple[int, int]
) -> None:
    launches = emulator.plan((batch, heads, n, d), min(prefix, n), dtype, aligned, gpu)
    assert (launches == 0) == (batch == 0 or n - min(prefix, n) < 2)
