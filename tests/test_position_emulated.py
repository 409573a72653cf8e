"""The source of rotate's and homes' kernels, run on a CPU: ends of memory, widths of access, bad places, one launch."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from test_position import Turn, check, turns

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SEEDS = st.integers(0, 2**31 - 1)


@given(turns(st.sampled_from((1, 2, 9, 17))), SEEDS)
def test_rotate(case: Turn, seed: int) -> None:
    """Nothing is read behind the end of a tensor, and back is the transpose of there, whatever the table."""
    q, k, table, home, prefix, is_half = case.build("cpu")
    q, k, table = at_the_end(q), at_the_end(k), at_the_end(table)
    home = None if home is None else at_the_end(home)
    found = emulator.run("rotate", q, k, table, home, prefix, is_half, False, seed=seed)
    check([x.transpose(1, 2) for x in found], case, (q, k, table, home, prefix, is_half))
    if case.dtype is torch.float32:
        back = emulator.run("rotate", *(x.transpose(1, 2) for x in found), table, home, prefix, is_half, True)
        for x, there, and_back in zip((q, k), found, back, strict=True):
            torch.testing.assert_close((there * there).sum(), (x.transpose(1, 2) * and_back).sum())


def test_a_bad_place_reads_nothing_out_of_range() -> None:
    q, table = torch.randn(1, 3, 6, 16), at_the_end(torch.randn(4, 32))
    home = torch.tensor([[9, 0, 1, 4, 5, -(2**62)]])  # prefix 1: places 1 to 4
    q_out, k_out = emulator.run("rotate", q, q, table, at_the_end(home), 1, True, False)
    for out in (q_out, k_out):
        assert out.isnan().all(3).all(2)[0].tolist() == [False, True, False, False, True, True]
        assert int(out.isnan().sum()) == 3 * 3 * 16
        assert torch.equal(out[:, 0], q[:, :, 0])


@given(st.integers(1, 3), st.sampled_from((1, 40, 300, 5000)), st.integers(1, 5000), *[st.booleans()] * 2, SEEDS)
def test_homes(batch: int, n: int, tokens: int, placed: bool, padded: bool, seed: int) -> None:
    """Slots out of range are nobody's, and a token that nobody went into stands in the last place."""
    tokens, generator = min(tokens, n), torch.Generator().manual_seed(seed)
    slot = at_the_end(torch.randint(-1, tokens + 1, (batch, n), generator=generator, dtype=torch.int32))
    home = at_the_end(torch.randint(10**12, (batch, n), generator=generator)) if placed else None
    valid = at_the_end(torch.rand(batch, n, generator=generator) < 0.6) if padded else None
    expected = torch.full((batch, tokens + 2), n - 1)
    for b in range(batch):
        order = range(n) if valid is None else [*valid[b].nonzero()[:, 0], *(~valid[b]).nonzero()[:, 0]]
        for i in reversed(order):
            expected[b, slot[b, i]] = i
    expected = expected[:, :tokens] if home is None else home.gather(1, expected[:, :tokens])
    emulator.begin(seed)
    assert torch.equal(torch.ops.tome_emulated.homes(slot, tokens, home, valid), expected)
    assert emulator.end() == 1
