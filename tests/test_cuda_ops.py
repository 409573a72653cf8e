"""Schemas, fakes, gradients and callers of the CUDA operators, with stand-ins for these: all that needs no GPU."""

from __future__ import annotations

import functools
import inspect
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import stand_in
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_errors import CASES
from test_halves import FORMS, Half
from torch import Tensor
from torch._inductor import exc as inductor
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

import tome
import tome_cuda
import tome_reference
from tome_cuda import fakes, library, registration
from tome_reference import checks

OPERATIONS = [name for name in tome_reference.__all__ if name != "max_r"]
X = torch.randn(2, 9, 8)
KEYS = torch.randn(2, 3, 9, 4)
SLOT = tome_reference.match(KEYS, 3)
NEXT = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 1, 2]], dtype=torch.int32)
SIZE = torch.randint(1, 9, (2, 9)).float()
TOTAL = tome_reference.merge(X, SLOT, 6, SIZE)[1]
W, V, G = torch.randn(3, 8)
Q = torch.randn(2, 9, 3, 2, 32).half().permute(2, 0, 3, 1, 4)
F32, F16 = torch.float32, torch.float16
TABLE, HOME = torch.randn(8, 64), torch.tensor([[0, 1, 8, 3, 5, 5, 2, 7, 1], [0, 8, 7, 6, 5, 4, 3, 2, 1]])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.use(monkeypatch)


@pytest.mark.parametrize("name", tome_reference.__all__)
def test_signatures_are_those_of_the_reference(name: str) -> None:
    definition = inspect.signature(getattr(tome_reference, name))
    assert inspect.signature(getattr(tome_cuda, name)) == definition
    if name in OPERATIONS:
        check = inspect.signature(getattr(checks, name))
        assert check == definition.replace(return_annotation="None")


@pytest.mark.parametrize("name", stand_in.schemas())
def test_a_fake_has_the_arguments_of_its_schema(name: str) -> None:
    schema = torch._C.parse_schema(f"tome_cuda::{stand_in.schemas()[name]}")
    parameters = inspect.signature(fakes.FAKES[name].make).parameters.values()
    assert [argument.name for argument in schema.arguments] == [parameter.name for parameter in parameters]
    for argument, parameter in zip(schema.arguments, parameters, strict=True):
        known = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor | None", "List[Tensor]": "Sequence[Tensor]"}
        known |= {"int": "int", "float": "float", "bool": "bool"}
        kind = "torch.dtype" if argument.name.endswith("dtype") else known[str(argument.type)]
        assert parameter.annotation == kind, argument.name


def test_first_calls_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is told of each operator once, and no call runs before it is: torch 2.11 refuses a second fake."""
    namespace, threads = f"tome_stand_in_of_threads_{len(registration._registered)}", 8
    stand_in.install(namespace)
    monkeypatch.setattr(registration, "NAMESPACE", namespace)
    monkeypatch.setattr(registration, "_register", functools.cache(registration._register.__wrapped__))
    monkeypatch.setattr(library, "_load", lambda: library._Loaded(stand_in.INFO, None))
    told: list[str] = []
    register_fake = torch.library.register_fake

    def slowly(name: str, *args: Any) -> None:
        time.sleep(1e-4)  # other threads run
        told.append(name)
        register_fake(name, *args)

    monkeypatch.setattr(torch.library, "register_fake", slowly)
    together = threading.Barrier(threads)

    def first_call(_: int) -> int:
        together.wait()
        registration.operators()
        return len(told)

    with ThreadPoolExecutor(threads) as pool:
        assert set(pool.map(first_call, range(threads))) == {len(fakes.FAKES)}
    assert told == [f"{namespace}::{name}" for name in fakes.FAKES]


def test_every_operator_has_a_fake_and_a_kernel() -> None:
    kernels = re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&tome::(\w+)\)\)', stand_in.BINDING.read_text())
    assert [name for name, _ in kernels] == [function for _, function in kernels]
    assert {name for name, _ in kernels} == set(stand_in.schemas()) == set(fakes.FAKES)
    assert set(registration.GRADIENTS) <= set(fakes.FAKES)


STATS = torch.stack([X.mean(2), (X.var(2, correction=0) + 1e-5).rsqrt()], dim=2)
LISTS = (torch.tensor([[1, 3, 5], [8, 2, 4]]), torch.tensor([[2, 4, 6, 7, 8], [1, 3, 5, 6, 7]]))
LINEAR = torch.randn(8, 64).half(), None
HALF = X, X, None, None, torch.randn(192, 8), torch.randn(192)
PARAMETERS = torch.randn(8, 64), V, G, W, V
NUMBERS = 2, 6, 1, True, 0.2, 1e-5
BEHIND = X[:, 3:].clone(), STATS[:, :6], SLOT, SIZE, TOTAL, W, G, X
LINEARS = None, None, HALF[4], PARAMETERS[0], X
SEEN = torch.randn(2, 9, 192), None, None, torch.randn(2, 9, 2, 32), torch.randn(2, 2, 9)
MLP = torch.randn(12, 8), torch.randn(12), torch.randn(8, 12), V
HIDDEN = torch.randn(2, 9, 12)
OPERATORS = [
    ("bipartite_match", (KEYS, 3, 1)),
    ("kth_match", (KEYS[:, 0], 2, 1)),
    ("listed_match", (KEYS, *LISTS, 2, 1)),
    ("merge", (X, SLOT, 6, SIZE)),
    ("merge", (X.half(), SLOT, 6, None)),
    ("merge_backward", (X[:, :6], SLOT, SIZE, TOTAL)),
    ("unmerge", (X[:, :6], SLOT)),
    ("unmerge_backward", (X, SLOT, 6)),
    ("follow", ([SLOT, NEXT],)),
    ("restore", (X[:, :3], X[:, 3:6].half(), [SLOT, NEXT], G)),
    ("restore", (X[:, :6], None, [SLOT], None)),
    ("restore", (X, X, [], None)),
    ("rotate", (*Q[:2], TABLE, None, 1, False, False)),
    ("rotate", (*Q[:2], TABLE.half().expand(2, -1, -1), HOME.int(), 1, True, True)),
    ("homes", (SLOT, 6, None, None)),
    ("homes", (SLOT, 6, HOME, SIZE > 3)),
    ("pair_bias", (torch.randn(3, 9, 9), HOME, SIZE)),
    ("pair_bias", (torch.randn(3, 9, 9).half(), HOME[:, :3], None)),
    ("quick_gelu", (X,)),
    ("swiglu", X.half().chunk(2, dim=2)),
    ("swiglu_norm", (X, X, 8, W, V, 1e-5)),
    ("swiglu_norm", (*X.half().chunk(2, dim=2), 3, None, None, 1e-5)),
    ("linear_product", (X, torch.randn(12, 8), V.repeat(2)[:12])),
    ("linear_product", (X.half(), torch.randn(12, 8).half(), None)),
    ("linear_gelu", (X, torch.randn(12, 8), V.repeat(2)[:12], False, -1)),
    ("linear_gelu", (X.half(), torch.randn(12, 8).half(), None, True, -1)),
    ("attention", (*Q, SIZE, 0.2)),
    ("attention_training", (*Q, SIZE, 0.2)),
    ("attention_training", (Q[0, :, :, :5], *Q[1:], None, 0.2)),
    ("attention_backward", (Q[0], *Q, Q[1], Q[0, ..., 0].float(), SIZE, 0.2)),
    (
        "attention_backward",
        (Q[0, :, :, :5], Q[1, :, :, :5], *Q[1:], Q[2, :, :, :5], Q[0, :, :, :5, 0].float(), SIZE, 0.2),
    ),
    ("merge_add_norm", (X, X.half(), SLOT, 6, SIZE, W, V, 1e-5, G, torch.float16, True)),
    ("merge_add_norm", (X, X, None, 9, None, W, None, 1e-5, None, F32, True)),
    ("merge_add_norm", (X[:1].expand(2, -1, -1), X[:, 2:], SLOT, 6, None, W, V, 1e-5, G, F32, True)),
    ("merge_add_norm", (X, None, None, 9, SIZE, W, V, 1e-5, None, torch.bfloat16, False)),
    ("merge_add_norm_backward", (X[:, :6], X[:, :6], X[:, 3:].clone(), STATS[:, :6], SLOT, SIZE, TOTAL, W, G, 9, F32)),
    ("merge_add_norm_backward", (None, X, X, STATS, None, None, None, W, None, 9, F32)),
    ("column_sums", (X, X, None)),
    ("column_sums", (X, X, STATS)),
    ("attend_half_training", (*HALF, *PARAMETERS, SIZE, None, torch.ones(2), *NUMBERS, F32, F32, True)),
    ("attend_half_training", (*HALF, *PARAMETERS, None, SLOT, None, *NUMBERS, F32, torch.bfloat16, False)),
    ("attend_half_training", (X, *Q, None, None, *LINEAR, None, W, V, SIZE, None, None, *NUMBERS, F32, F16, False)),
    ("attend_half_backward", (X[:, :6], X[:, :6], *BEHIND, *LINEARS, *SEEN, 2, 9, True, 0.2, 127)),
    ("mlp_half_training", (X, X, *MLP, G, W, V, torch.ones(2), 0, 1e-5, F32, F32, True)),
    ("mlp_half_training", (X, X, *MLP, None, None, None, None, 2, 1e-5, F32, torch.bfloat16, False)),
    ("mlp_half_backward", (X, X, X, STATS, W, G, X, None, None, MLP[0], MLP[2], X, HIDDEN, HIDDEN, 1, 127)),
]


DIFFERENTIABLE = (
    *("merge", "unmerge", "merge_backward", "unmerge_backward", "rotate", "linear_gelu", "merge_add_norm"),
    *("attend_half_training", "mlp_half_training"),
)


@pytest.mark.parametrize(
    ("name", "args", "with_gradients"),
    [(*case, wanted) for case in OPERATORS for wanted in (False, True) if not wanted or case[0] in DIFFERENTIABLE],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of opcheck
@pytest.mark.usefixtures("stand_ins")
def test_operators_are_registered_as_torch_wants_it(name: str, args: tuple[Any, ...], with_gradients: bool) -> None:
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    if with_gradients:
        for value in args[:2]:
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    if name == "merge_add_norm":
        args = (*args[:-1], with_gradients)  # training
    operator = getattr(registration.operators(), name).default
    torch.library.opcheck(operator, args)
    schema = torch._C.parse_schema(f"tome_cuda::{stand_in.schemas()[name]}")
    result = operator(*args)
    assert len(schema.returns) == (len(result) if isinstance(result, tuple) else 1)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("merged", [0, 3])
@pytest.mark.parametrize(("form", "gelu"), [*zip(FORMS, checks.GELUS, strict=True)])
@pytest.mark.usefixtures("stand_ins")
def test_the_halves(form: str, gelu: str, merged: int, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one call gives what the definition gives; its fake, what it gives: shapes, dtypes, order, nothing aliased."""
    passed = []
    launch = registration.launch
    monkeypatch.setattr(tome_cuda.ops, "launch", lambda name, *args: passed.append((name, args)) or launch(name, *args))
    case = Half(2, 9, 2, 32, merged, 1, form, mapped, True, True, gelu, None, torch.float16, F32, True, 3)
    attend, mlp = case.build("cpu")
    ours, theirs = tome_cuda.attend_half(*attend), tome_reference.attend_half(*attend)
    assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if mapped:
        assert ours[3] is attend[4]
    assert all(map(torch.equal, tome_cuda.mlp_half(*mlp), tome_reference.mlp_half(*mlp)))
    for name, args in passed:
        torch.library.opcheck(getattr(registration.operators(), name).default, args)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("match", (KEYS, 3)),
    ("match", (KEYS, 0)),
    ("match", (KEYS[:, 0], 99, 2)),
    ("kth_match", (KEYS, 3)),
    ("kth_match", (KEYS, 1)),
    ("merge", (X, SLOT, 6, SIZE)),
    ("merge", (X, SLOT, 6)),
    ("unmerge", (X[:, :6], SLOT)),
    ("follow", ([SLOT],)),
    ("follow", ((SLOT, NEXT),)),
    ("restore", (X[:, :3], X[:, 3:6], (SLOT, NEXT), G)),
    ("restore", (X, X, (), None)),
    ("restore", (X, None, ())),
    ("rotate", (*Q.float()[:2], TABLE.half(), None, 1)),
    ("rotate", (*Q.float()[:2], TABLE, HOME, 1, True)),
    ("homes", (SLOT, 6)),
    ("homes", (SLOT, 6, HOME, SIZE > 3)),
    ("quick_gelu", (X,)),
    ("quick_gelu", (X[0, 0].half(),)),
    ("pair_bias", (torch.randn(3, 9, 9), HOME, SIZE)),
    ("pair_bias", (torch.randn(3, 9, 9), HOME[:, :5])),
    ("swiglu_norm", (X, X, 8, W, V, 1e-5)),
    ("swiglu_norm", (X[0, 0], X[0, 0], 5, W[:5], None, 1e-5)),
    ("swiglu", X.chunk(2, dim=2)),
    ("swiglu", (X[None, :, :3], X[None, :, :3].transpose(2, 3).contiguous().transpose(2, 3))),
    ("linear_gelu", (X, torch.randn(12, 8), V.repeat(2)[:12], "tanh")),
    ("linear_gelu", (X[0, 0], torch.randn(12, 8))),
    ("attention", (*Q, SIZE)),
    ("attention", (*Q.float(), SIZE, 0.3)),
    ("attention", (*Q[:, :0], None)),
    ("merge_add_norm", (X, X, SLOT, 6, SIZE, W, V, 1e-5, G)),
    ("merge_add_norm", (X, X, SLOT, 6, None, None, None, 1e-5)),
    ("merge_add_norm", (X, X.half(), None, 9, SIZE, W, V, 1e-5, None, torch.float16)),
    ("merge_add_norm", (X, None, None, 9, SIZE, W, V, 1e-5)),
    ("merge_add_norm", (X.transpose(1, 2), None, None, 8, None, None, None, 1e-5)),
]


@pytest.mark.parametrize(("name", "args"), CALLS)
@pytest.mark.usefixtures("stand_ins")
def test_calls_and_their_gradients_are_those_of_the_reference(name: str, args: tuple[Any, ...]) -> None:
    results, grads = [], []
    for module in (tome_cuda, tome_reference):
        leaves: list[Tensor] = []
        found = getattr(module, name)(*(leaf(a, leaves) for a in args))
        found = found if isinstance(found, tuple) else (found,)
        results.append(found)
        with_grad = [value for value in found if value is not None and value.requires_grad]
        seeds = [torch.linspace(-1, 1, value.numel()).view(value.shape).to(value.dtype) for value in with_grad]
        grads.append(torch.autograd.grad(with_grad, leaves, seeds, allow_unused=True) if with_grad else ())
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            rtol, atol = (1e-2, 2e-3) if ours.dtype.itemsize == 2 else (1e-4, 1e-4)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("stand_ins")
def test_what_is_returned_as_it_is() -> None:
    for module in (tome_cuda, tome_reference):
        assert module.restore(X, None, ()) is X
        assert module.follow([SLOT]) is SLOT
        out, _, size = module.merge_add_norm(X, None, None, 9, SIZE, W, V, 1e-5)
        assert out is X
        assert size is SIZE


def leaf(value: Any, leaves: list[Tensor]) -> Any:
    """A copy that wants a gradient, where it is one of the tokens or a parameter; sizes want none."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value is SIZE or value.dim() == 2:
        return value
    leaves.append(value.detach().requires_grad_())
    return leaves[-1]


@pytest.mark.usefixtures("stand_ins")
def test_random_match_draws_what_the_reference_draws() -> None:
    ours, theirs = (m.random_match(KEYS, 3, 1, torch.Generator().manual_seed(5)) for m in (tome_cuda, tome_reference))
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("stand_ins")
def test_gradients_of_gradients() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    slot = torch.tensor([[0, 1, 1, 2, 0]], dtype=torch.int32)

    def second(module: Any) -> Tensor:
        merged, _ = module.merge(x, slot, 3)
        (grad,) = torch.autograd.grad(module.unmerge(merged.pow(3), slot).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(second(tome_cuda), second(tome_reference))
    out = tome_cuda.merge_add_norm(x, x, None, 5, None, None, None, 1e-5)[1].square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="merge_add_norm has no second derivative"):
        grad.sum().backward()
    q = Q[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(tome_cuda.attention(q, Q[1], Q[2]).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        grad.sum().backward()


@pytest.mark.usefixtures("stand_ins")
def test_inductor_writes_out_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.15 it does so where it knows one not, with all before that: minutes behind twelve blocks."""
    written = []
    for error in (inductor.MissingOperatorWithDecomp, inductor.MissingOperatorWithoutDecomp):
        monkeypatch.setattr(error, "operator_str", lambda target, args, kwargs: written.append(target))
    torch._dynamo.reset()

    def step(x: Tensor, branch: Tensor) -> Tensor:
        x, y, _ = tome_cuda.merge_add_norm(x, branch, None, 9, None, W, V, 1e-5)
        return tome_cuda.merge(x + y, SLOT, 6)[0]

    x, branch = (torch.randn(2, 9, 8, requires_grad=True) for _ in range(2))
    calls = (step, torch.compile(step))
    with fresh_cache():
        outcomes = [torch.autograd.grad(call(x, branch).square().sum(), (x, branch)) for call in calls]
    torch.testing.assert_close(outcomes[1], outcomes[0])
    assert written == []


@given(op=st.sampled_from(["merge", "merge_add_norm"]), sized=st.booleans())
def test_sizes_want_no_gradient(op: str, sized: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stand_in.use(patch)
        x, size = X.clone().requires_grad_(), SIZE.clone().requires_grad_() if sized else None
        args = (x, SLOT, 6, size) if op == "merge" else (x, X, SLOT, 6, size, W, V, 1e-5)
        out, *_, total = getattr(tome_cuda, op)(*args)
        assert out.requires_grad
        assert not total.requires_grad


@pytest.mark.parametrize(("op", "args", "error", "message"), CASES)
def test_what_an_operator_refuses_is_said_by_the_reference(
    op: str, args: tuple[Any, ...], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.choose(monkeypatch)

    def refuse(*args: object) -> None:
        raise RuntimeError("terse")

    monkeypatch.setattr(tome_cuda.ops, "launch", refuse)
    with pytest.raises(error, match=message):
        getattr(tome.ops, op)(*args)
    with pytest.raises(RuntimeError, match="terse"):
        tome.ops.merge(X, SLOT, 6)


def test_a_fake_stays_on_its_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 9, 5, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        slot = torch.empty(2, 9, device="cuda", dtype=torch.int32)
        merged, total = fakes.FAKES["merge"].make(x, slot, 6, None)
        assert (merged.shape, merged.dtype, merged.device.type) == ((2, 6, 5), torch.bfloat16, "cuda")
        assert (total.shape, total.dtype) == ((2, 6), torch.float32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("stand_ins")
def test_compiles_without_breaks_or_recompiles(backend: str) -> None:
    torch._dynamo.reset()

    def block(x: Tensor, keys: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        assert tome_cuda.why_not("match", keys, 3) is not None
        slot = tome_cuda.match(keys, 3)
        merged, total = tome_cuda.merge(x * 2, slot, 6, size)
        merged, y, _ = tome_cuda.merge_add_norm(merged, merged, None, 6, total, W, V, 1e-5)
        return tome_cuda.restore(merged, y, [slot]).relu(), total

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(2, 9, 8, requires_grad=True)
            out, total = compiled(x, KEYS, SIZE)
            assert (out.shape, total.shape, total.requires_grad) == (x.shape, (2, 6), False)
            torch.testing.assert_close(out, block(x, KEYS, SIZE)[0])
            out.sum().backward()
            assert x.grad is not None


def test_the_choice_of_a_backend_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph under an explicit choice: attention by torch between operations that have kernels."""
    stand_in.choose(monkeypatch)
    torch._dynamo.reset()

    def block(x: Tensor, keys: Tensor) -> Tensor:
        slot = tome.ops.match(keys, 3)
        x, size = tome.ops.merge(x, slot, 6)
        keys = keys[:, :, :6]
        return x + tome.ops.attention(keys, keys, keys, size).transpose(1, 2).reshape(x.shape)

    compiled: Callable[..., Tensor] = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(compiled(x, KEYS), block(x, KEYS))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("stand_ins")
def test_attention_in_training_compiles(dynamic: bool) -> None:
    """In one graph, with the gradient of an eager call; of a packed projection, and of fewer queries than keys."""
    torch._dynamo.reset()

    def block(qkv: Tensor, size: Tensor) -> Tensor:
        q, k, v = (qkv * 2).permute(2, 0, 3, 1, 4)
        whole = tome_cuda.attention(q, k, v, size)
        return whole.transpose(1, 2).flatten(2).relu() + tome_cuda.attention(q[:, :, :3], k, v, size).mean()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (9, 11) if dynamic else (9, 9):
        random = torch.Generator().manual_seed(n)
        qkv = torch.randn(2, n, 3, 2, 32, generator=random).half().requires_grad_()
        size = torch.randint(1, 9, (2, n), generator=random).float()
        found = []
        for function in (compiled, block):
            out = function(qkv, size)
            found.append((out.detach(), *torch.autograd.grad(out, qkv, out.detach())))
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().max()))


@pytest.mark.usefixtures("stand_ins")
def test_transforms_of_torch_func_go_by_torch() -> None:
    """The operator in training has no rule for them."""
    q, k, v = (x.float() for x in Q)

    def loss(module: Any, q: Tensor) -> Tensor:
        return module.attention(q.half(), k.half(), v.half(), SIZE).float().square().sum()  # type: ignore[no-any-return]

    found = torch.func.grad(lambda q: loss(tome_cuda, q))(q)
    leaf = q.clone().requires_grad_()
    loss(tome_reference, leaf).backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-2, atol=2e-3)
