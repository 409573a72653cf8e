"""The operations on top of the kernels. Each is what ``tome_reference`` says of its namesake.

Arguments are checked there too, by whoever calls (:mod:`tome.ops`): here they meet the operators' own checks, which are
fast and brief, and what can't be computed by a kernel is for :func:`tome_cuda.why_not` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import by_torch, library, predicates, training
from .predicates import Linear, Norm
from .registration import _unmerge_context, _unmerge_grad, launch

GELUS = {"erf": 0, "tanh": 1, "quick": 2}
S = TypeVar("S", Tensor, "Tensor | None")


def max_r(n: int, prefix: int) -> int:
    return (n - prefix) // 2


def match(keys: Tensor, r: int, prefix: int = 1) -> Tensor:
    r = min(r, max_r(keys.shape[-2], prefix))
    if r == 0:
        return _identity(keys)
    return launch("bipartite_match", keys.detach(), r, prefix)  # type: ignore[no-any-return]


def kth_match(keys: Tensor, k: int, prefix: int = 1) -> Tensor:
    k = min(k, keys.shape[-2] - prefix)
    if k <= 1:
        return _identity(keys)
    return launch("kth_match", keys.detach(), k, prefix)  # type: ignore[no-any-return]


def random_match(keys: Tensor, r: int, prefix: int = 1, generator: torch.Generator | None = None) -> Tensor:
    batch, n = keys.shape[0], keys.shape[-2]
    r = min(r, max_r(n, prefix))
    if r == 0:
        return _identity(keys)
    drawn = torch.rand(batch, n - prefix, dtype=torch.float32, device=keys.device, generator=generator).argsort(dim=1)
    sources = prefix + drawn[:, :r]
    targets = prefix + drawn[:, r:].sort(dim=1).values
    return launch(  # type: ignore[no-any-return]
        "listed_match", keys.detach(), sources.contiguous(), targets.contiguous(), r, prefix
    )


def set_match(keys: Tensor, sources: Tensor, targets: Tensor, r: int, prefix: int = 0) -> Tensor:
    r = min(r, sources.shape[1]) if targets.shape[1] else 0
    if r == 0:
        return _identity(keys)
    # The kernel makes addresses of what nobody has looked at.
    sources, targets = (t.clamp(prefix, keys.shape[-2] - 1).contiguous() for t in (sources, targets))
    return launch("listed_match", keys.detach(), sources, targets, r, prefix)  # type: ignore[no-any-return]


def merge(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    merged, total = launch("merge", x, slot, tokens, _constant(size))
    return merged, _constant(total)


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    return launch("unmerge", x, slot)  # type: ignore[no-any-return]


def follow(steps: Sequence[Tensor]) -> Tensor:
    if not torch.compiler.is_compiling():
        return steps[0] if len(steps) == 1 else launch("follow", steps)
    slot = steps[0]
    for step in steps[1:]:
        slot = step.gather(1, slot.long())
    return slot


def restore(x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None = None) -> Tensor:
    if branch is None and not steps:
        return x
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not (torch.is_grad_enabled() and _requires_grad(x, branch, gamma)):
        return launch("restore", x, branch, steps, gamma)  # type: ignore[no-any-return]
    if branch is not None:
        x = x + (branch if gamma is None else branch * gamma).to(x.dtype)
    if not steps:
        return x
    return _Spread.apply(x, follow(steps)) if is_compiling else unmerge(x, follow(steps))


class _Spread(torch.autograd.Function):
    """An unmerge that torch.compile fuses with what stands around it.

    Inductor of torch 2.11 writes out all that an operator new to it is computed from, every path to the image one by
    one: behind the twelfth block that takes it longer than anyone waits.
    """

    backward, setup_context = staticmethod(_unmerge_grad), staticmethod(_unmerge_context)

    @staticmethod
    def forward(x: Tensor, slot: Tensor) -> Tensor:
        return x.gather(1, slot.long()[:, :, None].expand(-1, -1, x.shape[2]))


def rotate(
    q: Tensor, k: Tensor, table: Tensor, home: Tensor | None = None, prefix: int = 0, is_half: bool = False
) -> tuple[Tensor, Tensor]:
    q, k = launch("rotate", q, k, table, home, prefix, is_half, False)
    return q.transpose(1, 2), k.transpose(1, 2)


def homes(slot: Tensor, tokens: int, home: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    return launch("homes", slot, tokens, home, valid)  # type: ignore[no-any-return]


def pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _requires_grad(bias, key_bias)):
        return by_torch.pair_bias(bias, home, key_bias)
    key_bias = None if key_bias is None else key_bias.float()
    return launch("pair_bias", bias, home, key_bias)[..., : home.shape[1]]  # type: ignore[no-any-return]


def quick_gelu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _requires_grad(x)):
        return x * torch.sigmoid(1.702 * x)
    return launch("quick_gelu", _rows(x)).view(x.shape)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _requires_grad(gate, x)):
        return F.silu(gate) * x
    return launch("swiglu", _rows(gate), _rows(x)).view(x.shape)  # type: ignore[no-any-return]


def swiglu_norm(gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _requires_grad(gate, x, weight, bias)):
        return by_torch.swiglu_norm(gate, x, width, weight, bias, eps)
    out = launch("swiglu_norm", _rows(gate), _rows(x), width, weight, bias, eps)
    return out.view(x.shape)  # type: ignore[no-any-return]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    if predicates.without_product(x, weight, bias) is not None:
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)
    x, (weight, bias) = _cast(x), _cast_layer(weight, bias)
    out = launch("linear_gelu", _rows(x), weight, bias, approximate == "tanh", -1)
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    if q.numel() == 0:
        return q.clone()  # on a GPU torch's own function fails on an empty batch
    if predicates.without_kernel(q, k, v, size, scale, dropout_p) is not None:
        return by_torch.attention(q, k, v, size, scale, dropout_p)
    training = torch.is_grad_enabled() and _requires_grad(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    made = launch("attention_training" if training else "attention", q, k, v, _constant(size), scale)
    out: Tensor = made[0] if training else made
    return out.transpose(1, 2)


def merge_add_norm(
    x: Tensor,
    branch: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    training = torch.is_grad_enabled() and _requires_grad(x, branch, weight, bias, gamma)
    size, norm_dtype = _constant(size), norm_dtype or x.dtype
    merged, y, total, _ = launch(
        "merge_add_norm", x, branch, slot, tokens, size, weight, bias, eps, gamma, norm_dtype, training
    )
    return x if branch is None else merged, y, size if slot is None else _constant(total)


def attend_half(
    x: Tensor,
    qkv: Sequence[Tensor],
    heads: int,
    size: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    prefix: int,
    is_weighted: bool,
    scale: float | None,
    qkv_linear: Linear | None,
    proj: Linear,
    gamma: Tensor | None,
    norm: Norm,
    norm_dtype: torch.dtype | None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if scale is None:
        scale = (proj[0].shape[1] // heads) ** -0.5
    weight, bias = (None, None) if qkv_linear is None else qkv_linear
    norm_dtype = norm_dtype or x.dtype
    if drop is not None or (torch.is_grad_enabled() and _requires_grad(x, *qkv, weight, bias, *proj, gamma, *norm[:2])):
        q, k, v = qkv if len(qkv) == 3 else (qkv[0], None, None)
        x, y, total, made = training.attend_half(
            *(x, q, k, v, weight, bias, *proj, gamma, *norm[:2], _constant(size), slot, drop, heads, tokens, prefix),
            *(is_weighted, scale, norm[2], norm_dtype, predicates.linear_dtype(q), _keeps_branch(gamma)),
        )
        return x, y, size if total is None else total, slot if made is None else made
    # The operator leaves to autocast what has another dtype than the tokens. Compiled code runs outside of it.
    if torch.is_autocast_enabled() and (
        torch.compiler.is_compiling() or qkv[0].dtype is not predicates.linear_dtype(qkv[0])
    ):
        proj = _cast_layer(*proj)
        if weight is not None:
            qkv, (weight, bias) = (_cast(qkv[0]),), _cast_layer(weight, bias)
    merged, y, total, made = launch(
        "attend_half", x, qkv, heads, size, slot, tokens, prefix, is_weighted, scale, weight, bias, *proj, gamma, *norm,
        norm_dtype,
    )  # fmt: skip
    if slot is None:
        if tokens == x.shape[1]:
            return merged, y, size, None
        slot = made
    return merged, y, total, slot


def mlp_half(
    x: Tensor,
    y: Tensor,
    fc1: Linear,
    gelu: str,
    fc2: Linear,
    gamma: Tensor | None,
    norm: Norm,
    norm_dtype: torch.dtype | None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    norm_dtype = norm_dtype or x.dtype
    if drop is not None or (torch.is_grad_enabled() and _requires_grad(x, y, *fc1, *fc2, gamma, *norm[:2])):
        return training.mlp_half(
            *(x, y, *fc1, *fc2, gamma, *norm[:2], drop, GELUS[gelu], norm[2], norm_dtype),
            *(predicates.linear_dtype(y), _keeps_branch(gamma)),
        )
    if torch.is_autocast_enabled():
        is_compiling = torch.compiler.is_compiling()
        # A product that computes the GELU too reads 16 bits. Of fewer rows autocast casts for PyTorch's, and keeps it.
        rows = y.shape[0] * y.shape[1]
        if is_compiling or (rows >= library.info().least_rows and predicates.without_product(y, *fc1) is None):
            fc1 = _cast_layer(*fc1)
        y, fc2 = _cast(y), _cast_layer(*fc2) if is_compiling else fc2
    return launch("mlp_half", x, y, *fc1, GELUS[gelu], *fc2, gamma, *norm, norm_dtype)  # type: ignore[no-any-return]


def _keeps_branch(gamma: Tensor | None) -> bool:
    """Whether the way back reads a branch: for the gradient of its factor."""
    return gamma is not None and gamma.requires_grad


def _identity(keys: Tensor) -> Tensor:
    n = keys.shape[-2]
    return torch.arange(n, dtype=torch.int32, device=keys.device).expand(keys.shape[0], n).contiguous()


def _rows(x: Tensor) -> Tensor:
    """X [..., C] as three dimensions; a copy only where no strides would do."""
    return x if x.dim() == 3 else x[None, None] if x.dim() == 1 else x.flatten(0, -2)[None]


def _cast(x: Tensor) -> Tensor:
    """What autocast does for F.linear, and for no operator of others."""
    return x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled() else x


def _cast_layer(weight: Tensor, bias: Tensor | None) -> Linear:
    return _cast(weight), None if bias is None else _cast(bias)


def _constant(size: S) -> S:
    """Sizes are counts: no gradient flows to them."""
    return size.detach() if size is not None and size.requires_grad else size


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
