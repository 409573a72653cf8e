"""merge_add_norm on a GPU beyond the laws of every backend: agreement on long and wide inputs, gradients, determinism,
streams, graphs, compilation, registration.
"""

from __future__ import annotations

import pytest
import torch
from backends import NO_EXTENSION
from gpu import assert_replays, assert_same_bits, compiled
from hypothesis import given
from judge import error
from norm_cases import DTYPES, NormCase, check_outputs, norm_cases
from torch import Tensor

import tome_cuda
import tome_reference

pytestmark = NO_EXTENSION

CASES = norm_cases(
    (1, 2, 3, 17, 64, 197, 577, 1000),
    (1, 3, 8, 24, 64, 100, 384, 768, 1024, 1152, 1280, 1664, 2048, 4096),
    1_000_000,
)


@given(CASES)
def test_agrees_with_the_reference(case: NormCase) -> None:
    call = case.build("cuda")
    out, y, size = tome_cuda.merge_add_norm(*call)
    check_outputs(call, out, y)
    if case.merging:
        assert torch.equal(size, tome_reference.merge(call.x, call.slot, case.tokens, call.size)[1])
    else:
        assert size is call.size
        identity = torch.arange(case.n, dtype=torch.int32, device="cuda").expand(case.batch, -1)
        same = tome_cuda.merge_add_norm(*call._replace(slot=identity))
        assert torch.equal(same[0], out)
        assert torch.equal(same[1], y)


def gradients(module: object, call: tuple, grads: list[Tensor]) -> list[Tensor | None]:
    leaves = [v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call]
    leaves[4] = call[4]
    outs = module.merge_add_norm(*leaves)[:2]
    wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
    return list(torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]))


@given(CASES)
def test_gradients_are_as_close_to_float64_as_the_reference_s(case: NormCase) -> None:
    call = case.build("cuda")
    out, y, _ = tome_cuda.merge_add_norm(*call)
    generator = torch.Generator("cuda").manual_seed(case.seed)
    grads = [torch.randn(t.shape, device="cuda", generator=generator).to(t.dtype) for t in (out, y)]
    ours, theirs = (gradients(module, call, grads) for module in (tome_cuda, tome_reference))
    truth = gradients(tome_reference, call.double(), grads)
    coarse = max(torch.finfo(d).eps for d in (case.dtype, y.dtype, case.branch_dtype))
    for found, other, exact in zip(ours, theirs, truth, strict=True):
        assert found.dtype == other.dtype
        assert found.shape == other.shape
        floor = coarse * float(exact.abs().max()) if exact.numel() else 0.0
        assert error(found, exact) <= 2 * error(other, exact) + 8 * floor


@pytest.mark.parametrize("only", [0, 1])
def test_one_of_the_two_gradients_may_be_missing(only: int) -> None:
    call = case_of((2, 33, 64), 7, torch.float32).build("cuda")
    found = []
    for module in (tome_cuda, tome_reference):
        x, weight = call.x.clone().requires_grad_(), call.weight.clone().requires_grad_()
        module.merge_add_norm(*call._replace(x=x, weight=weight))[only].square().sum().backward()
        found.append((x.grad, torch.zeros_like(weight) if weight.grad is None else weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def case_of(shape: tuple[int, int, int], r: int, dtype: torch.dtype, branch: torch.dtype | None = None) -> NormCase:
    return NormCase(
        *(shape[0], shape[1], shape[1] - r, shape[2], r > 0, True, dtype, branch or dtype, branch),
        parameters=(dtype, dtype, dtype),
        layouts=("dense", "dense"),
        crowded=False,
        skip=0,
        seed=r,
    )


SHAPES = pytest.mark.parametrize(
    "case",
    [
        case_of((4, 197, 768), 16, torch.float16),
        case_of((2, 577, 1024), 0, torch.bfloat16),
        case_of((2, 1369, 1280), 40, torch.float32, torch.float16),
    ],
    ids=["half", "no map", "autocast"],
)


@SHAPES
def test_the_same_bits_again_and_on_two_streams(case: NormCase) -> None:
    call = case.build("cuda")
    grads = [torch.randn_like(call.x[:, : case.tokens]) for _ in range(2)]
    assert_same_bits(lambda: tome_cuda.merge_add_norm(*call))
    assert_same_bits(lambda: gradients(tome_cuda, call, grads))


@SHAPES
def test_a_graph_replays_on_new_inputs(case: NormCase) -> None:
    call = case.build("cuda")
    inputs = (call.x, call.branch, call.weight)
    assert_replays(lambda: tome_cuda.merge_add_norm(*call), inputs, [torch.randn_like(value) for value in inputs])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch records one of its own first
@pytest.mark.parametrize("merging", [True, False])
def test_compiles_without_breaks_or_recompiles(merging: bool) -> None:
    call = case_of((4, 197, 768), 16 if merging else 0, torch.float32, torch.float16).build("cuda")

    def block(x: Tensor, weight: Tensor) -> Tensor:
        out, y, _ = tome_cuda.merge_add_norm(*call._replace(x=x * 2, weight=weight))
        return out + y.relu()

    function = compiled(block)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            x, weight = torch.randn_like(call.x).requires_grad_(), torch.randn_like(call.weight).requires_grad_()
            torch.testing.assert_close(function(x, weight).clone(), block(x, weight))
            function(x, weight).sum().backward()
            assert x.grad is not None
            assert weight.grad is not None


def test_autocast_leaves_dtypes_alone() -> None:
    call = case_of((2, 33, 64), 5, torch.float32, torch.float16).build("cuda")
    with torch.autocast("cuda", torch.float16):
        out, y, size = tome_cuda.merge_add_norm(*call)
    assert (out.dtype, y.dtype, size.dtype) == (torch.float32, torch.float16, torch.float32)


def test_no_second_derivative_is_told() -> None:
    call = case_of((1, 9, 8), 2, torch.float32).build("cuda")
    x = call.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tome_cuda.merge_add_norm(*call._replace(x=x))[1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative on the kernels"):
        grad.sum().backward()


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, merging: bool) -> None:
    call = case_of((2, 9, 24), 3 if merging else 0, dtype).build("cuda")
    ops = tome_cuda.operators()
    x, branch, weight, bias, gamma = (
        v.clone().requires_grad_() for v in (call.x, call.branch, call.weight, call.bias, call.gamma)
    )
    out, y, total, stats = ops.merge_add_norm(*call[:-1], dtype, True)
    total = total if merging else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (x, branch, call.slot, call.tokens, call.size, weight, bias, call.eps, gamma, dtype, True)
    torch.library.opcheck(ops.merge_add_norm.default, arguments, test_utils=checks)
    slot, size = (call.slot, call.size) if merging else (None, None)
    back = (out, y, out, stats, slot, size, total, call.weight, call.gamma, 9, dtype)
    torch.library.opcheck(ops.merge_add_norm_backward.default, back)
    torch.library.opcheck(ops.column_sums.default, (y, out, stats))


def test_empty_tensors() -> None:
    for b, n, c, m in ((0, 4, 3, 2), (2, 0, 3, 0), (2, 4, 0, 3)):
        x = torch.empty(b, n, c, device="cuda", requires_grad=True)
        slot = (torch.arange(n, device="cuda").int() % max(1, m)).expand(b, n)
        for arguments in ((slot, m), (None, n)):
            out, y, size = tome_cuda.merge_add_norm(x, x, *arguments, None, None, None, 1e-5)
            assert out.shape == y.shape == (b, arguments[1], c)
            (out.sum() + y.sum()).backward()
            if arguments[0] is not None:
                assert torch.equal(size, tome_reference.merge(x, slot, m)[1])
