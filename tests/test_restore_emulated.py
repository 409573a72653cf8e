"""The source of follow's and restore's kernels, run on a CPU: agreement, borders, ends of memory, bad maps."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import NormCase, norm_cases
from torch import Tensor

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=6)


def chain(batch: int, lengths: list[int], tokens: int, seed: int, strided: bool) -> list[Tensor]:
    """Slot maps from ``lengths[0]`` tokens to ``lengths[1]`` and so on, the last to ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for length, following in zip(lengths, [*lengths, tokens][1:], strict=True):
        slot = torch.randint(following, (batch, length), generator=generator, dtype=torch.int32)
        steps.append(at_the_end(slot.t().contiguous().t() if strided else slot))
    return steps


def followed(steps: list[Tensor]) -> Tensor:
    slot = steps[0]
    for step in steps[1:]:
        slot = step.gather(1, slot.long())
    return slot


@given(st.integers(1, 9), LENGTHS, st.integers(1, 40), st.booleans(), SEEDS)
def test_follow(batch: int, lengths: list[int], tokens: int, strided: bool, seed: int) -> None:
    steps = chain(batch, lengths, tokens, seed, strided)
    assert torch.equal(emulator.run("follow", steps, seed=seed), followed(steps))


@given(
    norm_cases((1, 2, 17, 33), (1, 3, 8, 24, 100, 264, 768, 1032), 20_000, partial=False),
    LENGTHS | st.just([]),
    *(st.booleans(), st.sampled_from([8, 32]), SEEDS),
)
def test_restore(case: NormCase, lengths: list[int], has_branch: bool, block_rows: int, seed: int) -> None:
    x, branch, gamma = (getattr(case.build("cpu", at_the_end), name) for name in ("x", "branch", "gamma"))
    steps = chain(case.batch, lengths, case.n, seed, strided=bool(seed % 2))
    if has_branch:  # the sum has the bits of merge_add_norm's
        rest = (None, case.n, None, None, None, 1e-5, gamma, case.dtype, False)
        added = emulator.run("merge_add_norm", x, branch, *rest)[0]
    else:
        added, branch, gamma = x, None, None
    ours = emulator.run("restore", x, branch, steps, gamma, seed=seed, plan=emulator.Plan(block_rows))
    index = followed(steps).long()[..., None].expand(-1, -1, case.channels) if steps else None
    assert torch.equal(ours, added if index is None else added.gather(1, index))


def test_a_bad_map_reads_nothing_out_of_range() -> None:
    x, branch = (at_the_end(torch.randn(1, 5, 24)) for _ in range(2))
    first = torch.full((1, 40), 2**31 - 1, dtype=torch.int32)
    first[0, ::2] = -(2**31)
    first[0, 7], first[0, 9] = 2, 3
    second = torch.tensor([[0, 1, 4, 5]], dtype=torch.int32)  # 5 is one too many
    steps = [at_the_end(first), at_the_end(second)]
    assert emulator.run("follow", steps).tolist() == [[-1] * 7 + [4, -1, 5] + [-1] * 30]
    out = emulator.run("restore", x, branch, steps, None)
    assert torch.equal(out[0, 7], (x + branch)[0, 4])
    assert bool(out[0, torch.arange(40) != 7].isnan().all())


@given(norm_cases((1, 2, 17, 33), (1, 3, 8, 24, 100, 264, 768, 1300, 2056), 20_000, partial=False), SEEDS)
def test_a_norm_without_a_branch(case: NormCase, seed: int) -> None:
    """The bits of the norm behind an addition of zeros."""
    call = case.build("cpu", at_the_end)
    norm_dtype = call.norm_dtype or case.dtype
    parameters = (None, case.n, None, call.weight, call.bias, call.eps, None, norm_dtype, True)
    out, y, _, stats = emulator.run("merge_add_norm", call.x, None, *parameters, seed=seed)
    theirs = emulator.run("merge_add_norm", call.x, torch.zeros_like(call.x), *parameters, seed=seed)
    assert out.numel() == 0
    assert torch.equal(y, theirs[1])
    assert torch.equal(stats, theirs[3])
