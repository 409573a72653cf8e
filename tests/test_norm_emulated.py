"""The source of merge_add_norm's kernels, run on a CPU: agreement, borders, ends of memory, order of threads."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from norm_cases import NormCase, check_outputs, norm_cases

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

CASES = norm_cases((1, 2, 17, 33, 64, 130), (1, 3, 8, 24, 100, 264, 384, 768, 1024, 1280, 1300, 2056), 40_000)
SEEDS = st.integers(0, 2**31 - 1)


@given(CASES, st.sampled_from([8, 19, 32]), SEEDS)
def test_merge_add_norm(case: NormCase, block_outputs: int, seed: int) -> None:
    call = case.build("cpu", at_the_end)
    out, y, total, stats = emulator.merge_add_norm(*call, block_outputs=block_outputs, seed=seed)
    check_outputs(call, out, y)
    if case.merging:
        assert torch.equal(total, tome_reference.merge(call.x, call.slot, case.tokens, call.size)[1])
    else:
        identity = torch.arange(case.n, dtype=torch.int32).expand(case.batch, -1)
        same = emulator.merge_add_norm(*call._replace(slot=identity), block_outputs=block_outputs, seed=seed + 1)
        assert torch.equal(same[0], out)
        assert torch.equal(same[1], y)
    mean, rstd = stats.double().unbind(-1)
    torch.testing.assert_close(mean, out.double().mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd, (out.double().var(-1, correction=0) + call.eps).rsqrt(), rtol=1e-4, atol=1e-5)


@given(CASES, st.booleans(), st.booleans(), SEEDS)
def test_gradients(case: NormCase, has_grad_x: bool, has_grad_y: bool, seed: int) -> None:
    call = case.build("cpu", at_the_end)
    out, y, total, stats = emulator.merge_add_norm(*call)
    generator = torch.Generator().manual_seed(seed)
    grads = [at_the_end(torch.randn(t.shape, generator=generator).to(t.dtype)) for t in (out, y)]
    given_grads = [grad if has else None for grad, has in zip(grads, (has_grad_x, has_grad_y), strict=True)]
    ours = emulator.merge_add_norm_backward(
        *(*given_grads, out, stats, call.slot, call.size, total, call.weight, call.gamma, case.n, case.branch_dtype),
        seed=seed,
    )
    exact = call.double()
    leaves = [exact.x.requires_grad_(), exact.branch.requires_grad_()]
    outs = tome_reference.merge_add_norm(*exact)
    wanted = torch.autograd.grad(
        outs[:2], leaves, [t.double() * has for t, has in zip(grads, (has_grad_x, has_grad_y), strict=True)]
    )
    for grad, truth in zip(ours, wanted, strict=True):
        # xhat has the rounding of x in it, magnified where a row hardly varies.
        scale = float(truth.abs().max()) * max(1.0, float(stats[..., 1].max()))
        assert error(grad, truth) <= 8 * (ROUNDING[grad.dtype] + ROUNDING[out.dtype]) * (scale + 1)

    sums = emulator.column_sums(grads[1], out, stats, seed=seed).double().sum(0)
    xhat = (out.double() - stats[..., :1].double()) * stats[..., 1:].double()
    truths = grads[1].double().sum((0, 1)), (grads[1].double() * xhat).sum((0, 1))
    for found, truth in zip(sums, truths, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    found = emulator.column_sums(call.branch, call.x, None, seed=seed).double().sum(0)[1]
    torch.testing.assert_close(found, (call.branch.double() * call.x.double()).sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_a_bad_map_reads_and_writes_nothing_out_of_range() -> None:
    x, branch = (at_the_end(torch.randn(1, 40, 24)) for _ in range(2))
    slot = torch.full((1, 40), 2**31 - 1, dtype=torch.int32)
    slot[0, ::2] = -(2**31)
    slot[0, 7] = 3
    out, y, total, stats = emulator.merge_add_norm(x, branch, slot, 5, None, None, None, 1e-5)
    torch.testing.assert_close(out[0, 3], (x + branch)[0, 7])
    assert torch.equal(total, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]))
    assert not bool(y.isnan().any())
    grad, _ = emulator.merge_add_norm_backward(*(out, y, out, stats, slot, None, total, None, None, 40, torch.float32))
    assert bool(grad[0, 6].isnan().all())
    assert not bool(grad[0, 7].isnan().any())


def test_the_order_of_threads_changes_no_bit() -> None:
    case = NormCase(
        *(2, 130, 40, 264, True, True, torch.float16, torch.float16, None),
        parameters=(torch.float16, None, torch.float32),
        layouts=("dense", "dense"),
        crowded=False,
        seed=0,
    )
    call = case.build("cpu")
    runs = [emulator.merge_add_norm(*call, seed=seed) for seed in range(5)]
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)
    sums = [emulator.column_sums(call.x, call.branch, None, seed=seed) for seed in range(5)]
    assert all(torch.equal(value, sums[0]) for value in sums)
