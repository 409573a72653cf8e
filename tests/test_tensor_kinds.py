"""Tensors without values, many tensors at once, and other defaults than torch's: the definitions hold for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_halves import FORMS, Half
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import tome_reference
from tome import ops

X, KEYS = torch.randn(2, 9, 8), torch.randn(2, 3, 9, 4)
SLOT = tome_reference.match(KEYS, 3)
NEXT = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 1, 2]], dtype=torch.int32)
SIZE = torch.randint(1, 9, (2, 9)).float()
W, V, G = torch.randn(3, 8)
SETS = torch.tensor([[1, 3, 5], [8, 2, 4]]), torch.tensor([[2, 4, 6, 7, 8], [1, 3, 5, 6, 7]])
HALVES = [
    Half(2, 9, 2, 8, merged, 1, form, mapped, True, True, "quick", None, torch.float32, None, True, 3).build("cpu")
    for form in FORMS
    for merged, mapped in ((0, False), (3, False), (3, True))
]
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("match", (KEYS, 3)),
    ("match", (KEYS[:, 0], 0)),
    ("kth_match", (KEYS, 3)),
    ("random_match", (KEYS, 3)),
    ("set_match", (KEYS, *SETS, 2, 1)),
    ("merge", (X, SLOT, 6, SIZE)),
    ("merge", (X, SLOT, 6)),
    ("unmerge", (X[:, :6], SLOT)),
    ("follow", ([SLOT, NEXT],)),
    ("restore", (X[:, :3], X[:, 3:6], [SLOT, NEXT], G)),
    ("rotate", (KEYS, KEYS, torch.randn(9, 8))),
    ("rotate", (KEYS, KEYS, torch.randn(3, 9, 8), torch.arange(9).expand(2, 9), 2, True)),
    ("homes", (SLOT, 6, torch.arange(9).repeat(2, 1), SIZE > 3)),
    ("quick_gelu", (X,)),
    ("swiglu", (X, X)),
    ("swiglu_norm", (X, X, 7, W[:7], None, 1e-5)),
    ("pair_bias", (torch.randn(3, 9, 9), torch.arange(9).repeat(2, 1), SIZE)),
    ("linear_gelu", (X, torch.randn(12, 8), torch.randn(12))),
    ("attention", (KEYS, KEYS, KEYS, SIZE)),
    ("merge_add_norm", (X, X, SLOT, 6, SIZE, W, V, 1e-5, G)),
    ("merge_add_norm", (X, X, SLOT, 6, None, None, None, 1e-5)),
    ("merge_add_norm", (X, None, None, 9, None, W, V, 1e-5, None, torch.bfloat16)),
    *(("attend_half", attend) for attend, _ in HALVES),
    ("mlp_half", HALVES[0][1]),
]
every_call = pytest.mark.parametrize(("name", "args"), CALLS)


def results(name: str, args: Any) -> list[Tensor | None]:
    found = getattr(ops, name)(*args)
    return list(found) if isinstance(found, tuple) else [found]


def assert_alike(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)


@every_call
def test_tensors_on_the_meta_device(name: str, args: tuple[Any, ...]) -> None:
    without_values = results(name, tree_map_only(Tensor, lambda t: t.to("meta"), args))
    assert all(value is None or value.device.type == "meta" for value in without_values)
    assert_alike(without_values, results(name, args))


@every_call
def test_fake_tensors(name: str, args: tuple[Any, ...]) -> None:
    with FakeTensorMode() as mode:
        faked = results(name, tree_map_only(Tensor, mode.from_tensor, args))
    assert_alike(faked, results(name, args))


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_changes_no_bit(
    name: str, args: tuple[Any, ...], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype is torch.float64:
        args = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() and t is not SIZE else t, args)
        args = tree_map_only(Tensor, lambda t: t.float() if t.shape == (2, 9) and t.is_floating_point() else t, args)
    torch.manual_seed(0)
    expected = results(name, args)
    request.getfixturevalue("double_by_default")
    torch.manual_seed(0)
    found = results(name, args)
    assert_alike(found, expected)
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def loss_of(name: str, args: tuple[Any, ...], position: int) -> Callable[[Tensor], Tensor]:
    """The sum of what an operation gives for one image, as a function of one of its arguments."""

    def loss(value: Tensor) -> Tensor:
        changed = tuple(value[None] if i == position else argument for i, argument in enumerate(args))
        found = results(name, changed)
        return sum(t.square().sum() for t in found if t is not None and t.is_floating_point())

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of attention under vmap
@pytest.mark.parametrize(
    ("name", "args", "position"),
    [
        ("merge", (None, SLOT[:1], 6, SIZE[:1]), 0),
        ("unmerge", (None, SLOT[:1]), 0),
        ("restore", (X[:1, :6], None, [SLOT[:1]]), 1),
        ("merge_add_norm", (None, X[:1], SLOT[:1], 6, SIZE[:1], W, V, 1e-5, G), 0),
        ("merge_add_norm", (X[:1], None, None, 9, None, W, V, 1e-5), 0),
        ("rotate", (KEYS[:1], None, torch.randn(9, 8), torch.arange(9)[None], 2), 1),
        ("quick_gelu", (None,), 0),
        ("swiglu", (None, X[:1]), 0),
        ("swiglu_norm", (None, X[:1], 7, W[:7], None, 1e-5), 0),
        ("linear_gelu", (None, torch.randn(3, 8), G[:3], "tanh"), 0),
        ("attention", (None, KEYS[:1], KEYS[:1], SIZE[:1]), 0),
    ],
)
def test_gradients_of_each_image(name: str, args: tuple[Any, ...], position: int) -> None:
    images = KEYS if name in ("rotate", "attention") else X[:, :6] if name in ("unmerge", "restore") else X
    loss = loss_of(name, args, position)
    found = torch.func.vmap(torch.func.grad(loss))(images)
    leaves = images.clone().requires_grad_()
    sum(loss(image) for image in leaves).backward()
    torch.testing.assert_close(found, leaves.grad)


def test_maps_of_each_image() -> None:
    """Matching and merging under vmap, where the maps differ from image to image."""

    def merged(x: Tensor, keys: Tensor) -> Tensor:
        slot = ops.match(keys[None], 3)
        x, size = ops.merge(x[None], slot, 6)
        x, _, _ = ops.merge_add_norm(x, x, ops.kth_match(x, 2, 0), 3, size, W, V, 1e-5)
        return ops.restore(x, x, [slot, ops.kth_match(x.new_ones(1, 6, 2), 2, 0)])[0]

    found = torch.func.vmap(merged)(X, KEYS)
    torch.testing.assert_close(found, torch.stack([merged(x, keys) for x, keys in zip(X, KEYS, strict=True)]))
    found = torch.func.vmap(torch.func.grad(lambda x, keys: merged(x, keys).square().sum()))(X, KEYS)
    leaves = X.clone().requires_grad_()
    sum(merged(x, keys).square().sum() for x, keys in zip(leaves, KEYS, strict=True)).backward()
    torch.testing.assert_close(found, leaves.grad)
