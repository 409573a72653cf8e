"""Operators for a CPU under the schemas of csrc/binding.cpp, computed by the reference.

With them everything of ``tome_cuda`` that is Python runs where there is no GPU and no library: torch's dispatcher holds
what its callers pass against the schemas, and its fakes and gradients are held against real results.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tome_reference
from tome import backend
from tome_cuda import library, predicates, registration
from tome_reference import checks

NAMESPACE = "tome_stand_in"
BINDING = Path(__file__).parents[1] / "cuda_ext" / "csrc" / "binding.cpp"
INFO = library.BuildInfo("here.so", "2.11", "13.2", "4.2.0", ("90a-real",), (32, 64, 72), 256, 1e-30, 3, 1024)


class Halves:
    """In the place of ``tome.ops.one_call``: the halves by the reference, and how often each was asked for."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def one_call(self, half: str, *args: Any) -> Callable[..., Any]:
        self.taken.append(half)
        call: Callable[..., Any] = getattr(tome_reference, half)
        return call

    def counts(self) -> tuple[int, int]:
        counts = self.taken.count("attend_half"), self.taken.count("mlp_half")
        self.taken.clear()
        return counts


@functools.cache
def schemas() -> dict[str, str]:
    """Every schema of csrc/binding.cpp by the name of its operator."""
    found = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\s*\)", BINDING.read_text())
    texts = ["".join(re.findall(r'"([^"]*)"', literals)) for literals in found]
    return {text.partition("(")[0]: text for text in texts}


@functools.cache
def install(namespace: str = NAMESPACE) -> torch.library.Library:
    """Define the operators in a namespace of their own, once."""
    defined = torch.library.Library(namespace, "DEF")
    for name, schema in schemas().items():
        defined.define(schema)
        defined.impl(name, KERNELS[name], "CPU")
    return defined


def use(patch: Any) -> None:
    """Let ``tome_cuda`` call these operators, as long as the monkeypatch holds."""
    install()
    patch.setattr(registration, "NAMESPACE", NAMESPACE)
    patch.setattr(registration, "_overload", functools.cache(registration._overload.__wrapped__))
    patch.setattr(library, "_load", lambda: library._Loaded(INFO, None))
    registration._register.__wrapped__()
    patch.setattr(registration, "_register", lambda: True)


def choose(patch: Any) -> None:
    """Let ``tome.ops`` choose them, for tokens on the CPU, as it would choose the kernels for tokens on a GPU."""
    use(patch)
    patch.setattr(backend, "extension_problem", lambda: None)
    patch.setattr(predicates, "_lacks", lambda tensor: None)
    patch.setattr(backend._thread, "name", "cuda")


def _spread(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor | None) -> Tensor:
    rows = grad.float().gather(1, slot.long()[:, :, None].expand(-1, -1, grad.shape[2]))
    if total is None:
        return rows.to(grad.dtype)
    share = (torch.ones_like(slot) if size is None else size) / total.gather(1, slot.long())
    return (rows * share[:, :, None]).to(grad.dtype)


def _unmerge_backward(grad: Tensor, slot: Tensor, tokens: int) -> Tensor:
    sums = grad.new_zeros(grad.shape[0], tokens, grad.shape[2], dtype=torch.float32)
    return sums.scatter_add(1, slot.long()[:, :, None].expand_as(grad), grad.float()).to(grad.dtype)


def _rotate(
    q: Tensor, k: Tensor, table: Tensor, home: Tensor | None, prefix: int, is_half: bool, is_back: bool
) -> tuple[Tensor, ...]:
    if is_back:
        sin, cos = table.chunk(2, dim=-1)
        sin = sin.roll(q.shape[3] // 2, -1) if is_half else sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        table = torch.cat([-sin, cos], dim=-1)
    found = tome_reference.rotate(q, k, table, home, prefix, is_half)
    return tuple(x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in found)


def _pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None) -> Tensor:
    mask = tome_reference.pair_bias(bias, home, key_bias)
    return F.pad(mask, (0, -home.shape[1] % 8))


def _merge_add_norm(x: Tensor, branch: Tensor | None, slot: Tensor | None, tokens: int, *others: Any) -> Any:
    size, weight, bias, eps, gamma, norm_dtype, training = others
    out, y, total = tome_reference.merge_add_norm(x, branch, slot, tokens, size, weight, bias, eps, gamma, norm_dtype)
    wide = out.float()
    stats = torch.stack([wide.mean(2), (wide.var(2, correction=0) + eps).rsqrt()], dim=2)
    return (
        x.new_empty(0, tokens, x.shape[2]) if branch is None else out,
        y,
        x.new_empty(0, tokens, dtype=torch.float32) if slot is None else total,
        stats if training else stats[:0].clone(),
    )


def _merge_add_norm_backward(
    grad_x: Tensor | None, grad_y: Tensor | None, merged: Tensor, stats: Tensor, slot: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    size, total, weight, gamma, length, branch_dtype = others
    assert merged.is_contiguous()
    grad = torch.zeros_like(merged, dtype=torch.float32) if grad_x is None else grad_x.float()
    if grad_y is not None:
        mean, scale = stats.unbind(2)
        normed = (merged - mean[:, :, None]) * scale[:, :, None]
        inner = grad_y.float() * (1.0 if weight is None else weight.float())
        along = (inner * normed).mean(2, keepdim=True)
        grad = grad + scale[:, :, None] * (inner - inner.mean(2, keepdim=True) - normed * along)
    if slot is not None:
        grad = _spread(grad, slot, size, total)
    assert grad.shape[1] == length
    x = grad.to(merged.dtype)
    if gamma is None and branch_dtype == merged.dtype:
        return x, x.new_empty(0, length, x.shape[2])
    return x, (grad * (1.0 if gamma is None else gamma.float())).to(branch_dtype)


def _column_sums(a: Tensor, b: Tensor, stats: Tensor | None) -> Tensor:
    wide = b.float() if stats is None else (b.float() - stats[:, :, :1]) * stats[:, :, 1:]
    return torch.stack([a.float().sum((0, 1)), (a.float() * wide).sum((0, 1))])


def _attend_half(x: Tensor, qkv: list[Tensor], heads: int, *others: Any) -> Any:
    size, slot, tokens, prefix, is_weighted, scale, *others = others
    qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, norm_weight, norm_bias, eps, norm_dtype = others
    linear = None if qkv_weight is None else (qkv_weight, qkv_bias)
    out, y, total, made = tome_reference.attend_half(
        *(x, qkv, heads, size, slot, tokens, prefix, is_weighted, scale, linear, (proj_weight, proj_bias)),
        *(gamma, (norm_weight, norm_bias, eps), norm_dtype),
    )
    n = x.shape[1]
    merges = made is not None
    is_new = merges and slot is None
    return (
        *(out, y, total if merges else x.new_empty(0, tokens, dtype=torch.float32)),
        made if is_new else x.new_empty(0, n, dtype=torch.int32),
    )


def _mlp_half(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    fc1_weight, fc1_bias, gelu, fc2_weight, fc2_bias, gamma, norm_weight, norm_bias, eps, norm_dtype = others
    layers = ((fc1_weight, fc1_bias), checks.GELUS[gelu], (fc2_weight, fc2_bias))
    return tome_reference.mlp_half(x, y, *layers, gamma, (norm_weight, norm_bias, eps), norm_dtype)


def _weights(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Of each query the weights of all keys, and the logarithm of what they were divided by."""
    score = q.float() @ k.float().transpose(-2, -1) * scale
    if size is not None:
        score = score + size.log()[:, None, None, :]
    return score.softmax(-1), score.logsumexp(-1)


def _attention_training(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out = tome_reference.attention(q, k, v, size, scale).transpose(1, 2).contiguous()
    return out, _weights(q, k, size, scale)[1]


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    weights, grad = _weights(q, k, size, scale)[0], grad.float()
    slopes = weights * (grad @ v.float().transpose(-2, -1) - (grad * out.float()).sum(-1, keepdim=True)) * scale
    grads = (slopes @ k.float(), slopes.transpose(-2, -1) @ q.float(), weights.transpose(-2, -1) @ grad)
    rows = [g.to(q.dtype).transpose(1, 2).flatten(2) for g in grads]
    if q.shape[2] == k.shape[2]:
        return rows[0].new_empty(0, *rows[0].shape[1:]), torch.cat(rows, dim=2)
    return rows[0].contiguous(), torch.cat(rows[1:], dim=2)


def _cast(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
    """What has another dtype in one tensor, and each parameter as it is computed with."""
    flat = [p.to(dtype).flatten() for p in parameters if p is not None and p.dtype is not dtype]
    cast = torch.cat([F.pad(p, (0, -p.numel() % 64)) for p in flat]) if flat else None
    return cast, [None if p is None else p.to(dtype) for p in parameters]


def _uncast(cast: Tensor | None, at: int, weight: Tensor | None, rows: int, columns: int) -> tuple[Tensor, int]:
    """A weight, which may lie among those that were cast, and where the next one does."""
    if weight is not None:
        return weight, at
    assert cast is not None
    count = rows * columns
    return cast[at : at + count].view(rows, columns), at + count + -count % 64


def _dropped(branch: Tensor, drop: Tensor | None) -> Tensor:
    return branch if drop is None else branch * drop[:, None, None].to(branch.dtype)


def _attend_half_training(x: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, *others: Any) -> Any:
    qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, norm_weight, norm_bias, size, slot, drop, *others = others
    heads, tokens, prefix, is_weighted, scale, eps, norm_dtype, dtype, keeps_branch = others
    parameters = (qkv_weight, proj_weight, qkv_bias, proj_bias)
    cast, (first, second, first_bias, second_bias) = _cast(dtype, *parameters)
    packed = None if first is None else F.linear(q.to(dtype), first, first_bias)
    if k is None:
        q, k, v = registration.split_packed(q if packed is None else packed, heads)
    seen, lse = _attention_training(q, k, v, size if is_weighted else None, scale)
    made = tome_reference.match(k, x.shape[1] - tokens, prefix) if slot is None and tokens < x.shape[1] else None
    branch = _dropped(F.linear(seen.flatten(2).to(dtype), second, second_bias), drop)
    used = slot if made is None else made
    norm = (norm_weight, norm_bias, eps, gamma, norm_dtype, True)
    out, y, total, stats = _merge_add_norm(x, branch, used, tokens, size, *norm)
    total = None if used is None else total
    return out, y, total, made, stats, packed, seen, lse, cast, branch if keeps_branch else None


def _mlp_half_training(x: Tensor, y: Tensor, *others: Any) -> Any:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, norm_weight, norm_bias, drop, *others = others
    gelu, eps, norm_dtype, dtype, keeps_branch = others
    cast, (first, second, first_bias, second_bias) = _cast(dtype, fc1_weight, fc2_weight, fc1_bias, fc2_bias)
    hidden = F.linear(y.to(dtype), first, first_bias)
    active = _gelu(hidden, gelu)
    branch = _dropped(F.linear(active, second, second_bias), drop)
    norm = (norm_weight, norm_bias, eps, gamma, norm_dtype, True)
    out, y, _, stats = _merge_add_norm(x, branch, None, x.shape[1], None, *norm)
    return out, y, stats, hidden, active, cast, branch if keeps_branch else None


def _gelu(hidden: Tensor, kind: int) -> Tensor:
    if kind == 2:
        return tome_reference.quick_gelu(hidden).contiguous()
    return F.gelu(hidden, approximate="tanh" if kind else "none")


class _Backward:
    """What both halves do on the way back."""

    def __init__(self, grad_y: Tensor | None, wanted: int) -> None:
        self.grad_y, self.wanted, self.vectors = grad_y, wanted, []

    def wants(self, place: int) -> int:
        return self.wanted >> place & 1

    def ends(self, grad_x: Tensor | None, saved: tuple[Any, ...], branch: Tensor | None, *others: Any) -> Any:
        drop, length, dtype = others
        merged, stats, *_, gamma = saved
        x, other = _merge_add_norm_backward(grad_x, self.grad_y, *saved, length, dtype)
        if self.grad_y is not None:
            sums = _column_sums(self.grad_y, merged, stats)
            self.vectors += [sums[i] for i, place in enumerate((6, 5)) if self.wants(place)]
        if self.wants(4):
            self.vectors.append(_column_sums(x, branch, None)[1])
        return x, _dropped(x if gamma is None and dtype == merged.dtype else other, drop)

    def linear(self, grad: Tensor, x: Tensor, weight: Tensor, given: Tensor | None, place: int) -> Any:
        rows = grad.flatten(0, 1)
        if self.wants(place + 1):
            self.vectors.append(rows.sum(0, dtype=torch.float32))
        dtype = torch.float32 if given is None else grad.dtype
        of_weight = (rows.T.to(dtype) @ x.flatten(0, 1).to(dtype)) if self.wants(place) else None
        return grad @ weight, of_weight

    def sums(self) -> Tensor | None:
        return torch.cat(self.vectors) if self.vectors else None


def _attend_half_backward(grad_x: Tensor | None, grad_y: Tensor | None, *others: Any) -> Any:
    *saved, branch, drop, cast, qkv_weight, proj_weight, y, q, k, v, seen, lse = others[:18]
    heads, length, is_weighted, scale, wanted = others[18:]
    back, width = _Backward(grad_y, wanted), seen.shape[2] * seen.shape[3]
    at = 0
    if y is not None:
        first, at = _uncast(cast, at, qkv_weight, 3 * width, y.shape[2])
    second, _ = _uncast(cast, at, proj_weight, saved[0].shape[2], width)
    x, into = back.ends(grad_x, tuple(saved), branch, drop, length, second.dtype)
    into, of_proj = back.linear(into, seen.flatten(2).to(second.dtype), second, proj_weight, 2)
    q, k, v = registration.split_packed(q, heads) if k is None else (q, k, v)
    grad = into.to(seen.dtype).unflatten(2, (heads, -1)).transpose(1, 2)
    size = saved[3] if is_weighted else None
    packed = _attention_backward(grad, q, k, v, seen.transpose(1, 2), lse, size, scale)[1]
    of_qkv = None
    if y is not None:
        packed, of_qkv = back.linear(packed, y.to(packed.dtype), first, qkv_weight, 0)
    return x, packed, of_qkv, of_proj, back.sums()


def _mlp_half_backward(grad_x: Tensor | None, grad_y: Tensor | None, *others: Any) -> Any:
    merged, stats, norm_weight, gamma, branch, drop, cast, fc1_weight, fc2_weight, y, hidden, active, *others = others
    gelu, wanted = others
    back, width = _Backward(grad_y, wanted), hidden.shape[2]
    first, at = _uncast(cast, 0, fc1_weight, width, y.shape[2])
    second, _ = _uncast(cast, at, fc2_weight, merged.shape[2], width)
    saved = (merged, stats, None, None, None, norm_weight, gamma)
    x, into = back.ends(grad_x, saved, branch, drop, merged.shape[1], hidden.dtype)
    into, of_fc2 = back.linear(into, active, second, fc2_weight, 2)
    if gelu == 2:
        share = torch.sigmoid(1.702 * hidden)
        into = into * (share + 1.702 * hidden * share * (1 - share))
    else:
        into = torch.ops.aten.gelu_backward(into, hidden, approximate="tanh" if gelu else "none")
    into, of_fc1 = back.linear(into, y.to(hidden.dtype), first, fc1_weight, 0)
    return x, into, of_fc1, of_fc2, back.sums()


KERNELS: dict[str, Callable[..., Any]] = {
    "bipartite_match": tome_reference.match,
    "kth_match": tome_reference.kth_match,
    "listed_match": tome_reference.set_match,
    "merge": tome_reference.merge,
    "merge_backward": _spread,
    "unmerge": lambda x, slot: _spread(x, slot, None, None),
    "unmerge_backward": _unmerge_backward,
    "follow": lambda steps: tome_reference.follow(steps).clone(),
    "restore": tome_reference.restore,
    "rotate": _rotate,
    "homes": tome_reference.homes,
    "pair_bias": _pair_bias,
    "quick_gelu": lambda x: tome_reference.quick_gelu(x).contiguous(),
    "swiglu": lambda gate, x: tome_reference.swiglu(gate, x).contiguous(),
    "swiglu_norm": lambda *args: tome_reference.swiglu_norm(*args).contiguous(),
    "linear_product": F.linear,
    "linear_gelu": lambda x, weight, bias, is_tanh, tile: tome_reference.linear_gelu(
        x, weight, bias, "tanh" if is_tanh else "none"
    ),
    "attention": lambda q, k, v, size, scale: (
        tome_reference.attention(q, k, v, size, scale).transpose(1, 2).contiguous()
    ),
    "attention_training": _attention_training,
    "attention_backward": _attention_backward,
    "merge_add_norm": _merge_add_norm,
    "merge_add_norm_backward": _merge_add_norm_backward,
    "column_sums": _column_sums,
    "attend_half": _attend_half,
    "mlp_half": _mlp_half,
    "attend_half_training": _attend_half_training,
    "attend_half_backward": _attend_half_backward,
    "mlp_half_training": _mlp_half_training,
    "mlp_half_backward": _mlp_half_backward,
}
