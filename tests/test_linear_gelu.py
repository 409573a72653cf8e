"""Laws of a linear layer with its GELU: rounded once by the kernel, and never further off than PyTorch's two steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import stand_in
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF_AND_SINGLE
from torch import Tensor

import tome_cuda
from tome import ops
from tome_cuda import predicates

HALVES = (torch.float16, torch.bfloat16)
KINDS = ("none", "tanh")
SOURCE = Path(__file__).parents[1] / "cuda_ext" / "csrc" / "activation" / "gelu.h"


def build(shape, j, k, dtype, has_bias=True, scale=1.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(*shape, k, generator=generator)
    weight = torch.randn(j, k, generator=generator) * max(k, 1) ** -0.5
    bias = 0.5 * torch.randn(j, generator=generator) if has_bias else None
    return tuple(None if t is None else t.to(dtype).to(device) for t in (x, weight, bias))


def exact_gelu(v, approximate):
    v = v.double()
    if approximate == "tanh":
        return v * torch.sigmoid(2.0 * (2.0 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))
    return 0.5 * v * torch.special.erfc(-v * 0.5**0.5)


def exactly(x, weight, bias, approximate):
    return exact_gelu(F.linear(x.double(), weight.double(), None if bias is None else bias.double()), approximate)


def two_steps(x, weight, bias, approximate):
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


@given(
    st.sampled_from([(), (0,), (3,), (2, 5), (1, 33), (2, 0), (2, 3, 7)]),
    *(st.integers(1, 40), st.integers(0, 40), st.sampled_from(HALF_AND_SINGLE), st.booleans()),
    *(st.sampled_from(KINDS), st.integers(0, 2**31 - 1)),
)
def test_it_is_torch_s_two_steps(device, shape, j, k, dtype, has_bias, approximate, seed):
    args = build(shape, j, k, dtype, has_bias, 1.0, seed, device)
    assert_like(ops.linear_gelu(*args, approximate), two_steps(*args, approximate))


def assert_like(found, expected):
    """The same bits, other than from a product on a GPU, which rounds once less."""
    eps = 4 * torch.finfo(found.dtype).eps if found.is_cuda and found.dtype in HALVES else 0.0
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("approximate", KINDS)
def test_gradients(device, approximate):
    found = []
    for function in (ops.linear_gelu, two_steps):
        leaves = [t.requires_grad_() for t in build((2, 9), 16, 24, torch.float32, device=device)]
        function(*leaves, approximate).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast(device):
    kind = device.type
    x, weight, bias = build((2, 9), 16, 24, torch.float32, device=device)
    with torch.autocast(kind, torch.bfloat16):
        found = ops.linear_gelu(x, weight, bias)
        assert found.dtype == torch.bfloat16
        assert_like(found, two_steps(x, weight, bias, "none"))


@pytest.mark.filterwarnings("ignore:.*")
def test_compiles(device):
    torch._dynamo.reset()
    function = torch.compile(ops.linear_gelu, backend="eager", fullgraph=True)
    args = build((2, 9), 16, 24, torch.float32, device=device)
    torch.testing.assert_close(function(*args, "tanh"), two_steps(*args, "tanh"))


def polynomial(name: str, terms: int) -> list[float]:
    """One of the host code: the terms of v squared, of exact ones with the last that is added to them."""
    (numbers,) = re.findall(rf"constexpr Gelu<\w+> {name}\{{\s*\{{([^}}]*)\}}\}}", SOURCE.read_text())
    found = [float(n) for n in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?", numbers)]
    return found if len(found) > 2 else [*found, *[0.0] * (terms - 3), -2e-38]


def by_formula(v: Tensor, terms: list[float]) -> Tensor:
    """The gelu() of csrc/activation, step by step in float32."""

    def single(value: Tensor) -> Tensor:
        return value.float().double()

    v = v.double()
    square = single(v * v)
    r = torch.full_like(v, torch.tensor(terms[-1]).item())
    for term in reversed(terms[:-1]):
        r = single(r * square + torch.tensor(term).double())
    return single(v * single(1.0 / single(1.0 + single(torch.exp2(single(v * r)))))).float()


@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_formula(dtype, approximate):
    name = "kTanh" if approximate == "tanh" else "kErfHalf" if dtype is torch.float16 else "kErfBFloat16"
    formula = polynomial(name, 5)
    for lowest, highest in ((1e-6, 1e-2), (1e-2, 1.0), (1.0, 3.0), (3.0, 5.0), (5.0, 10.0), (10.0, 100.0)):
        size = torch.logspace(*torch.tensor([lowest, highest]).log10().tolist(), 20001)
        for v in (size, -size):
            truth = exact_gelu(v, approximate)
            ours = (by_formula(v, formula).to(dtype).double() - truth).abs()
            theirs = (F.gelu(v.to(dtype), approximate=approximate).double() - truth).abs()
            # PyTorch's GELU is zero below -5.5 or so; what is left of ours at -10 is nothing beside anything.
            assert ours.max() <= theirs.max() + 1e-18, (lowest, highest, ours.max(), theirs.max())
            assert ours.mean() <= theirs.mean() + 1e-18, (lowest, highest, ours.mean(), theirs.mean())
    check_limits(formula)


def check_limits(formula: list[float]) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -1e30])
    found = by_formula(special, formula)
    assert found.isnan().tolist() == [True, False, True, *[False] * 4]
    assert found[[1, 3, 4, 5, 6]].tolist() == [torch.inf, 0.0, 0.0, special[5].item(), 0.0]


@pytest.mark.parametrize("kind", ["erf", "tanh", "quick"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_formula_of_rounded_numbers(dtype, kind):
    """Of every number that there is: where PyTorch's two steps are taken the second is as good as PyTorch's."""
    formula = polynomial(f"k{kind.title()}", 7)
    check_limits(formula)
    v = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    v = v[v.isfinite() & (v != 0)]
    if kind == "quick":
        truth, theirs = v.double() * torch.sigmoid(1.702 * v.double()), v.float() * torch.sigmoid(1.702 * v.float())
    else:
        approximate = "tanh" if kind == "tanh" else "none"
        truth, theirs = exact_gelu(v, approximate), F.gelu(v.float(), approximate=approximate)
    ours, theirs = ((t.to(dtype).double() - truth).abs() for t in (by_formula(v, formula), theirs))
    for lowest, highest in ((0.0, 0.1), (0.1, 1.0), (1.0, 3.0), (3.0, 6.0), (6.0, torch.inf)):
        among = (v.abs() >= lowest) & (v.abs() < highest)
        assert ours[among].max() <= 1.1 * theirs[among].max(), (lowest, highest)
        assert ours[among].mean() <= 1.01 * theirs[among].mean(), (lowest, highest)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens on the CPU pass for such on a Hopper GPU."""
    stand_in.choose(monkeypatch)
    monkeypatch.setattr(predicates, "_lacks_hopper", lambda x: None)


@pytest.mark.usefixtures("on_hopper")
def test_what_the_kernel_leaves_to_torch() -> None:
    x, weight, bias = build((2, 512), 24, 16, torch.float16)

    def reason(x: Tensor, weight: Tensor = weight, bias: Tensor | None = bias) -> str:
        with torch.no_grad():
            told = predicates.remark("linear_gelu", x, weight, bias)
        assert told is None or told.startswith("by torch: ")
        return str(told)

    assert reason(x) == reason(x, bias=None) == "None"
    assert reason(x.view(2, 2, 256, 16)) == reason(x.flatten(0, 1)) == "None"
    assert reason(torch.zeros(2, 512, 32).half()[..., :16]) == "None"
    assert reason(x[:1, :1]) == "None"
    assert "float16 and bfloat16, not torch.float32" in reason(x.float(), weight.float(), bias.float())
    assert "a weight and a bias of torch.float16" in reason(x, weight.float())
    assert "a weight and a bias of torch.float16" in reason(x, bias=bias.float())
    assert "multiples of 8 channels, not 16 to 20" in reason(x, weight[:20], bias[:20])
    assert "multiples of 8 channels, not 12 to 24" in reason(x[..., :12], weight[:, :12])
    assert "at even distances" in reason(x.repeat(1, 2, 1)[:, :512])
    assert "at even distances" in reason(torch.zeros(2, 512, 20).half()[..., :16])
    assert "at even distances" in reason(torch.zeros(2, 512, 32).half()[..., ::2])
    assert "a weight without gaps" in reason(x, torch.zeros(24, 32).half()[:, :16])
    weight.requires_grad_()
    assert "backward pass" in str(predicates.without_product(x, weight, bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of opcheck
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("approximate", KINDS)
def test_what_the_operator_gets(approximate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    launch = tome_cuda.ops.launch
    monkeypatch.setattr(tome_cuda.ops, "launch", lambda *args: passed.append(args) or launch(*args))
    x, weight, bias = build((4, 2, 256), 24, 16, torch.bfloat16)
    assert torch.equal(ops.linear_gelu(x, weight, bias, approximate), two_steps(x, weight, bias, approximate))
    ((name, rows, *others),) = passed
    assert name == "linear_gelu"
    assert rows.shape == (1, 2048, 16)
    assert others[0] is weight
    assert others[2:] == [approximate == "tanh", -1]
    leaves = [t.clone().requires_grad_() for t in (rows, weight, bias)]
    operator = tome_cuda.operators().linear_gelu.default
    for args in ((rows, weight, bias), leaves, (rows, weight, None)):
        torch.library.opcheck(operator, (*args, approximate == "tanh", -1))
    leaves = [t.detach().float().requires_grad_() for t in leaves]
    found = torch.autograd.grad(operator(*leaves, approximate == "tanh", -1).sum(), leaves)
    theirs = torch.autograd.grad(two_steps(*leaves, approximate).sum(), leaves)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("on_hopper")
def test_the_operator_in_a_graph() -> None:
    torch._dynamo.reset()
    args = build((2, 512), 24, 16, torch.bfloat16)
    function = torch.compile(ops.linear_gelu, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(function(*args), two_steps(*args, "none"))


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("rows", [9, stand_in.INFO.least_rows])
def test_what_a_half_casts_itself_under_autocast(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and of many rows fc1; the rest is autocast's, which casts a weight once for all passes."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(tome_cuda.ops, "launch", lambda name, *args: seen.extend(args[i].dtype for i in (1, 2, 5)))
    x, fc1, bias = build((1, rows), 24, 16, torch.float32)
    for y in (x, x.half(), x.bfloat16()):
        with torch.no_grad():
            tome_cuda.mlp_half(x, y, (fc1, bias), "erf", (fc1.T.contiguous(), None), None, (None, None, 1e-5), None)
    weight = torch.float32 if rows == 9 else torch.bfloat16
    assert seen == 3 * [torch.bfloat16, weight, torch.float32]
