"""The mma.sync attention kernels' own source on a CPU: agreement with float64, borders, ends of memory."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator.guard import at_the_end
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS
from torch import Tensor

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
LENGTHS = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 79, 101])
# Which kernel, how many heads share a block, how many blocks share a head.
PATHS = tuple(emulator.Plan(0, *path) for path in ((1, 1), (2, 1), (4, 1), (1, 2), (0, 0, True)))
RESIDENT, STREAMED = emulator.Plan(), emulator.Plan(is_streamed=True)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q [B, H, Nq, D], k and v [B, H, N, D], sizes; each ends where readable memory does."""
    batch, heads, d = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(HEAD_DIMS))
    n = draw(LENGTHS)
    queries = draw(st.one_of(st.just(n), LENGTHS))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k, v = torch.randn(2, batch, n, heads, d, generator=generator).to(dtype).transpose(2, 3)
    q = torch.randn(batch, queries, heads, d, generator=generator).to(dtype).transpose(1, 2)
    if draw(st.booleans()):
        q, k, v = torch.randn(batch, n, 3, heads, d, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    if draw(st.booleans()):
        k = k * torch.linspace(0.1, 4, k.shape[2])[:, None].to(dtype)  # the highest scores come last
    if draw(st.booleans()):  # rows that start anywhere
        k = torch.cat([k, k[..., :1]], dim=-1)[..., :d]
    size = torch.randint(1, 300, (batch, k.shape[2]), generator=generator).float() if draw(st.booleans()) else None
    if size is not None and draw(st.booleans()):
        size[:, 1::2] = 0.0
    return *map(at_the_end, (q, k, v)), None if size is None else at_the_end(size)


def explicit(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """The definition, in float64."""
    score = q.double() @ k.double().transpose(-2, -1) * scale
    if size is not None:
        score = score + size.double().log()[:, None, None, :]
    return (score.softmax(-1) @ v.double()).transpose(1, 2)


@given(inputs(), st.sampled_from(PATHS), st.sampled_from([0.125, 0.7]), st.integers(0, 2**31 - 1))
def test_agrees_with_float64(
    drawn: tuple[Tensor, Tensor, Tensor, Tensor | None], path: emulator.Plan, scale: float, seed: int
) -> None:
    q, k, v, size = drawn
    out = emulator.run("attention", *drawn, scale, seed=seed, plan=path)
    truth = explicit(q, k, v, size, scale)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=TOLERANCE[q.dtype] * float(v.abs().max()))


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_streamed_kernel_fits_every_gpu(d: int) -> None:
    q, k, v = torch.randn(3, 1, 1, 70, d).half()
    out = emulator.run("attention", q, k, v, None, 0.1, gpu=emulator.SMALL, plan=STREAMED)
    torch.testing.assert_close(out.double(), explicit(q, k, v, None, 0.1), rtol=0, atol=3e-3)


def test_the_order_of_threads_changes_no_bit() -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 64).half()
    size = torch.randint(1, 9, (1, 70)).float()
    for plan in (RESIDENT, STREAMED):
        first, *others = (emulator.run("attention", q, k, v, size, 0.1, seed=seed, plan=plan) for seed in range(4))
        assert all(torch.equal(first, other) for other in others)


def test_no_key_that_counts_gives_nan() -> None:
    q, k, v = torch.randn(3, 2, 1, 40, 64).half()
    size = torch.ones(2, 40)
    size[0] = 0.0
    for plan in (RESIDENT, STREAMED):
        out = emulator.run("attention", q, k, v, size, 0.1, plan=plan)
        assert bool(out[0].isnan().all())
        assert bool(out[1].isfinite().all())
