"""The places of tokens on a GPU beyond the laws of every backend: determinism, streams, graphs, compilation."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits, assert_writes_nothing_else, compiled
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE
from test_position import Turn, check, turn, turns
from torch import Tensor

import tome_cuda
import tome_reference

pytestmark = NO_EXTENSION

LONG = turn(batch=4, heads=12, key_heads=12, n=197, dim=64, dtype=torch.float16)


@given(turns(st.sampled_from((1, 33, 197, 577, 1029))))
def test_rotate(case: Turn) -> None:
    args = case.build("cuda")
    check(tome_cuda.rotate(*args), case, args)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are older than the streams
@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_same_bits_again_and_on_two_streams(dtype: torch.dtype, is_half: bool) -> None:
    q, k, *others = turn(n=197, dim=64, dtype=dtype, is_half=is_half).build("cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k)]

    def call() -> list[Tensor]:
        out = tome_cuda.rotate(*leaves, *others)
        return [*out, *torch.autograd.grad(out, leaves, [x.detach() for x in out])]

    assert_same_bits(call)
    slot = tome_reference.match(k, 60)
    assert_same_bits(lambda: tome_cuda.homes(slot, 137))


def test_a_graph_replays_on_new_inputs() -> None:
    q, k, table, home, prefix, is_half = LONG.build("cuda")
    q, k = q.contiguous(), k.contiguous()
    inputs = (q, k, table, home)
    others = [torch.randn_like(q), torch.randn_like(k), torch.randn_like(table), home.flip(1).clamp(min=1)]
    assert_replays(lambda: tome_cuda.rotate(q, k, table, home, prefix, is_half), inputs, others)
    slot = tome_reference.match(k, 60)
    other = tome_reference.match(q, 60)
    assert_replays(lambda: tome_cuda.homes(slot, 137, home), (slot,), (other,))


def test_writes_nothing_else() -> None:
    q = torch.randn(2, 4, 32, 64, device="cuda").half()
    table = torch.randn(32, 128, device="cuda")
    assert_writes_nothing_else(lambda: tome_cuda.rotate(q, q[:, :3], table), 2 * 4 * 32 * 128, 2 * 3 * 32 * 128)
    slot = torch.arange(256, device="cuda", dtype=torch.int32).clamp(max=127).expand(2, -1)
    assert_writes_nothing_else(lambda: tome_cuda.homes(slot, 128), 2 * 128 * 8)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch records one of its own first
def test_compiles_without_breaks_or_recompiles() -> None:
    q, k, table, home, *others = LONG.build("cuda")

    def block(q: Tensor, k: Tensor) -> Tensor:
        slot = tome_cuda.match(k, 8)
        q, k = tome_cuda.rotate(q * 2, k, table, home, *others)
        return tome_cuda.attention(q, k, k) + tome_cuda.homes(slot, 189).sum()

    function = compiled(block)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            q, k = torch.randn_like(q), torch.randn_like(k)
            torch.testing.assert_close(function(q, k).clone(), block(q, k))


def test_autocast_leaves_dtypes_alone() -> None:
    args = turn(dtype=torch.bfloat16).build("cuda")
    with torch.autocast("cuda", torch.float16):
        assert {x.dtype for x in tome_cuda.rotate(*args)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, table, home, prefix, is_half = turn(dtype=dtype).build("cuda")
    ops = tome_cuda.operators()
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
    torch.library.opcheck(ops.rotate.default, (*leaves, table, home, prefix, is_half, False))
    torch.library.opcheck(ops.rotate.default, (q, k, table, home.int(), prefix, is_half, True))
    torch.library.opcheck(ops.homes.default, (tome_reference.match(k, 2), 7, home, None))


def test_empty_tensors() -> None:
    table = torch.randn(4, 8, device="cuda")
    for b, h, n in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q = torch.empty(b, h, n, 4, device="cuda", requires_grad=True)
        q_out, k_out = tome_cuda.rotate(q, q, table[:n])
        assert q_out.shape == k_out.shape == q.shape
        (q_out.sum() + k_out.sum()).backward()
    assert tome_cuda.homes(torch.empty(0, 4, device="cuda", dtype=torch.int32), 2).shape == (0, 2)
