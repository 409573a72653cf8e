"""The halves of a block are their parts, bit for bit, on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE
from torch import Tensor

import tome
import tome_reference
from tome import ops
from tome_reference.checks import GELUS

FORMS = ("views", "packed", "projected")


@dataclass(frozen=True)
class Half:
    """Arguments of both halves. ``repr`` reproduces them."""

    batch: int
    n: int
    heads: int
    head_dim: int
    merged: int
    prefix: int
    form: str
    mapped: bool  # whether the slot map is given
    sized: bool
    is_weighted: bool
    gelu: str
    scale: float | None
    dtype: torch.dtype
    norm_dtype: torch.dtype | None
    biased: bool
    seed: int

    def draw(self, *shape: int, optional: bool = False) -> Tensor | None:
        if optional and not self.biased:
            return None
        return (torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5).to(self.dtype).to(self.device)

    def build(self, device: torch.device | str) -> tuple[tuple, tuple]:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))
        object.__setattr__(self, "device", device)
        batch, n, width, channels = self.batch, self.n, self.heads * self.head_dim, 16
        x, y = self.draw(batch, n, channels), self.draw(batch, n, channels)
        linear = None
        if self.form == "views":
            qkv = tuple(self.draw(batch, self.heads, n, self.head_dim) for _ in range(3))
        elif self.form == "packed":
            qkv = (self.draw(batch, n, 3 * width),)
        else:
            qkv = (y,)
            linear = (self.draw(3 * width, channels), self.draw(3 * width, optional=True))
        size = torch.randint(1, 9, (batch, n), generator=self.generator).float().to(device) if self.sized else None
        keys = torch.randn(batch, n, 4, generator=self.generator).to(device)
        slot = tome_reference.match(keys, self.merged, self.prefix) if self.mapped else None
        norm = (self.draw(channels, optional=True), self.draw(channels, optional=True), 1e-5)
        proj = (self.draw(channels, width), self.draw(channels, optional=True))
        gamma = self.draw(channels, optional=True)
        attend = (
            *(x, qkv, self.heads, size, slot, n - self.merged, self.prefix, self.is_weighted, self.scale),
            *(linear, proj, gamma, norm, self.norm_dtype),
        )
        fc1 = (self.draw(24, channels), self.draw(24, optional=True))
        fc2 = (self.draw(channels, 24), self.draw(channels, optional=True))
        return attend, (x, y, fc1, self.gelu, fc2, gamma, norm, self.norm_dtype)


@st.composite
def halves(draw: st.DrawFn) -> Half:
    n = draw(st.sampled_from([1, 2, 9, 33]))
    prefix = draw(st.integers(0, min(2, n)))
    booleans = st.booleans()
    return Half(
        *(draw(st.integers(0, 2)), n, draw(st.sampled_from([1, 3])), draw(st.sampled_from([8, 32, 64]))),
        *(draw(st.integers(0, (n - prefix) // 2)), prefix, draw(st.sampled_from(FORMS)), draw(booleans)),
        *(draw(booleans), draw(booleans), draw(st.sampled_from(GELUS)), draw(st.sampled_from([None, 0.3]))),
        *(draw(st.sampled_from(HALF_AND_SINGLE)), draw(st.sampled_from([None, torch.float32, torch.float16]))),
        *(draw(booleans), draw(st.integers(0, 2**31))),
    )


def same(ours: tuple, theirs: tuple) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(case=halves())
def test_attend_half_is_its_parts(device, case):
    attend, _ = case.build(device)
    x, qkv, heads, size, slot, tokens, prefix, is_weighted, scale, linear, proj, gamma, norm, norm_dtype = attend
    with torch.no_grad():
        if tome.get_backend() == "cuda" and ops.one_call("attend_half", *attend) is None:
            with pytest.raises(tome.BackendError, match="cannot run attend_half"):
                ops.attend_half(*attend)
            return
        ours = ops.attend_half(*attend)
        if len(qkv) == 1:
            packed = qkv[0] if linear is None else F.linear(qkv[0], *linear)
            qkv = packed.reshape(case.batch, case.n, 3, heads, case.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if slot is None and case.merged > 0:
            slot = ops.match(qkv[1], case.merged, prefix)
        seen = ops.attention(*qkv, size if is_weighted else None, scale)
        seen = seen.transpose(1, 2).reshape(case.batch, case.n, heads * case.head_dim)
        branch = F.linear(seen, *proj)
        expected = ops.merge_add_norm(x, branch, slot, tokens, size, *norm, gamma, norm_dtype)
    assert same(ours, (*expected, slot))
    assert ours[1].dtype == (norm_dtype or x.dtype)


@given(case=halves())
def test_mlp_half_is_its_parts(device, case):
    _, mlp = case.build(device)
    x, y, fc1, gelu, fc2, gamma, norm, norm_dtype = mlp
    with torch.no_grad():
        kinds = {"erf": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh"), "quick": ops.quick_gelu}
        hidden = kinds[gelu](F.linear(y, *fc1))
        expected = ops.merge_add_norm(x, F.linear(hidden, *fc2), None, case.n, None, *norm, gamma, norm_dtype)
        found = ops.mlp_half(*mlp)
    if tome.get_backend() == "cuda" and y.dtype is not torch.float32:  # for which they have a GELU of their own
        bound = 8 * torch.finfo(y.dtype).eps
        torch.testing.assert_close(found, expected[:2], rtol=bound, atol=bound)
    else:
        assert same(found, expected[:2])


def is_real(value):
    """What may have a gradient: sizes and what stochastic depth leaves have none."""
    return value.is_floating_point() and value.shape not in ((2, 9), (2,))


def leaf(value, leaves):
    if isinstance(value, tuple):
        return tuple(leaf(each, leaves) for each in value)
    if isinstance(value, Tensor) and is_real(value):
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]
    return value


def gradients(module, args, outputs):
    """Of all that is floating but sizes, of random combinations of x and y."""
    leaves, generator = [], torch.Generator().manual_seed(1)
    found = module(*(leaf(value, leaves) for value in args))[:outputs]
    seeds = [torch.randn(out.shape, generator=generator).to(out) for out in found]
    return torch.autograd.grad(found, leaves, seeds, allow_unused=True)


def assert_near(ours, theirs, truth):
    """No further from float64's than three times what the reference is in the same dtype, and some roundings."""
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            error, limit = (mine.double() - exact).abs().max(), (other.double() - exact).abs().max()
            assert error <= 3 * limit + 8 * torch.finfo(mine.dtype).eps * exact.abs().max(), (error, limit)


def doubled(value):
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    return value.double() if isinstance(value, Tensor) and is_real(value) else value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("gelu", "merged", "biased"), [("erf", 3, True), ("tanh", 0, False), ("quick", 3, True)])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_of_both_halves(device, form, mapped, gelu, merged, biased, dropped):
    dtype = torch.float16 if tome.get_backend() == "cuda" else torch.float32
    case = Half(2, 9, 2, 32, merged, 1, form, mapped, True, True, gelu, None, dtype, None, biased, 0)
    drop = torch.tensor([0.0, 1.25], device=device).to(dtype) if dropped else None
    for name, args, outputs in zip(("attend_half", "mlp_half"), case.build(device), (2, 2), strict=True):
        args = (*args, drop)
        if args[4] is None and name == "attend_half" and merged:  # matching must not differ between dtypes
            keys = tome_reference.halves.split(args[1], 2, args[9])[1]
            truth = (*args[:4], tome_reference.match(keys, merged, 1), *args[5:])
        else:
            truth = args
        ours, theirs = (gradients(getattr(module, name), args, outputs) for module in (ops, tome_reference))
        truth = gradients(getattr(tome_reference, name), tuple(map(doubled, truth)), outputs)
        assert_near(ours, theirs, truth)
        assert sum(grad is not None for grad in ours) == len(ours) >= 3


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_halves_have_no_second_gradient(device, form):
    if tome.get_backend() != "cuda":
        return
    case = Half(2, 9, 2, 32, 3, 1, form, False, True, True, "erf", None, torch.float16, None, True, 0)
    for name, args in zip(("attend_half", "mlp_half"), case.build(device), strict=True):
        leaves = []
        out = getattr(ops, name)(*(leaf(value, leaves) for value in args))[0].float().square().sum()
        (grad,) = torch.autograd.grad(out, leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.float().sum().backward()
