"""The gradient of attention by its own kernels: their source on a CPU, and on a GPU agreement with float64, the same
bits, graphs, compilation, registration.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_emulator as emulator
import emulated
import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from cuda_emulator.guard import at_the_end
from gpu import assert_replays, assert_same_bits, compiled, generator
from hypothesis import given
from hypothesis import strategies as st
from judge import ROUNDING, error
from strategies import HEAD_DIMS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tome
import tome_cuda
import tome_reference
from tome_cuda import registration

EMULATED = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
SOME_LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 79)
WHOLE, STREAMED = emulator.Plan(), emulator.Plan(is_streamed=True)
SIZES = ("none", "ones", "small", "large", "some zero", "padding")
PADDING = 2.0**-100  # what takes the weight of padding, with a logarithm all the same


class Drawn(NamedTuple):
    """[B, H, N, D] each, with sizes [B, N] of the keys and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    size: Tensor | None
    grad: Tensor


def build(shape: tuple[int, ...], kind: str, dtype: torch.dtype, packed: bool, seed: int, device: str) -> Drawn:
    batch, heads, queries, keys, d = shape
    random = torch.Generator(device).manual_seed(seed)
    rows = max(queries, keys)
    qkv = torch.randn(batch, rows, 3, heads, d, device=device, generator=random).to(dtype).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0][:, :, :queries], qkv[1][:, :, :keys], qkv[2][:, :, :keys]
    grad = torch.randn(batch, queries, heads, d, device=device, generator=random).to(dtype).transpose(1, 2)
    if not packed:
        q, k, v, grad = (t.contiguous() for t in (q, k, v, grad))
    size = None if kind == "none" else torch.ones(batch, keys, device=device)
    if size is not None and kind != "ones":
        most = 300 if kind == "large" else 9
        size = torch.randint(1, most, (batch, keys), device=device, generator=random).float()
        if kind in ("some zero", "padding"):
            size[:, 1::2] = 0.0 if kind == "some zero" else PADDING
    return Drawn(q, k, v, size, grad)


def explicit(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of q, and the log-sum-exp of every row."""
    score = q @ k.transpose(-2, -1) * scale
    if size is not None:
        score = score + size.log().to(q.dtype)[:, None, None, :]
    return score.softmax(-1) @ v, score.logsumexp(-1)


def truth(drawn: Drawn, scale: float) -> tuple[list[Tensor], Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in drawn[:3]]
    with torch.enable_grad():
        out, lse = explicit(*leaves, None if drawn.size is None else drawn.size.double(), scale)
        return list(torch.autograd.grad(out, leaves, drawn.grad.double())), lse.detach()


def as_heads(made: tuple[Tensor, Tensor], drawn: Drawn) -> list[Tensor]:
    """What the operator returns, as gradients of q, k and v."""
    grad_q, packed = made
    batch, heads, keys, d = drawn.k.shape
    grads = packed.view(batch, keys, packed.shape[2] // (heads * d), heads, d).permute(2, 0, 3, 1, 4).unbind()
    return [grad_q.view(batch, -1, heads, d).transpose(1, 2), *grads] if len(grads) == 2 else list(grads)


def run_emulated(drawn: Drawn, scale: float, seed: int, plan: emulator.Plan) -> tuple[list[Tensor], Tensor]:
    *heads, size, grad = drawn
    out, lse = emulator.run("attention_training", *heads, size, scale, seed=seed, plan=plan)
    rest = (*heads, out.transpose(1, 2), lse, size, scale)
    return as_heads(emulator.run("attention_backward", grad, *rest, seed=seed, plan=plan), drawn), lse


@EMULATED
@given(
    *(st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.sampled_from(SOME_LENGTHS)),
    *(st.one_of(st.none(), st.sampled_from(SOME_LENGTHS)), st.sampled_from(HEAD_DIMS), st.sampled_from(SIZES)),
    *(st.sampled_from([torch.float16, torch.bfloat16]), st.booleans(), st.sampled_from([WHOLE, STREAMED])),
    *(st.sampled_from([0.125, 0.5]), st.integers(0, 2**31 - 1)),
)
def test_the_kernels_source_agrees_with_float64(
    batch: int, heads: int, keys: int, queries: int | None, d: int, kind: str, dtype: torch.dtype, packed: bool,
    plan: emulator.Plan, scale: float, seed: int,
) -> None:  # fmt: skip
    drawn = build((batch, heads, queries or keys, keys, d), kind, dtype, packed, seed, "cpu")
    drawn = Drawn(*(None if t is None else at_the_end(t) for t in drawn))
    grads, lse = run_emulated(drawn, scale, seed, plan)
    exact, exact_lse = truth(drawn, scale)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    largest = max(float(t.abs().max()) for t in exact)
    for ours, wanted in zip(grads, exact, strict=True):
        assert error(ours, wanted) <= 8 * ROUNDING[dtype] * max(largest, 1.0)


@EMULATED
@pytest.mark.parametrize("plan", [WHOLE, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize(("keys", "d"), [(197, 64), (256, 64), (250, 80), (270, 80), (120, 128)])
def test_many_warps_and_several_blocks(keys: int, d: int, plan: emulator.Plan) -> None:
    """The most keys of a block, more than that, and rows that start anywhere."""
    drawn = build((1, 1, 133, keys, d), "small", torch.float16, True, d, "cpu")
    k, grad = (torch.cat([t, t[..., :1]], dim=-1)[..., :d] for t in (drawn.k, drawn.grad))
    drawn = drawn._replace(k=k, grad=grad)
    for ours, wanted in zip(run_emulated(drawn, 0.2, 5, plan)[0], truth(drawn, 0.2)[0], strict=True):
        assert error(ours, wanted) <= 8 * ROUNDING[torch.float16] * float(wanted.abs().max())


@EMULATED
def test_the_order_of_threads_changes_no_bit() -> None:
    drawn = build((1, 2, 70, 70, 64), "small", torch.float16, True, 1, "cpu")
    for plan in (WHOLE, STREAMED):
        first, *others = (run_emulated(drawn, 0.1, seed, plan)[0] for seed in range(4))
        assert all(all(map(torch.equal, first, other)) for other in others)


@EMULATED
def test_no_key_that_counts_gives_nan() -> None:
    drawn = build((2, 1, 20, 20, 64), "ones", torch.float16, True, 2, "cpu")
    drawn.size[0] = 0.0
    for plan in (WHOLE, STREAMED):
        for grad in run_emulated(drawn, 0.1, 0, plan)[0]:
            assert bool(grad[0].isnan().all())
            assert bool(grad[1].isfinite().all())


@EMULATED
@pytest.mark.parametrize("gpu", [emulator.HOPPER, emulator.SMALL], ids=["9.0", "8.6"])
def test_launches(gpu: emulator.Gpu) -> None:
    """One where a block holds all keys of a head, else two."""
    counts = {}
    for n in (16, 128, 197, 256, 300, 1000):
        q = torch.empty(2, 3, n, 64, dtype=torch.float16)
        rest = (torch.empty(2, 3, n), None, 0.1)
        counts[n] = emulator.planned("attention_backward", q, q, q, q, q, *rest, gpu=gpu)
    whole = (16, 128, 197, 256) if gpu is emulator.HOPPER else (16,)
    assert {n for n, launches in counts.items() if launches == 1} >= set(whole)
    assert counts[300] == counts[1000] == 2


@EMULATED
@pytest.mark.parametrize("queries", [9, 5])
def test_gradients_flow_where_they_are_wanted(queries: int) -> None:
    """Through autograd: each of q, k and v alone; a gradient without strides; an output that is not transposed back."""
    drawn = build((2, 3, queries, 9, 32), "small", torch.float16, True, 3, "cpu")
    exact, _ = truth(drawn._replace(grad=torch.ones_like(drawn.grad)), 32**-0.5)
    for wanted in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
        heads = [t.detach().clone() for t in drawn[:3]]
        with emulated.chosen(), torch.enable_grad():
            for i in wanted:
                heads[i].requires_grad_()
            tome.ops.attention(*heads, drawn.size).float().sum().backward()
        for i, head in enumerate(heads):
            assert (head.grad is not None) == (i in wanted)
            if head.grad is not None:
                assert error(head.grad, exact[i]) <= 8 * ROUNDING[torch.float16] * max(float(exact[i].abs().max()), 1)


@EMULATED
def test_a_second_derivative_is_refused_by_name() -> None:
    drawn = build((1, 2, 9, 9, 32), "small", torch.float16, True, 4, "cpu")
    with emulated.chosen(), torch.enable_grad():
        q = drawn.q.detach().requires_grad_()
        (grad,) = torch.autograd.grad(tome.ops.attention(q, drawn.k, drawn.v).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="attention has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("module", [tome_cuda, tome_reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_counts_sizes_exactly_too(dtype: torch.dtype, module: object) -> None:
    """Equal scores: a key's weight is its share of all sizes. In bfloat16 log 173 is off by 1 %."""
    size = torch.tensor([[173.0, 1.0, 211.0, PADDING, 0.0]])
    q = torch.zeros(1, 1, 5, 40, dtype=dtype)  # a head dimension without a kernel
    v = F.pad(torch.eye(5), (0, 35))[None, None].to(dtype)
    for scale in (None, 0.3, 1e-6, 7.0):
        out = module.attention(q, q, v, size, scale) if module is tome_reference else by_torch(q, q, v, size, scale)
        torch.testing.assert_close(out[0, 0, 0, :5].float(), size[0] / size.sum(), rtol=2 * ROUNDING[dtype], atol=1e-7)


def by_torch(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float | None) -> Tensor:
    return tome_cuda.by_torch.attention(q, k, v, size, scale, 0.0)


# On a GPU.

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
LENGTHS = st.one_of(st.sampled_from((*SOME_LENGTHS, 101, 149, 197, 208, 255, 256, 257, 377, 577)), st.integers(1, 900))


def gradients(module: object, drawn: Drawn, scale: float | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in drawn[:3]]
    with torch.enable_grad():
        return list(torch.autograd.grad(module.attention(*leaves, drawn.size, scale), leaves, drawn.grad))


def by_mathematics(drawn: Drawn, scale: float) -> list[Tensor]:
    """torch's own derivative of the definition, in the dtype of q."""
    leaves = [t.detach().requires_grad_() for t in drawn[:3]]
    with torch.enable_grad():
        return list(torch.autograd.grad(explicit(*leaves, drawn.size, scale)[0], leaves, drawn.grad))


@NO_EXTENSION
@given(
    *(st.sampled_from([1, 2, 16]), st.sampled_from([1, 3, 12]), LENGTHS, st.one_of(st.none(), LENGTHS)),
    *(st.sampled_from(HEAD_DIMS), st.sampled_from(SIZES), DTYPES, st.booleans()),
    *(st.sampled_from([None, 0.05, 0.5]), st.integers(0, 2**31 - 1)),
)
def test_agrees_with_float64(
    batch: int, heads: int, keys: int, queries: int | None, d: int, kind: str, dtype: torch.dtype, packed: bool,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    """No further off than torch's own derivative of the definition in the same dtype, but for a rounding."""
    batch = max(1, min(batch, 3_000_000 // (max(keys, queries or 1) * heads * d)))
    drawn = build((batch, heads, queries or keys, keys, d), kind, dtype, packed, seed, "cuda")
    factor = d**-0.5 if scale is None else scale
    exact, _ = truth(drawn, factor)
    floor = 2 * ROUNDING[dtype] * max(float(t.abs().max()) for t in exact)  # of one key dq is zero
    for ours, plain, wanted in zip(
        gradients(tome_cuda, drawn, scale), by_mathematics(drawn, factor), exact, strict=True
    ):
        assert (ours.shape, ours.dtype) == (wanted.shape, dtype)
        assert error(ours, wanted) <= error(plain, wanted) + floor


@NO_EXTENSION
@given(LENGTHS, st.sampled_from(HEAD_DIMS), st.sampled_from(SIZES), DTYPES, st.integers(0, 2**31 - 1))
def test_log_sum_exps_of_every_forward_kernel(n: int, d: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    """And the output has the bits that the operator for inference gives."""
    drawn = build((2, 3, n, n, d), kind, dtype, True, seed, "cuda")
    arguments = (*drawn[:4], 0.11)
    out, lse = tome_cuda.operators().attention_training(*arguments)
    assert torch.equal(out, tome_cuda.operators().attention(*arguments))
    torch.testing.assert_close(lse.double(), truth(drawn, 0.11)[1], rtol=1e-5, atol=2e-4)


def layer(b: int, n: int, heads: int, d: int) -> Drawn:
    return build((b, heads, n, n, d), "small", torch.float16, True, n, "cuda")


SHAPES = pytest.mark.parametrize("shape", [(64, 11, 12, 64), (4, 197, 12, 64), (2, 577, 16, 64), (2, 257, 16, 80)])


@NO_EXTENSION
@SHAPES
def test_the_same_bits_again_and_on_two_streams(shape: tuple[int, ...]) -> None:
    drawn = layer(*shape)
    out, lse = tome_cuda.operators().attention_training(*drawn[:4], 0.1)
    rest = (*drawn[:3], out.transpose(1, 2), lse, drawn.size, 0.1)
    assert_same_bits(lambda: registration.launch("attention_backward", drawn.grad, *rest))


@NO_EXTENSION
@SHAPES
def test_a_graph_replays_on_new_inputs(shape: tuple[int, ...]) -> None:
    drawn = layer(*shape)
    others = build((shape[0], shape[2], shape[1], shape[1], shape[3]), "large", torch.float16, True, 99, "cuda")

    def call() -> tuple[Tensor, ...]:
        operators = tome_cuda.operators()
        out, lse = operators.attention_training(*drawn[:4], 0.1)
        made = operators.attention_backward(drawn.grad, *drawn[:3], out.transpose(1, 2), lse, drawn.size, 0.1)
        return out, lse, made[1]

    assert_replays(call, drawn, others)


@NO_EXTENSION
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 17, 63, 197, 270])
def test_reads_nothing_else(n: int, d: int) -> None:
    """NaN around the inputs never shows."""
    wide = torch.full((2, n + 40, 4, 3, d), torch.nan, device="cuda", dtype=torch.float16)
    wide[:, 20 : 20 + n] = torch.randn(2, n, 4, 3, d, device="cuda", generator=generator(n)).half()
    q, k, v, grad = wide[:, 20 : 20 + n].permute(2, 0, 3, 1, 4)
    drawn = Drawn(q, k, v, None, grad)
    for ours, wanted in zip(gradients(tome_cuda, drawn, None), truth(drawn, d**-0.5)[0], strict=True):
        assert error(ours, wanted) <= 16 * ROUNDING[torch.float16] * max(float(wanted.abs().max()), 1.0)


@NO_EXTENSION
@pytest.mark.parametrize("n", [37, 300])
@pytest.mark.parametrize("queries", [37, 20])
@pytest.mark.parametrize("sized", [False, True])
def test_opcheck(n: int, queries: int, sized: bool) -> None:
    drawn = build((2, 3, queries, n, 64), "small" if sized else "none", torch.float16, True, 0, "cuda")
    leaves = [t.detach().requires_grad_() for t in drawn[:3]]
    operators = tome_cuda.operators()
    tolerances = {"atol": 2e-2, "rtol": 2e-2}
    torch.library.opcheck(operators.attention_training.default, (*leaves, drawn.size, 0.125), **tolerances)
    out, lse = operators.attention_training(*drawn[:4], 0.125)
    rest = (*drawn[:3], out.transpose(1, 2), lse, drawn.size, 0.125)
    torch.library.opcheck(operators.attention_backward.default, (drawn.grad, *rest), **tolerances)


@NO_EXTENSION
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_compiled_step_has_the_gradient_of_an_eager_one() -> None:
    def block(qkv: Tensor, size: Tensor) -> Tensor:
        q, k, v = (qkv * 2).permute(2, 0, 3, 1, 4)
        return tome_cuda.attention(q, k, v, size).transpose(1, 2).reshape(4, 197, -1).relu()

    function = compiled(block)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.enable_grad():
        for seed in range(4):
            random = generator(seed)
            qkv = torch.randn(4, 197, 3, 3, 64, device="cuda", generator=random).half().requires_grad_()
            size = torch.randint(1, 9, (4, 197), device="cuda", generator=random).float()
            out = function(qkv, size).clone()
            (ours,) = torch.autograd.grad(out, qkv, out.detach())
            (eager,) = torch.autograd.grad(block(qkv, size), qkv, out.detach())
            torch.testing.assert_close(ours, eager, rtol=2e-3, atol=2e-3 * float(eager.abs().max()))


@NO_EXTENSION
def test_a_model_in_training_uses_the_kernels() -> None:
    drawn = layer(2, 197, 3, 64)
    with tome.use_backend("cuda"), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in drawn[:3]]
        out = tome.ops.attention(*leaves, drawn.size)
        assert "attention_training" in str(out.grad_fn.next_functions[0][0].name())
        checkpointed = checkpoint(tome.ops.attention, *leaves, drawn.size, use_reentrant=False)
        first = torch.autograd.grad(out, leaves, drawn.grad)
        again = torch.autograd.grad(checkpointed, leaves, drawn.grad)
    assert all(map(torch.equal, first, again))
