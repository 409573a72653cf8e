"""The source of merging's kernels, run on a CPU: agreement, borders, ends of memory, order of threads."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from torch import Tensor

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

DTYPES = st.sampled_from(list(ROUNDING))
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """x [B, N, C], a map onto [0, M), M, and sizes."""
    batch, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 31, 32, 33, 65, 197, 600]))
    channels = draw(st.sampled_from([1, 3, 7, 8, 16, 24, 96, 256, 264, 520] + ([768, 1032, 1280] if n < 100 else [])))
    tokens = draw(st.sampled_from([1, n, max(1, n // 2), max(1, n - 1)]))
    crowded = draw(st.sampled_from([1, tokens]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    rows = []
    for _ in range(batch):
        rest = torch.randint(crowded, (n - tokens,), generator=generator)
        row = torch.cat([torch.arange(tokens), rest])
        rows.append(row[torch.randperm(n, generator=generator)])
    x = torch.randn(batch, n, channels, generator=generator).to(draw(DTYPES))
    layout = draw(st.sampled_from(["dense", "wide", "transposed"]))
    if layout == "wide":
        x = torch.cat([x, x[:, :, :1]], dim=2)[:, :, :channels]
    elif layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    size = torch.randint(1, 300, (batch, n), generator=generator).float() if draw(st.booleans()) else None
    return (
        at_the_end(x),
        at_the_end(torch.stack(rows).int()),
        tokens,
        None if size is None else at_the_end(size),
    )


@given(groups(), st.sampled_from([8, 32]), SEEDS)
def test_merge(drawn: tuple[Tensor, Tensor, int, Tensor | None], block_outputs: int, seed: int) -> None:
    x, slot, tokens, size = drawn
    out, total = emulator.run("merge", x, slot, tokens, size, seed=seed, plan=emulator.Plan(block_outputs))
    expected, expected_total = tome_reference.merge(x, slot, tokens, size)
    truth, _ = tome_reference.merge(x.double(), slot, tokens, size)
    assert torch.equal(total, expected_total)
    assert error(out, truth) <= error(expected, truth) + ROUNDING[x.dtype] * float(truth.abs().max())
    counts = torch.zeros(total.shape).scatter_add(1, slot.long(), torch.ones(slot.shape))
    alone = counts.gather(1, slot.long()) == 1
    back = out.gather(1, slot.long()[:, :, None].expand_as(x))
    assert torch.equal(back[alone], x[alone])


@pytest.mark.parametrize("n", [1541, 2052, 2100])
def test_merge_of_a_long_image(n: int) -> None:
    """Slots that no block reads in one go, four at a time or one by one."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(1, n, 8, generator=generator)
    tokens = n // 2
    slot = torch.cat([torch.arange(tokens), torch.randint(tokens, (n - tokens,), generator=generator)])
    slot = slot[torch.randperm(n, generator=generator)][None].int()
    size = torch.randint(1, 300, (1, n), generator=generator).float()
    expected, expected_total = tome_reference.merge(x, slot, tokens, size)
    every_other = slot.repeat_interleave(2, dim=1)[:, ::2]
    for slots in (at_the_end(slot), every_other):
        out, total = emulator.run("merge", at_the_end(x), slots, tokens, at_the_end(size), seed=n)
        assert torch.equal(total, expected_total)
        torch.testing.assert_close(out, expected)


@given(groups(), st.sampled_from([8, 32]), SEEDS)
def test_the_other_three(drawn: tuple[Tensor, Tensor, int, Tensor | None], block_outputs: int, seed: int) -> None:
    x, slot, tokens, size = drawn
    _, total = tome_reference.merge(x, slot, tokens, size)
    generator = torch.Generator().manual_seed(seed)
    y = at_the_end(torch.randn(x.shape[0], tokens, x.shape[2], generator=generator).to(x.dtype))
    assert torch.equal(emulator.run("unmerge", y, slot, seed=seed), tome_reference.unmerge(y, slot))

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(tome_reference.merge(leaf, slot, tokens, size)[0], leaf, y)
    torch.testing.assert_close(emulator.run("merge_backward", y, slot, size, total, seed=seed), expected)

    leaf = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(tome_reference.unmerge(leaf, slot), leaf, x)
    ours = emulator.run("unmerge_backward", x, slot, tokens, seed=seed, plan=emulator.Plan(block_outputs))
    index = slot.long()[:, :, None].expand_as(x)
    truth = torch.zeros(y.shape, dtype=torch.float64).scatter_add(1, index, x.double())
    assert error(ours, truth) <= error(expected, truth) + ROUNDING[x.dtype] * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [8, 776, 2120])
@pytest.mark.parametrize("members", [2, 3, 16, 17, 60])
def test_how_rows_lie_changes_no_bit(dtype: torch.dtype, channels: int, members: int) -> None:
    """Rows that move 16 bytes at a time or one by one, in registers or pack by pack: the same sums."""
    x = torch.randn(1, members + 5, channels).to(dtype)
    slot = torch.cat([torch.zeros(1, members), torch.arange(1, 6)[None]], dim=1).int()
    size = torch.randint(1, 9, (1, members + 5)).float()
    for sizes in (None, size):
        merged, _ = emulator.run("merge", x, slot, 6, sizes)
        for other in (x.repeat_interleave(2, dim=2)[..., ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(emulator.run("merge", other, slot, 6, sizes)[0], merged)


def test_a_bad_map_reads_and_writes_nothing_out_of_range() -> None:
    x = at_the_end(torch.randn(1, 40, 24))
    slot = torch.full((1, 40), 2**31 - 1, dtype=torch.int32)
    slot[0, ::2] = -(2**31)
    slot[0, 7] = 3
    out, total = emulator.run("merge", x, slot, 5, None)
    assert torch.equal(out[0, 3], x[0, 7])
    assert torch.equal(total, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]))
    restored = emulator.run("unmerge", at_the_end(torch.randn(1, 5, 24)), slot)
    assert bool(restored[0, 6].isnan().all())
    assert not bool(restored[0, 7].isnan().any())


def test_the_order_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 130, 40, generator=generator)
    slot = tome_reference.match(torch.randn(2, 130, 24, generator=generator), 30, 1)
    merged = [emulator.run("merge", x, slot, 100, None, seed=seed)[0] for seed in range(5)]
    assert all(torch.equal(value, merged[0]) for value in merged)
