"""Laws of merging and unmerging: what every backend must do with any map."""

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FINITE, Map, cases, maps

import tome_reference
from tome import ops


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@given(case=maps())
def test_merge_equals_the_brute_force(device, case):
    x, slot, size = case.build(device)
    merged, total = ops.merge(x, slot, case.tokens, size)
    assert merged.dtype == x.dtype
    assert merged.shape == (case.batch, case.tokens, case.channels)
    assert total.dtype == torch.float32
    ones = torch.ones(slot.shape) if size is None else size.cpu()
    for b in range(case.batch):
        image = x[b].cpu().double().numpy()
        expected, counts = brute_force.merge(image, slot[b].tolist(), case.tokens, ones[b].double().numpy())
        np.testing.assert_array_equal(total[b].cpu().numpy(), counts)
        bound = np.abs(image).max() * (unit_roundoff(x.dtype) + case.n * unit_roundoff(torch.float32))
        np.testing.assert_allclose(merged[b].cpu().double().numpy(), expected, rtol=0, atol=2 * bound)


@given(case=maps(dtypes=(torch.float32,)))
def test_sizes_and_the_weighted_mean_are_conserved(device, case):
    x, slot, size = case.build(device)
    merged, total = ops.merge(x, slot, case.tokens, size)
    size = torch.ones(slot.shape, device=device) if size is None else size
    torch.testing.assert_close(total.sum(1), size.sum(1), rtol=0, atol=0)
    before = (x.double() * size[:, :, None]).sum(1) / size.sum(1)[:, None]
    after = (merged.double() * total[:, :, None]).sum(1) / total.sum(1)[:, None]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=5e-6)


@given(case=cases(features=FINITE))
def test_tokens_that_merge_with_none_keep_their_bits(device, case):
    keys = case.keys(device)
    slot = ops.match(keys, case.r, case.prefix)
    x = torch.randn(case.batch, case.n, 24, device=device).to(case.dtype)
    size = torch.randint(1, 50, (case.batch, case.n), device=device).float()
    merged, total = ops.merge(x, slot, case.tokens, size)
    assert torch.equal(merged[:, : case.prefix], x[:, : case.prefix])
    assert torch.equal(total[:, : case.prefix], size[:, : case.prefix])
    back = ops.unmerge(merged, slot)
    alone = torch.nn.functional.one_hot(slot.long(), case.tokens).sum(1).gather(1, slot.long()) == 1
    assert torch.equal(back[alone], x[alone])


@given(case=maps())
def test_unmerge_after_merge_is_idempotent(device, case):
    x, slot, size = case.build(device)
    merged, _ = ops.merge(x, slot, case.tokens, size)
    restored = ops.unmerge(merged, slot)
    assert restored.shape == x.shape
    again, _ = ops.merge(restored, slot, case.tokens, size)
    tolerance = 4 * case.n * unit_roundoff(torch.float32) + 2 * unit_roundoff(x.dtype)
    torch.testing.assert_close(again.float(), merged.float(), rtol=tolerance, atol=tolerance)


@given(case=maps())
def test_unmerge_is_a_gather(device, case):
    x, slot, _ = case.build(device)
    tokens = x[:, : case.tokens]
    restored = ops.unmerge(tokens, slot)
    for b in range(case.batch):
        assert torch.equal(restored[b], tokens[b][slot[b].long()])


@given(case=maps(), data=st.data())
def test_batch_permutation_layout_and_repetition_change_no_bit(device, case, data):
    x, slot, size = case.build(device)
    order = data.draw(st.permutations(range(case.batch)))
    merged, total = ops.merge(x, slot, case.tokens, size)
    shuffled = ops.merge(x[order], slot[order], case.tokens, None if size is None else size[order])
    assert torch.equal(shuffled[0], merged[order])
    assert torch.equal(shuffled[1], total[order])
    assert torch.equal(ops.merge(x.contiguous(), slot, case.tokens, size)[0], merged)


@given(case=maps())
def test_a_permutation_of_all_tokens_only_moves_them(device, case):
    x, _, size = case.build(device)
    slot = torch.rand(case.batch, case.n).argsort(dim=1).to(torch.int32).to(device)
    merged, total = ops.merge(x, slot, case.n, size)
    assert torch.equal(ops.unmerge(merged, slot), x)
    assert torch.equal(total.gather(1, slot.long()), torch.ones_like(total) if size is None else size)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_group(device, bad):
    x = torch.ones(1, 5, 3, device=device)
    x[0, 1] = bad
    slot = torch.tensor([[0, 1, 1, 2, 3]], dtype=torch.int32, device=device)
    merged, _ = ops.merge(x, slot, 4)
    assert not merged[0, 1].isfinite().any()
    assert merged[0, [0, 2, 3]].eq(1).all()


def test_half_sums_are_taken_in_float32(device):
    # In bfloat16 a running sum of ones stops at 256, and sizes would too.
    x = torch.ones(1, 1000, 1, dtype=torch.bfloat16, device=device)
    slot = torch.zeros(1, 1000, dtype=torch.int32, device=device)
    merged, total = ops.merge(x, slot, 1)
    assert merged.item() == 1.0
    assert total.item() == 1000.0
    large = torch.full((1, 4, 1), 60000.0, dtype=torch.float16, device=device)
    assert ops.merge(large, slot[:, :4], 1)[0].item() == large[0, 0, 0].item()


@given(case=maps(dtypes=(torch.float64,)))
def test_gradients_agree_with_finite_differences(case):
    """Finite differences need float64, which the reference alone has: the others are held to its gradients."""
    if case.batch == 0 or case.n > 20 or case.channels > 8:
        case = Map(1, min(case.n, 9), min(case.tokens, case.n, 9), 2, case.dtype, case.layout, case.sized, case.seed)
    x, slot, size = case.build("cpu")
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tome_reference.merge(x, slot, case.tokens, size)[0], x)
    y = x.detach()[:, : case.tokens].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tome_reference.unmerge(y, slot), y)
    assert torch.autograd.gradgradcheck(lambda y: tome_reference.unmerge(y, slot), y)


@given(case=maps())
def test_gradients_are_those_of_the_reference_in_float64(device, case):
    x, slot, size = case.build(device)
    y = x[:, : case.tokens]
    for module, dtype in ((ops, x.dtype), (tome_reference, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y)]
        merged, _ = module.merge(leaves[0], slot, case.tokens, size)
        restored = module.unmerge(leaves[1], slot)
        # x stands in for any gradient of its shape: both operations are linear.
        found = (
            *torch.autograd.grad(merged, leaves[0], y.to(dtype)),
            *torch.autograd.grad(restored, leaves[1], x.to(dtype)),
        )
        if module is ops:
            ours = found
    for ours_grad, exact, terms in zip(ours, found, (1, case.n), strict=True):
        bound = unit_roundoff(x.dtype) + (terms + 4) * unit_roundoff(torch.float32)
        largest = float(x.abs().max()) * terms if x.numel() else 0.0
        torch.testing.assert_close(ours_grad.double(), exact, rtol=0, atol=2 * bound * largest)


def test_sizes_are_counts_without_gradient(device):
    x = torch.randn(1, 4, 2, device=device, requires_grad=True)
    size = torch.ones(1, 4, device=device, requires_grad=True)
    slot = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32, device=device)
    merged, total = ops.merge(x, slot, 2, size)
    assert merged.requires_grad
    assert not total.requires_grad


def test_gradients_are_the_same_bits_every_time(device):
    case = Map(4, 197, 20, 64, torch.float32, "contiguous", True, 7)
    x, slot, size = case.build(device)

    def gradients() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        merged, _ = ops.merge(leaf, slot, case.tokens, size)
        ops.unmerge(merged, slot).square().sum().backward()
        return [leaf.grad, merged.detach()]

    first = gradients()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))
