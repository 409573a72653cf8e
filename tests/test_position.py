"""Laws of the places of tokens: queries and keys turned by them, and where merged tokens stand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE, LAYOUTS, maps, strided
from torch import Tensor

import tome
import tome_reference
from tome import ops

DIMS = (2, 6, 8, 24, 32, 64, 72, 80, 88, 96, 128)
COUNTS = st.integers(1, 40)
TABLES = ("one", "heads", "images", "both")


@dataclass(frozen=True)
class Turn:
    """Arguments of rotate. ``repr`` reproduces them: ``Turn(...).build("cpu")``."""

    batch: int
    heads: int
    key_heads: int
    n: int
    dim: int
    prefix: int
    table: str  # of TABLES: what has a table of its own
    home: torch.dtype | None
    is_half: bool
    dtype: torch.dtype
    table_dtype: torch.dtype
    layout: str  # of LAYOUTS, or "qkv": slices of one packed tensor
    seed: int

    def build(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, bool]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        if self.layout == "qkv":
            heads = self.heads, self.key_heads, self.key_heads
            q, k, _ = draw(self.batch, self.n, sum(heads), self.dim).transpose(1, 2).split(heads, dim=1)
        else:
            q, k = (strided(draw(self.batch, h, self.n, self.dim), self.layout) for h in (self.heads, self.key_heads))
        places = self.n - self.prefix + 5 * (self.home is not None)
        own = {"one": (), "heads": (self.heads,), "images": (self.batch, 1), "both": (self.batch, self.heads)}
        table = draw(*own[self.table], places, 2 * self.dim, dtype=self.table_dtype)
        home = None
        if self.home is not None:
            home = torch.randint(self.prefix, self.prefix + places, (self.batch, self.n), generator=generator)
            home = home.to(self.home).to(device)
        return q, k, table, home, self.prefix, self.is_half


@st.composite
def turns(draw: st.DrawFn, tokens=COUNTS, dtypes=HALF_AND_SINGLE) -> Turn:
    """Any legal call of rotate."""
    table, heads, n = draw(st.sampled_from(TABLES)), draw(st.sampled_from((1, 2, 3, 12))), draw(tokens)
    shared = table in ("one", "images")
    return Turn(
        batch=draw(st.integers(0, 3)),
        heads=heads,
        key_heads=draw(st.sampled_from((1, 2, heads))) if shared else heads,
        n=n,
        dim=draw(st.sampled_from(DIMS)),
        prefix=draw(st.integers(0, min(n, 5))),
        table=table,
        home=draw(st.sampled_from((None, torch.int64, torch.int32))),
        is_half=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        table_dtype=draw(st.sampled_from(HALF_AND_SINGLE)),
        layout=draw(st.sampled_from((*LAYOUTS, "qkv"))),
        seed=draw(st.integers(0, 2**31)),
    )


def exactly(q, k, table, home, prefix, is_half):
    """The definition in float64, pair by pair, with what rounding may do: bounds of the sum of the products."""
    table = table.double()[(None,) * (4 - table.dim())]
    n = q.shape[2]
    for x in (q, k):
        place = torch.arange(n, device=q.device).expand(q.shape[0], n) if home is None else home.long()
        rows = table.expand(q.shape[0], x.shape[1] if table.shape[1] > 1 else 1, -1, -1)
        place = (place[:, prefix:] - prefix)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        sin, cos = rows.gather(2, place).chunk(2, dim=3)
        wide = x.double()[:, :, prefix:]
        partner = torch.arange(x.shape[3], device=q.device)
        half = x.shape[3] // 2
        partner, is_first = (
            ((partner + half) % (2 * half), partner < half) if is_half else (partner ^ 1, partner % 2 == 0)
        )
        along, across = wide * cos, torch.where(is_first, -1.0, 1.0) * wide[..., partner] * sin
        head = x[:, :, :prefix].double()
        yield torch.cat([head, along + across], 2), torch.cat([0 * head, along.abs() + across.abs()], 2)


def check(found, case, args):
    for x, ours, (value, bound) in zip(args, found, exactly(*args), strict=False):
        assert (ours.shape, ours.dtype) == (x.shape, x.dtype)
        limit = torch.finfo(case.dtype)
        slack = limit.eps * value.abs() * 0.51 + 2.0**-23 * bound + limit.smallest_normal * limit.eps
        assert bool(((ours.double() - value).abs() <= slack).all())
        assert torch.equal(ours[:, :, : case.prefix], x[:, :, : case.prefix])


@given(case=turns())
def test_rotate(device, case):
    """Behind the prefix each pair is turned by its angle; rounded once, but for who computes in a half throughout."""
    args = case.build(device)
    found = ops.rotate(*args)
    if tome.get_backend() == "reference" and case.dtype is case.table_dtype and case.dtype is not torch.float32:
        args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        for ours, theirs in zip(found, tome_reference.rotate(*args), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=4e-2, atol=8e-2)
    elif tome.get_backend() != "reference" or torch.float32 in (case.dtype, case.table_dtype):
        check(found, case, args)


def timm_s(q, k, table, home, prefix, is_half):
    from timm.layers import apply_rot_embed_cat

    if home is not None:
        rows = table[(None,) * (4 - table.dim())].expand(q.shape[0], -1, -1, -1)
        index = (home[:, prefix:].long() - prefix)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        table = rows.gather(2, index)
    return [
        torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=is_half)], dim=2) for x in (q, k)
    ]


@given(case=turns())
def test_the_reference_has_the_bits_of_timm(case):
    args = case.build("cpu")
    for ours, theirs in zip(tome_reference.rotate(*args), timm_s(*args), strict=True):
        # Older versions of timm leave the promoted dtype.
        assert torch.equal(ours, theirs.to(ours.dtype))


def turn(**changed) -> Turn:
    named = {"batch": 2, "heads": 3, "key_heads": 3, "n": 9, "dim": 8, "prefix": 1, "table": "one", "home": torch.int64}
    named |= {"is_half": False, "dtype": torch.float32, "table_dtype": torch.float32, "layout": "qkv", "seed": 0}
    return Turn(**(named | changed))


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_gradients_of_rotate_agree_with_finite_differences(table, is_half):
    q, k, rows, *others = turn(table=table, is_half=is_half, n=4, dim=4).build("cpu")
    leaves = [value.double().requires_grad_() for value in (q, k, rows)]
    assert torch.autograd.gradcheck(lambda *leaves: tome_reference.rotate(*leaves, *others), leaves)


@given(case=turns(dtypes=(torch.float32,)))
def test_gradients_of_rotate(device, case):
    """Those of any table, though its two sines of a pair be different."""
    q, k, *others = case.build(device)
    found = []
    for module in (ops, tome_reference):
        leaves = [value.clone().requires_grad_() for value in (q, k)]
        outputs = module.rotate(*leaves, *others)
        seeds = [torch.linspace(-1, 1, out.numel(), device=device).view(out.shape) for out in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, seeds)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_rotation_and_back(device):
    """Angles that the two of a pair share keep lengths, and the gradient is the rotation by the negative ones."""
    q, k, _, *others = turn().build(device)
    q.requires_grad_()
    angle = torch.randn(13, 4, device=device).repeat_interleave(2, -1)
    table = torch.cat([angle.sin(), angle.cos()], dim=-1)
    turned, _ = ops.rotate(q, k, table, *others)
    torch.testing.assert_close(turned.norm(dim=3), q.norm(dim=3))
    (back,) = torch.autograd.grad(turned, q, turned)
    torch.testing.assert_close(back, q)


def test_gradients_of_gradients_of_rotate(device):
    q, k, table, *others = turn().build(device)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    turned = ops.rotate(q, k, table, *others)
    loss = (turned[0] * turned[1]).sum()
    grads = torch.autograd.grad(loss, (q, k), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (q, k))
    truth = [value.detach().clone().requires_grad_() for value in (q, k)]
    turned = tome_reference.rotate(*truth, table, *others)
    grads = torch.autograd.grad((turned[0] * turned[1]).sum(), truth, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(sum(grad.square().sum() for grad in grads), truth))


def test_a_table_that_learns(device):
    """The kernels have no gradient of it, and say so."""
    q, k, table, *others = turn(table="heads").build(device)
    table.requires_grad_()
    if tome.get_backend() == "cuda":
        with pytest.raises(tome.BackendError, match="has no gradient of its table, and one is wanted"):
            ops.rotate(q, k, table, *others)
        with torch.no_grad():
            ops.rotate(q, k, table, *others)
        return
    ops.rotate(q, k, table, *others)[0].sum().backward()
    assert bool(table.grad.isfinite().all())


@pytest.mark.parametrize("layout", ["qkv", "contiguous"])
def test_what_rotate_gives_is_what_attention_takes(device, layout):
    case = turn(dim=64, layout=layout, dtype=torch.float16)
    q, k = ops.rotate(*case.build(device))
    assert q.stride(3) == k.stride(3) == 1
    theirs = ops.attention(q.contiguous(), k.contiguous(), k.contiguous())
    torch.testing.assert_close(ops.attention(q, k, k), theirs, rtol=2e-3, atol=2e-3)


def test_a_place_that_the_table_lacks_is_seen(device):
    q, k, table, home, prefix, is_half = turn().build(device)
    for bad in (0, 14, -1):
        home[0, 3] = bad
        if tome.get_backend() == "cuda":
            for x, out in zip((q, k), ops.rotate(q, k, table, home, prefix, is_half), strict=True):
                is_bad = torch.zeros(x.shape, dtype=torch.bool, device=device)
                is_bad[0, :, 3] = True
                assert torch.equal(out.isnan(), is_bad)
        elif device.type == "cpu":
            with pytest.raises((IndexError, RuntimeError)):
                ops.rotate(q, k, table, home, prefix, is_half)


@given(case=maps(), placed=st.booleans(), padded=st.booleans(), seed=st.integers(0, 2**31))
def test_homes(device, case, placed, padded, seed):
    _, slot, _ = case.build(device)
    generator = torch.Generator().manual_seed(seed)
    home = torch.randint(10**12, (case.batch, case.n), generator=generator) if placed else None
    valid = torch.rand(case.batch, case.n, generator=generator) < 0.7 if padded else None
    found = ops.homes(slot, case.tokens, *(None if value is None else value.to(device) for value in (home, valid)))
    assert (found.dtype, found.device, found.shape) == (torch.int64, slot.device, (case.batch, case.tokens))
    for b, row in enumerate(slot.tolist()):
        for m in range(case.tokens):
            members = [i for i, place in enumerate(row) if place == m]
            first = min(members if valid is None else [i for i in members if valid[b, i]] or members)
            assert int(found[b, m]) == (first if home is None else int(home[b, first]))
