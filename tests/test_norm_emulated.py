"""The source of merge_add_norm's kernels, run on a CPU: agreement, borders, ends of memory, order of threads."""

from __future__ import annotations

from typing import Any

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from norm_cases import Call, NormCase, check_outputs, norm_cases
from torch import Tensor

import tome_reference

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

CASES = norm_cases((1, 2, 17, 33, 64, 130), (1, 3, 8, 24, 100, 264, 384, 768, 1024, 1280, 1300, 2056), 40_000)
SEEDS = st.integers(0, 2**31 - 1)


def merge_add_norm(call: Call, **how: Any) -> tuple[Tensor, ...]:
    """The merged x, y, the sizes and the statistics (mean, 1 / standard deviation) of every row."""
    return emulator.run("merge_add_norm", *call[:-1], call.norm_dtype or call.x.dtype, True, **how)


@given(CASES, st.sampled_from([8, 19, 32]), SEEDS)
def test_merge_add_norm(case: NormCase, block_outputs: int, seed: int) -> None:
    call = case.build("cpu", at_the_end)
    plan = emulator.Plan(block_outputs)
    out, y, total, stats = merge_add_norm(call, seed=seed, plan=plan)
    check_outputs(call, out, y)
    if case.merging:
        assert torch.equal(total, tome_reference.merge(call.x, call.slot, case.tokens, call.size)[1])
    else:
        identity = torch.arange(case.n, dtype=torch.int32).expand(case.batch, -1)
        same = merge_add_norm(call._replace(slot=identity), seed=seed + 1, plan=plan)
        assert torch.equal(same[0], out)
        assert torch.equal(same[1], y)
    mean, rstd = stats.double().unbind(-1)
    torch.testing.assert_close(mean, out.double().mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd, (out.double().var(-1, correction=0) + call.eps).rsqrt(), rtol=1e-4, atol=1e-5)


@given(CASES, st.booleans(), st.booleans(), SEEDS)
def test_gradients(case: NormCase, has_grad_x: bool, has_grad_y: bool, seed: int) -> None:
    call = case.build("cpu", at_the_end)
    out, y, total, stats = merge_add_norm(call)
    generator = torch.Generator().manual_seed(seed)
    grads = [at_the_end(torch.randn(t.shape, generator=generator).to(t.dtype)) for t in (out, y)]
    given_grads = [grad if has else None for grad, has in zip(grads, (has_grad_x, has_grad_y), strict=True)]
    table = (call.slot, call.size, total) if case.merging else (None, None, None)
    ours = emulator.run(
        "merge_add_norm_backward",
        *(*given_grads, out, stats, *table, call.weight, call.gamma, case.n, case.branch_dtype),
        seed=seed,
    )
    if ours[1].numel() == 0:  # the same as the first
        ours = (ours[0], ours[0])
    ours = (ours[0], ours[1][:, case.skip :])
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

    sums = emulator.run("column_sums", grads[1], out, stats, seed=seed).double()
    xhat = (out.double() - stats[..., :1].double()) * stats[..., 1:].double()
    truths = grads[1].double().sum((0, 1)), (grads[1].double() * xhat).sum((0, 1))
    for found, truth in zip(sums, truths, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    x = call.x[:, case.skip :]
    found = emulator.run("column_sums", call.branch, x, None, seed=seed)[1].double()
    torch.testing.assert_close(found, (call.branch.double() * x.double()).sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_a_bad_map_reads_and_writes_nothing_out_of_range() -> None:
    x, branch = (at_the_end(torch.randn(1, 40, 24)) for _ in range(2))
    slot = torch.full((1, 40), 2**31 - 1, dtype=torch.int32)
    slot[0, ::2] = -(2**31)
    slot[0, 7] = 3
    call = Call(x, branch, slot, 5, None, None, None, 1e-5, None, None)
    out, y, total, stats = merge_add_norm(call)
    torch.testing.assert_close(out[0, 3], (x + branch)[0, 7])
    assert torch.equal(total, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]))
    assert not bool(y.isnan().any())
    arguments = (out, y, out, stats, slot, None, total, None, None, 40, torch.float32)
    grad, _ = emulator.run("merge_add_norm_backward", *arguments)
    assert bool(grad[0, 6].isnan().all())
    assert not bool(grad[0, 7].isnan().any())


def test_the_order_of_threads_changes_no_bit() -> None:
    case = NormCase(
        *(2, 130, 40, 264, True, True, torch.float16, torch.float16, None),
        parameters=(torch.float16, None, torch.float32),
        layouts=("dense", "dense"),
        crowded=False,
        skip=0,
        seed=0,
    )
    call = case.build("cpu")
    runs = [merge_add_norm(call, seed=seed) for seed in range(5)]
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)
    sums = [emulator.run("column_sums", call.x, call.branch, None, seed=seed) for seed in range(5)]
    assert all(torch.equal(value, sums[0]) for value in sums)
