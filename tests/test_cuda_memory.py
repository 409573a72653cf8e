"""A lack of memory in an operator is torch's own error, and nothing is printed: batch-size finders live on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stand_in
import torch
from backends import NO_EXTENSION
from test_halves import Half
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tome
import tome_cuda
import tome_reference
from tome_cuda import registration
from tome_cuda.fakes import FAKES, Fake

X = torch.randn(2, 8, 4)
SLOT = tome_reference.match(X, 3)
FAILED = "aoti_torch_empty_strided(dim, sizes, strides, code, type, index, &out) API call failed at stable.h, line 95"
LACKING = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class Script:
    """What an operator, or its fake, does at each of its calls: raise an error, or with None what it does otherwise."""

    def __init__(self, function: Callable[..., Any], *steps: Exception | None) -> None:
        self.function, self.steps, self.calls = function, list(steps), 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.steps and (error := self.steps.pop(0)) is not None:
            raise error
        return self.function(*args)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    stand_in.choose(monkeypatch)
    return monkeypatch


def scripts(
    patch: pytest.MonkeyPatch, name: str, operator: list[Exception | None], fake: list[Exception | None]
) -> tuple[Script, Script]:
    """Let an operator and its fake do what the lists say."""
    real = registration._overload
    played = Script(real(name), *operator), Script(FAKES[name].make, *fake)
    patch.setattr(registration, "_overload", lambda wanted: played[0] if wanted == name else real(wanted))
    patch.setitem(FAKES, name, Fake(played[1], FAKES[name].elements))
    return played


def test_a_failed_allocation_is_the_error_that_torch_gives_for_it(patch: pytest.MonkeyPatch) -> None:
    operator, fake = scripts(patch, "merge", [RuntimeError(FAILED)], [LACKING])
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        tome.ops.merge(X, SLOT, 5)
    assert (operator.calls, fake.calls) == (1, 1)


def test_memory_that_has_become_free_is_used(patch: pytest.MonkeyPatch) -> None:
    operator, fake = scripts(patch, "merge", [RuntimeError(FAILED)], [])
    assert torch.equal(tome.ops.merge(X, SLOT, 5)[0], tome_reference.merge(X, SLOT, 5)[0])
    assert (operator.calls, fake.calls) == (2, 1)


def test_a_call_that_fails_for_another_reason_is_no_lack_of_memory(patch: pytest.MonkeyPatch) -> None:
    operator, _ = scripts(patch, "merge", [RuntimeError(FAILED), RuntimeError(FAILED + " again")], [])
    with pytest.raises(RuntimeError, match="again"):
        tome.ops.merge(X, SLOT, 5)
    assert operator.calls == 2
    operator, fake = scripts(patch, "merge", [RuntimeError("an illegal memory access")], [])
    with pytest.raises(RuntimeError, match="illegal"):
        tome.ops.merge(X, SLOT, 5)
    assert (operator.calls, fake.calls) == (1, 0)


def test_what_is_large_is_allocated_before_the_operator_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(registration, "LARGE", X.numel())
    operator, fake = scripts(patch, "merge", [], [None, LACKING])
    tome.ops.merge(X, SLOT, 5)
    assert (operator.calls, fake.calls) == (1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        tome.ops.merge(X, SLOT, 5)
    assert (operator.calls, fake.calls) == (1, 2)
    tome.ops.merge(X[:1], SLOT[:1], 5)
    assert (operator.calls, fake.calls) == (2, 2)


def test_what_grows_counts_as_what_it_becomes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(registration, "LARGE", X.numel())
    for name, args in (("unmerge", (X[:, :5], SLOT)), ("restore", (X[:, :5], None, [SLOT], None))):
        _, fake = scripts(patch, name, [], [])
        registration.launch(name, *args)
        assert fake.calls == 1, name


def call(name: str) -> Tensor:
    x = X.clone().requires_grad_()
    if name == "unmerge_backward":
        return tome.ops.unmerge(x[:, :5], SLOT)
    if name == "merge_backward":
        return tome.ops.merge(x, SLOT, 5)[0]
    gamma = torch.ones(4, requires_grad=True)
    return tome.ops.merge_add_norm(x, X, SLOT, 5, None, gamma, None, 1e-5, gamma)[1]


@pytest.mark.parametrize("name", ["merge_backward", "unmerge_backward", "merge_add_norm_backward", "column_sums"])
def test_gradients_too(patch: pytest.MonkeyPatch, name: str) -> None:
    scripts(patch, name, [RuntimeError(FAILED)], [LACKING])
    out = call(name)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        out.sum().backward()


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that live, at each allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.seen: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.made.append(weakref.ref(result))
        self.seen.append([tuple(t.shape) for ref in self.made if (t := ref()) is not None and t.numel() > 0])
        return result


def test_fakes_of_the_halves_allocate_as_their_operators_do() -> None:
    """In csrc/halves: qkv and what attention gives are free before the tokens merge, and the hidden layer after it."""
    half = Half(2, 9, 2, 32, 3, 1, "projected", False, True, True, "erf", 0.2, torch.float32, None, True, 0)
    (x, qkv, *others), (_, y, fc1, _, fc2, gamma, norm, _) = half.build("meta")
    *others, qkv_linear, proj, _, _, _ = others
    with Allocations() as attend:
        FAKES["attend_half"].make(x, qkv, *others, *qkv_linear, *proj, gamma, *norm, torch.float32)
    slot, packed, seen, branch, out, size = (2, 9), (2, 9, 192), (2, 9, 64), (2, 9, 16), (2, 6, 16), (2, 6)
    scratch = (2, 9, 4 * 32 + 8)
    assert [step for step, next_ in zip(attend.seen, [*attend.seen[1:], None], strict=True) if step != next_] == [
        [packed],
        [packed, slot],
        [packed, slot, scratch],
        [packed, slot, seen],
        [packed, slot, seen, branch],
        [slot, branch, out],
        [slot, branch, out, out],
        [slot, branch, out, out, size],
    ]
    with Allocations() as mlp:
        FAKES["mlp_half"].make(x, y, *fc1, 2, *fc2, gamma, *norm, torch.float32)
    hidden, branch = (2, 9, 24), (2, 9, 16)
    assert mlp.seen[:5] == [
        [hidden],
        [hidden, hidden],
        [hidden, hidden, branch],
        [branch, branch],
        [branch, branch, branch],
    ]
    halved = y.half()
    with Allocations() as mlp:
        FAKES["mlp_half"].make(x, halved, *fc1, 1, *fc2, gamma, *norm, torch.float32)
    assert mlp.seen[:4] == [[hidden], [hidden, branch], [branch, branch], [branch, branch, branch]]


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """From its call on there is no more memory than what is allocated by then, and 64 MiB."""
    device = torch.cuda.current_device()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory

    def limit() -> None:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@NO_EXTENSION
@pytest.mark.parametrize("name", ["attention", "merge", "unmerge", "merge_add_norm", "mlp_half", "merge_backward"])
def test_a_gpu_that_runs_out_of_memory(
    name: str, little_memory: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """96 MiB of tokens, and twice as much for what each operation makes of them."""
    x = torch.randn(128, 512, 768, device="cuda", dtype=torch.float16)
    slot = torch.arange(512, device="cuda", dtype=torch.int32).expand(128, -1).contiguous()
    q = x.view(128, 512, 12, 64).transpose(1, 2)
    weight, norm = torch.randn(768, 768, device="cuda").half(), (None, None, 1e-5)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        merged = tome_cuda.merge(leaf, slot, 512)[0] if name == "merge_backward" else x
    operations: dict[str, Callable[[], object]] = {
        "attention": lambda: tome.ops.attention(q, q, q),
        "merge": lambda: tome.ops.merge(x, slot, 512),
        "unmerge": lambda: tome.ops.unmerge(x, slot),
        "merge_add_norm": lambda: tome.ops.merge_add_norm(x, x, slot, 512, None, None, None, 1e-5),
        "mlp_half": lambda: tome.ops.mlp_half(x, x, (weight, None), "quick", (weight, None), None, norm, None),
        "merge_backward": lambda: torch.autograd.grad(merged, leaf, x, retain_graph=True),
    }
    with tome.use_backend("cuda"):
        little_memory()
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate"):
            operations[name]()
        assert capfd.readouterr().err == ""
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert operations[name]() is not None
