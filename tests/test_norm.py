"""Laws of addition, merge and LayerNorm in one."""

import pytest
import torch
import torch.nn.functional as F
from strategies import HALF_AND_SINGLE

import tome_reference
from tome import ops

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
def test_merge_add_norm_is_its_three_steps(device, dtype, merging, gamma):
    x, branch = (torch.randn(2, 33, 24, device=device).to(dtype) for _ in range(2))
    weight, bias, factor = (torch.randn(24, device=device).to(dtype) for _ in range(3))
    size = torch.randint(1, 9, (2, 33), device=device).float()
    slot = ops.match(torch.randn(2, 33, 8, device=device), 7) if merging else None
    tokens = 26 if merging else 33
    out, y, sizes = ops.merge_add_norm(x, branch, slot, tokens, size, weight, bias, 1e-6, factor if gamma else None)
    total = x + (factor * branch if gamma else branch)
    expected, expected_sizes = ops.merge(total, slot, tokens, size) if merging else (total, size)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(y, F.layer_norm(expected, (24,), weight, bias, 1e-6), **tolerance)
    assert torch.equal(sizes, expected_sizes)


def test_merge_add_norm_keeps_a_float32_stream_beside_half_branches(device):
    x, branch = torch.randn(1, 9, 8, device=device), torch.randn(1, 9, 8, device=device).half()
    gamma = torch.randn(8, device=device)
    out, y, size = ops.merge_add_norm(x, branch, None, 9, None, None, None, 1e-5, gamma)
    assert out.dtype == y.dtype == torch.float32
    assert size is None
    torch.testing.assert_close(out, x + gamma * branch.float())


def test_merge_add_norm_takes_float32_parameters_with_half_tokens(device):
    x = torch.randn(1, 9, 8, device=device).half()
    weight, bias = torch.randn(2, 8, device=device)
    _, y, _ = ops.merge_add_norm(x, x, None, 9, None, weight, bias, 1e-5)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), F.layer_norm(2 * x.float(), (8,), weight, bias), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_merge_add_norm_writes_y_in_the_dtype_asked_for(device, dtype):
    x, branch = (torch.randn(2, 9, 16, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.randn(2, 16, device=device).to(dtype)
    for norm_dtype in HALF_AND_SINGLE:
        out, y, _ = ops.merge_add_norm(x, branch, None, 9, None, weight, bias, 1e-5, norm_dtype=norm_dtype)
        assert (out.dtype, y.dtype) == (dtype, norm_dtype)
        expected = F.layer_norm(out.double(), (16,), weight.double(), bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[norm_dtype])


@pytest.mark.parametrize("gamma", [True, False])
def test_an_identity_map_gives_the_bits_of_none(device, gamma):
    x, branch = (torch.randn(2, 33, 24, device=device).half() for _ in range(2))
    weight, bias, factor = torch.randn(3, 24, device=device).half()
    size = torch.randint(1, 9, (2, 33), device=device).float()
    identity = torch.arange(33, dtype=torch.int32, device=device).expand(2, 33)
    calls = [
        ops.merge_add_norm(x, branch, slot, 33, size, weight, bias, 1e-6, factor if gamma else None)
        for slot in (None, identity)
    ]
    assert all(map(torch.equal, *calls))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_merge_add_norm_without_a_branch_is_the_norm(device, dtype):
    x, zeros = torch.randn(2, 9, 24, device=device).to(dtype), torch.zeros(2, 9, 24, device=device, dtype=dtype)
    weight, bias = torch.randn(2, 24, device=device).to(dtype)
    size = torch.randint(1, 9, (2, 9), device=device).float()
    for norm_dtype in (None, torch.float16):
        out, y, sizes = ops.merge_add_norm(x, None, None, 9, size, weight, bias, 1e-5, norm_dtype=norm_dtype)
        assert out is x
        assert sizes is size
        expected = ops.merge_add_norm(x, zeros, None, 9, size, weight, bias, 1e-5, norm_dtype=norm_dtype)[1]
        assert torch.equal(y, expected)


def test_gradients_of_the_norm_alone_are_those_of_torch(device):
    found = []
    for norm in (
        lambda x, weight, bias: ops.merge_add_norm(x, None, None, 7, None, weight, bias, 1e-5)[1],
        lambda x, weight, bias: F.layer_norm(x, (4,), weight, bias, 1e-5),
    ):
        torch.manual_seed(0)
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 7, 4), (4,), (4,))]
        found.append(torch.autograd.grad(norm(*leaves).square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merging", [True, False])
def test_a_branch_of_fewer_tokens_is_added_to_the_last(device, merging):
    x, branch = torch.randn(1, 9, 8, device=device).expand(3, -1, -1), torch.randn(3, 7, 8, device=device)
    slot = ops.match(torch.randn(3, 9, 4, device=device), 2) if merging else None
    arguments = slot, 7 if merging else 9, None, None, None, 1e-5, torch.randn(8, device=device)
    whole = torch.cat((torch.zeros(3, 2, 8, device=device), branch), dim=1)
    found, expected = (ops.merge_add_norm(x, each, *arguments) for each in (branch, whole))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def add_norm_leaves(dtype, device):
    leaves = [torch.randn(1, 7, 4, dtype=torch.float64) for _ in range(2)]
    params = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    return [t.to(device, dtype).requires_grad_() for t in (*leaves, *params)]


@pytest.mark.parametrize("merging", [True, False])
def test_merge_add_norm_gradients_agree_with_finite_differences(merging):
    """Finite differences need float64, which the reference alone has: the others are held to its gradients."""
    slot = ops.match(torch.randn(1, 7, 4), 2) if merging else None
    size = torch.randint(1, 9, (1, 7)).float()

    def call(x, branch, weight, bias, gamma):
        tokens = 5 if merging else 7
        return tome_reference.merge_add_norm(x, branch, slot, tokens, size, weight, bias, 1e-5, gamma)[:2]

    assert torch.autograd.gradcheck(call, tuple(add_norm_leaves(torch.float64, "cpu")))


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_merge_add_norm_gradients_are_those_of_the_reference_in_float64(device, merging, outputs, skip):
    leaves = add_norm_leaves(torch.float32, device)
    leaves[1] = leaves[1].detach()[:, skip:]
    slot = ops.match(torch.randn(1, 7, 4, device=device), 2) if merging else None
    size = torch.randint(1, 9, (1, 7), device=device).float()
    found = []
    for module, dtype in ((ops, torch.float32), (tome_reference, torch.float64)):
        copies = [t.detach().to(dtype).requires_grad_() for t in leaves]
        x, branch, weight, bias, gamma = copies
        outs = module.merge_add_norm(x, branch, slot, 5 if merging else 7, size, weight, bias, 1e-3, gamma)
        sum(outs[i].square().sum() for i in outputs).backward()
        found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in copies])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
