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
from tome_cuda import fakes, library, predicates, registration
from tome_reference import checks

NAMESPACE = "tome_stand_in"
BINDING = Path(__file__).parents[1] / "cuda_ext" / "csrc" / "binding.cpp"
INFO = library.BuildInfo("here.so", "2.11", "13.2", "4.2.0", ("90a-real",), (32, 64, 72), 256, 1e-30, 3, 1024)


class Halves:
    """In the place of ``tome.ops.one_call``: the halves by the reference, and how often each was asked for."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def one_call(self, half: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        self.taken.append(half.__name__)
        call: Callable[..., Any] = getattr(tome_reference, half.__name__)
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
def install() -> torch.library.Library:
    """Define the operators in a namespace of their own, with the fakes and gradients of ``tome_cuda``, once."""
    defined = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas().items():
        defined.define(schema)
        defined.impl(name, KERNELS[name], "CPU")
    return defined


def use(patch: Any) -> None:
    """Let ``tome_cuda`` call these operators, as long as the monkeypatch holds."""
    is_new = not install.cache_info().currsize
    install()
    patch.setattr(registration, "NAMESPACE", NAMESPACE)
    patch.setattr(registration, "_overload", functools.cache(registration._overload.__wrapped__))
    patch.setattr(library, "_load", lambda: library._Loaded(INFO, None))
    if is_new:
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
    out = a.new_zeros((fakes.slabs(a.shape[0] * a.shape[1], a.shape[2]), 2, a.shape[2]), dtype=torch.float32)
    wide = b.float() if stats is None else (b.float() - stats[:, :, :1]) * stats[:, :, 1:]
    out[0] = torch.stack([a.float().sum((0, 1)), (a.float() * wide).sum((0, 1))])
    return out


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
}
