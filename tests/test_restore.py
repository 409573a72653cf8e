"""Laws of the way back: slot maps that follow each other, and the full grid restored along them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Map, maps, strided

import tome_reference
from tome import ops


@st.composite
def chains(draw: st.DrawFn):
    """Some consecutive merges of one batch, and tokens behind the last."""
    case = draw(maps())
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [case.n]
    for _ in range(draw(st.integers(1, 5))):
        lengths.append(draw(st.integers(1, lengths[-1])))
    steps = [
        Map(case.batch, before, after, 1, torch.float32, "contiguous", False, case.seed + i).build("cpu")[1]
        for i, (before, after) in enumerate(pairwise(lengths))
    ]
    x, branch = (
        strided(torch.randn(case.batch, lengths[-1], case.channels, generator=generator).to(case.dtype), case.layout)
        for _ in range(2)
    )
    gamma = torch.randn(case.channels, generator=generator).to(case.dtype) if case.sized else None
    return steps, x, branch, gamma


def on(device, *values):
    return [None if value is None else value.to(device) for value in values]


@given(chain=chains())
def test_follow_is_the_composition_of_its_steps(device, chain):
    steps = on(device, *chain[0])
    slot = ops.follow(steps)
    assert (slot.dtype, slot.shape) == (torch.int32, steps[0].shape)
    for b in range(slot.shape[0]):
        for token in range(slot.shape[1]):
            place = token
            for step in chain[0]:
                place = int(step[b, place])
            assert int(slot[b, token]) == place
    head = len(steps) // 2
    if head > 0:
        assert torch.equal(ops.follow([ops.follow(steps[:head]), *steps[head:]]), slot)


def added(x, branch, gamma):
    """X + gamma * branch, rounded as the backend rounds it: a kernel may fuse the product with the addition."""
    return ops.merge_add_norm(x, branch, None, x.shape[1], None, None, None, 1e-5, gamma)[0]


@given(chain=chains())
def test_restore_adds_what_waits_and_undoes_each_merge(device, chain):
    steps, (x, branch, gamma) = on(device, *chain[0]), on(device, *chain[1:])
    total = added(x, branch, gamma)
    with torch.no_grad():
        restored = ops.restore(x, branch, steps, gamma)
        plain = ops.restore(x, None, steps)
    assert torch.equal(restored, ops.unmerge(total, ops.follow(steps)))
    assert torch.equal(plain, ops.unmerge(x, ops.follow(steps)))
    for step in reversed(steps):
        x = ops.unmerge(x, step)
    assert torch.equal(plain, x)


def test_restore_without_steps_adds(device):
    x, branch = torch.randn(2, 2, 5, 4, device=device)
    gamma = torch.randn(4, device=device)
    torch.testing.assert_close(ops.restore(x, branch, (), gamma), x + gamma * branch)
    assert ops.restore(x, None, ()) is x


def test_restore_rounds_as_the_addition_of_merge_add_norm(device):
    """A float32 stream beside a half branch: the product with LayerScale is not rounded to the branch's dtype."""
    x, gamma = torch.randn(2, 9, 8, device=device), torch.randn(8, device=device)
    branch = torch.randn(2, 9, 8, device=device).half()
    steps = [ops.match(x, 3)]
    tokens = ops.unmerge(x[:, :6], steps[0])
    with torch.no_grad():
        added, _, _ = ops.merge_add_norm(x[:, :6], branch[:, :6], None, 6, None, None, None, 1e-5, gamma)
        assert torch.equal(ops.restore(x[:, :6], branch[:, :6], steps, gamma), ops.unmerge(added, steps[0]))
    assert tokens.dtype == added.dtype == torch.float32


@pytest.mark.parametrize("with_gamma", [True, False])
def test_gradients_of_restore_agree_with_finite_differences(with_gamma):
    slots = [torch.tensor([[0, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1]])]
    steps = [slot.int() for slot in slots]
    x, branch = (torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_gamma else None

    def call(x, branch, *gamma):
        return tome_reference.restore(x, branch, steps, *gamma)

    leaves = (x, branch) if gamma is None else (x, branch, gamma)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradients_of_restore_are_those_of_its_parts(device):
    steps = [torch.tensor([[0, 1, 1, 2, 0]], dtype=torch.int32, device=device)]
    found = []
    for restored in (
        lambda x, branch, gamma: ops.restore(x, branch, steps, gamma),
        lambda x, branch, gamma: ops.unmerge(x + gamma * branch, steps[0]),
    ):
        torch.manual_seed(0)
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((1, 3, 4), (1, 3, 4), (4,))]
        found.append(torch.autograd.grad(restored(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *found))
