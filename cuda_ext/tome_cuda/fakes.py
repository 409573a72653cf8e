"""What the operators return, and what large tensors they make on the way: shapes and dtypes, without any value.

torch traces with these. On a GPU they also allocate what an operator is about to, so they make and free tensors in its
order (:func:`tome_cuda.registration.launch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _bipartite_match(keys: Tensor, r: int, prefix: int) -> Tensor:
    return _match(keys, keys.shape[0], keys.shape[-2], keys.shape[-1])


def _kth_match(keys: Tensor, k: int, prefix: int) -> Tensor:
    return _match(keys, keys.shape[0], keys.shape[-2], keys.shape[-1])


def _listed_match(keys: Tensor, sources: Tensor, targets: Tensor, r: int, prefix: int) -> Tensor:
    return _match(keys, keys.shape[0], keys.shape[-2], keys.shape[-1])


def _match(like: Tensor, batch: int, tokens: int, channels: int) -> Tensor:
    slot = like.new_empty((batch, tokens), dtype=torch.int32)
    # Scratch memory, which long images take: of each token its metric as two halves per channel, and its best target.
    padded = -(-channels // 16) * 16
    like.new_empty((batch, tokens, 4 * padded + 8), dtype=torch.uint8)
    return slot


def _merge(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x.new_empty((x.shape[0], tokens), dtype=torch.float32)
    return x.new_empty((x.shape[0], tokens, x.shape[2])), total


def _merge_backward(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], slot.shape[1], grad.shape[2]))


def _unmerge(x: Tensor, slot: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], slot.shape[1], x.shape[2]))


def _unmerge_backward(grad: Tensor, slot: Tensor, tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], tokens, grad.shape[2]))


def _follow(steps: Sequence[Tensor]) -> Tensor:
    return steps[0].new_empty(steps[0].shape)


def _restore(x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], steps[0].shape[1] if steps else x.shape[1], x.shape[2]))


def _rotate(
    q: Tensor, k: Tensor, table: Tensor, home: Tensor | None, prefix: int, is_half: bool, is_back: bool
) -> tuple[Tensor, Tensor]:
    made = [x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])) for x in (q, k)]
    return made[0], made[1]


def _homes(slot: Tensor, tokens: int, home: Tensor | None, valid: Tensor | None) -> Tensor:
    return slot.new_empty((slot.shape[0], tokens), dtype=torch.int64)


def _pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None) -> Tensor:
    batch, tokens = home.shape
    return bias.new_empty((batch, bias.shape[0], tokens, (tokens + 7) // 8 * 8))


def _quick_gelu(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu(gate: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu_norm(gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, is_tanh: bool, tile: int) -> Tensor:
    return _linear(x, weight)


def _attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim))


def _attention_training(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, size, scale), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    keys, width = k.shape[2], heads * head_dim
    is_packed = queries == keys
    grad_q = q.new_empty((0 if is_packed else batch, queries, width))
    return grad_q, q.new_empty((batch, keys, (3 if is_packed else 2) * width))


def _merge_add_norm(
    x: Tensor,
    branch: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    norm_dtype: torch.dtype,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, channels = x.shape
    merged = x.new_empty((0 if branch is None else batch, tokens, channels))
    y = x.new_empty((batch, tokens, channels), dtype=norm_dtype)
    total = x.new_empty((0 if slot is None else batch, tokens), dtype=torch.float32)
    return merged, y, total, x.new_empty((batch if training else 0, tokens, 2), dtype=torch.float32)


def _merge_add_norm_backward(
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    merged: Tensor,
    stats: Tensor,
    slot: Tensor | None,
    size: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    length: int,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = merged.shape
    is_same = gamma is None and branch_dtype == merged.dtype
    x = merged.new_empty((batch, length, channels))
    return x, merged.new_empty((0 if is_same else batch, length, channels), dtype=branch_dtype)


def _column_sums(a: Tensor, b: Tensor, stats: Tensor | None) -> Tensor:
    return a.new_empty((2, a.shape[2]), dtype=torch.float32)


def _attend_half(
    x: Tensor,
    qkv: Sequence[Tensor],
    heads: int,
    size: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    prefix: int,
    is_weighted: bool,
    scale: float,
    qkv_weight: Tensor | None,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = x.shape
    width = proj_weight.shape[1]
    q = qkv[0] if qkv_weight is None else _linear(qkv[0], qkv_weight)
    made = _match(x, batch, n, width // heads) if slot is None and tokens < n else None
    branch = _linear(q.new_empty((batch, n, width)), proj_weight)
    del q
    used = slot if made is None else made
    x, y, total, _ = _merge_add_norm(x, branch, used, tokens, size, None, None, eps, gamma, norm_dtype, False)
    return x, y, total, x.new_empty((0, n), dtype=torch.int32) if made is None else made


def _mlp_half(
    x: Tensor,
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    gelu: int,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    hidden = _linear(y, fc1_weight)
    # What GELU makes stands beside what it reads in float32 alone.
    branch = _linear(torch.empty_like(hidden) if hidden.dtype is torch.float32 else hidden, fc2_weight)
    del hidden
    x, y, _, _ = _merge_add_norm(x, branch, None, x.shape[1], None, None, None, eps, gamma, norm_dtype, False)
    return x, y


def _attend_half_training(
    x: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    qkv_weight: Tensor | None,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    size: Tensor | None,
    slot: Tensor | None,
    drop: Tensor | None,
    heads: int,
    tokens: int,
    prefix: int,
    is_weighted: bool,
    scale: float,
    eps: float,
    norm_dtype: torch.dtype,
    dtype: torch.dtype,
    keeps_branch: bool,
) -> tuple[Tensor | None, ...]:
    batch, n, channels = x.shape
    width = proj_weight.shape[1]
    cast = _cast(dtype, qkv_weight, proj_weight, qkv_bias, proj_bias)
    packed = None if qkv_weight is None else x.new_empty((batch, n, 3 * width), dtype=dtype)
    seen = x.new_empty((batch, n, heads, width // heads), dtype=q.dtype if packed is None else dtype)
    lse = x.new_empty((batch, heads, n), dtype=torch.float32)
    made = _match(x, batch, n, width // heads) if slot is None and tokens < n else None
    branch = x.new_empty((batch, n, channels), dtype=dtype)
    used = slot if made is None else made
    out, y, total, stats = _merge_add_norm(x, branch, used, tokens, size, None, None, eps, gamma, norm_dtype, True)
    kept = branch if keeps_branch else None
    return out, y, None if used is None else total, made, stats, packed, seen, lse, cast, kept


def _attend_half_backward(
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    merged: Tensor,
    stats: Tensor,
    slot: Tensor | None,
    size: Tensor | None,
    total: Tensor | None,
    norm_weight: Tensor | None,
    gamma: Tensor | None,
    branch: Tensor | None,
    drop: Tensor | None,
    cast: Tensor | None,
    qkv_weight: Tensor | None,
    proj_weight: Tensor | None,
    y: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seen: Tensor,
    lse: Tensor,
    heads: int,
    length: int,
    is_weighted: bool,
    scale: float,
    wanted: int,
) -> tuple[Tensor | None, ...]:
    (batch, _, channels), width = merged.shape, seen.shape[2] * seen.shape[3]
    x = merged.new_empty((batch, length, channels))
    dtype = (proj_weight if cast is None else cast).dtype  # type: ignore[union-attr]
    of_branch = merged.new_empty((batch, length, channels), dtype=dtype)
    of_proj = _weight_grad(wanted & 4, of_branch, channels, width, proj_weight)
    seen.new_empty((batch, length, width))
    packed = seen.new_empty((batch, length, 3 * width))
    vectors = _vectors(merged, wanted, 3 * width, channels)
    if y is None:
        return x, packed, None, of_proj, vectors
    of_qkv = _weight_grad(wanted & 1, packed, 3 * width, y.shape[2], qkv_weight)
    return x, packed.new_empty(y.shape), of_qkv, of_proj, vectors


def _mlp_half_training(
    x: Tensor,
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    drop: Tensor | None,
    gelu: int,
    eps: float,
    norm_dtype: torch.dtype,
    dtype: torch.dtype,
    keeps_branch: bool,
) -> tuple[Tensor | None, ...]:
    cast = _cast(dtype, fc1_weight, fc2_weight, fc1_bias, fc2_bias)
    hidden = x.new_empty((*y.shape[:2], fc1_weight.shape[0]), dtype=dtype)
    active = torch.empty_like(hidden)
    branch = x.new_empty(x.shape, dtype=dtype)
    out, y, _, stats = _merge_add_norm(x, branch, None, x.shape[1], None, None, None, eps, gamma, norm_dtype, True)
    return out, y, stats, hidden, active, cast, branch if keeps_branch else None


def _mlp_half_backward(
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    merged: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    gamma: Tensor | None,
    branch: Tensor | None,
    drop: Tensor | None,
    cast: Tensor | None,
    fc1_weight: Tensor | None,
    fc2_weight: Tensor | None,
    y: Tensor,
    hidden: Tensor,
    active: Tensor,
    gelu: int,
    wanted: int,
) -> tuple[Tensor | None, ...]:
    channels, width = merged.shape[2], hidden.shape[2]
    x = merged.new_empty(merged.shape)
    of_branch = merged.new_empty(merged.shape, dtype=hidden.dtype)
    of_fc2 = _weight_grad(wanted & 4, of_branch, channels, width, fc2_weight)
    of_active = hidden.new_empty(hidden.shape)
    of_hidden = torch.empty_like(of_active)
    del of_active
    of_fc1 = _weight_grad(wanted & 1, of_hidden, width, y.shape[2], fc1_weight)
    return x, hidden.new_empty(y.shape), of_fc1, of_fc2, _vectors(merged, wanted, width, channels)


def _cast(dtype: torch.dtype, *parameters: Tensor | None) -> Tensor | None:
    """Those of another dtype, each filled up to 64 elements."""
    cast = [p for p in parameters if p is not None and p.dtype is not dtype]
    count = sum((p.numel() + 63) // 64 * 64 for p in cast)
    return cast[0].new_empty((count,), dtype=dtype) if cast else None


def _weight_grad(is_wanted: int, grad: Tensor, rows: int, columns: int, weight: Tensor | None) -> Tensor | None:
    """Of a weight that was cast in float32."""
    dtype = torch.float32 if weight is None else grad.dtype
    return grad.new_empty((rows, columns), dtype=dtype) if is_wanted else None


def _vectors(like: Tensor, wanted: int, width: int, channels: int) -> Tensor | None:
    count = sum(width if i == 1 else channels for i in (1, 3, 4, 5, 6) if wanted >> i & 1)
    return like.new_empty((count,), dtype=torch.float32) if count else None


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    kind = x.device.type
    is_cast = kind == "cuda" and weight.dtype is not x.dtype and torch.is_autocast_enabled(kind)
    return x.new_empty((*x.shape[:2], weight.shape[0]), dtype=torch.get_autocast_dtype(kind) if is_cast else x.dtype)


class Fake(NamedTuple):
    """The fake of an operator, and from its arguments about how many elements the largest tensor has that it makes."""

    make: Callable[..., Any]
    elements: Callable[[tuple[Any, ...]], int]


def _first(args: tuple[Any, ...]) -> int:
    return args[0].numel()  # type: ignore[no-any-return]


FAKES = {
    "bipartite_match": Fake(_bipartite_match, _first),
    "kth_match": Fake(_kth_match, _first),
    "listed_match": Fake(_listed_match, _first),
    "merge": Fake(_merge, _first),
    "merge_backward": Fake(_merge_backward, lambda args: args[1].numel() * args[0].shape[2]),
    "unmerge": Fake(_unmerge, lambda args: args[1].numel() * args[0].shape[2]),
    "unmerge_backward": Fake(_unmerge_backward, _first),
    "follow": Fake(_follow, lambda args: args[0][0].numel()),
    "restore": Fake(_restore, lambda args: args[2][0].numel() * args[0].shape[2] if args[2] else args[0].numel()),
    "rotate": Fake(_rotate, lambda args: max(args[0].numel(), args[1].numel())),
    "homes": Fake(_homes, _first),
    "pair_bias": Fake(_pair_bias, lambda args: args[1].shape[1] * args[1].numel() * args[0].shape[0]),
    "quick_gelu": Fake(_quick_gelu, _first),
    "swiglu": Fake(_swiglu, _first),
    "swiglu_norm": Fake(_swiglu_norm, _first),
    "linear_product": Fake(_linear_product, lambda args: args[0].shape[0] * args[0].shape[1] * args[1].shape[0]),
    "linear_gelu": Fake(_linear_gelu, lambda args: args[0].shape[0] * args[0].shape[1] * args[1].shape[0]),
    "attention": Fake(_attention, _first),
    "attention_training": Fake(_attention_training, _first),
    "attention_backward": Fake(_attention_backward, lambda args: max(args[1].numel(), 3 * args[2].numel())),
    "merge_add_norm": Fake(_merge_add_norm, _first),
    "merge_add_norm_backward": Fake(
        _merge_add_norm_backward, lambda args: args[2].shape[0] * args[9] * args[2].shape[2]
    ),
    "column_sums": Fake(_column_sums, lambda args: 0),
    "attend_half": Fake(_attend_half, lambda args: 3 * args[0].numel()),
    "attend_half_training": Fake(_attend_half_training, _first),
    "attend_half_backward": Fake(_attend_half_backward, lambda args: args[18].numel()),
    "mlp_half_training": Fake(_mlp_half_training, _first),
    "mlp_half_backward": Fake(_mlp_half_backward, lambda args: args[2].numel()),
    "mlp_half": Fake(_mlp_half, lambda args: 4 * args[0].numel()),
}
