"""Argument checks, each under the name and with the signature of its operation. Errors name the value and what fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Linear: TypeAlias = "tuple[Tensor, Tensor | None]"  # weight [outputs, inputs] and bias [outputs]
Norm: TypeAlias = "tuple[Tensor | None, Tensor | None, float]"  # weight [C], bias [C] and eps

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GELUS = ("erf", "tanh", "quick")
APPROXIMATIONS = ("none", "tanh")  # of F.gelu
INTEGERS = (int, torch.SymInt)


def match(keys: Tensor, r: int, prefix: int = 1) -> None:
    _keys(keys, prefix)
    _integer("r", r, 0)


def kth_match(keys: Tensor, k: int, prefix: int = 1) -> None:
    _keys(keys, prefix)
    _integer("k", k, 1)


def random_match(keys: Tensor, r: int, prefix: int = 1, generator: torch.Generator | None = None) -> None:
    match(keys, r, prefix)


def set_match(keys: Tensor, sources: Tensor, targets: Tensor, r: int, prefix: int = 0) -> None:
    match(keys, r, prefix)
    batch, n = keys.shape[0], keys.shape[-2]
    for name, positions in (("sources", sources), ("targets", targets)):
        tensor = _tensor(name, positions, (2,), f"int64 [B, {name[0].upper()}]")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        _on(name, tensor, keys.device)
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} must be [{batch}, {name[0].upper()}], got shape {tuple(tensor.shape)}")
    if sources.shape[1] + targets.shape[1] != n - prefix:
        raise ValueError(
            f"sources and targets must be the {n - prefix} tokens behind the prefix, got {sources.shape[1]} and "
            f"{targets.shape[1]}"
        )
    # Reading the values would stop a GPU, and a trace has none: there the caller answers for them.
    if torch.compiler.is_compiling() or keys.device.type != "cpu":
        return
    found = torch.cat([sources, targets], dim=1).sort(dim=1).values
    try:
        covers = bool((found == torch.arange(prefix, n)).all())
    except RuntimeError:  # of a fake tensor, and of those that torch.func.vmap hands out, which stand for many
        return
    if not covers:
        raise ValueError(f"sources and targets must hold each of the positions {prefix} to {n - 1} once")


def merge(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None = None) -> None:
    _floating("x", x, (3,), "[B, N, C]")
    _slot("slot", slot, x, x.shape[1])
    _integer("tokens", tokens, min(x.shape[1], 1), x.shape[1])
    _size(size, x.shape[0], x.shape[1], x.device)


def unmerge(x: Tensor, slot: Tensor) -> None:
    _floating("x", x, (3,), "[B, M, C]")
    _slot("slot", slot, x)


def follow(steps: Sequence[Tensor]) -> None:
    _sequence("steps", steps)
    if not steps:
        raise ValueError("steps must hold at least one slot map, got none")
    first = _tensor("steps[0]", steps[0], (2,), "int32 [B, N]")
    _steps(steps, first)


def restore(x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None = None) -> None:
    _floating("x", x, (3,), "[B, M, C]")
    _addition(x, branch, gamma)
    _sequence("steps", steps)
    _steps(steps, x)
    if steps and steps[-1].shape[1] < x.shape[1]:
        raise ValueError(
            f"the last of steps must lead to the {x.shape[1]} tokens of x, got shape {tuple(steps[-1].shape)}"
        )


def rotate(
    q: Tensor, k: Tensor, table: Tensor, home: Tensor | None = None, prefix: int = 0, is_half: bool = False
) -> None:
    _floating("q", q, (4,), "[B, H, N, D]")
    _floating("k", k, (4,), "[B, H, N, D]")
    batch, heads, n, dim = q.shape
    if k.dtype != q.dtype or k.device != q.device:
        raise TypeError(f"q and k must share dtype and device, got {q.dtype} on {q.device}, {k.dtype} on {k.device}")
    if (k.shape[0], *k.shape[2:]) != (batch, n, dim):
        raise ValueError(f"k must have the batch, tokens and channels of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if dim % 2 != 0:
        raise ValueError(f"q and k must have an even number of channels, got {dim}")
    _integer("prefix", prefix, 0, n)
    layout = "[P, 2 * D], [H, P, 2 * D] or [B, H, P, 2 * D]"
    _floating("table", table, (2, 3, 4), layout)
    _on("table", table, q.device)
    images, shared = (1, 1, *table.shape)[-4:-2]
    if table.shape[-1] != 2 * dim or images not in (1, batch) or shared not in (1, heads):
        raise ValueError(f"table must be {layout} for q {tuple(q.shape)}, got shape {tuple(table.shape)}")
    if shared not in (1, k.shape[1]):
        raise ValueError(f"table must be for all heads alike where k has {k.shape[1]} and q {heads}, got {shared}")
    if home is None:
        if table.shape[-2] != n - prefix:
            raise ValueError(f"table must be of the {n - prefix} tokens behind the prefix, got {table.shape[-2]}")
    else:
        _per_token("home", home, batch, n, (torch.int64, torch.int32), q.device)


def homes(slot: Tensor, tokens: int, home: Tensor | None = None, valid: Tensor | None = None) -> None:
    _slot("slot", slot, _tensor("slot", slot, (2,), "int32 [B, N]"))
    batch, n = slot.shape
    _integer("tokens", tokens, min(n, 1), n)
    if home is not None:
        _per_token("home", home, batch, n, (torch.int64,), slot.device)
    if valid is not None:
        _per_token("valid", valid, batch, n, (torch.bool,), slot.device)


def pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None = None) -> None:
    _floating("bias", bias, (3,), "[H, N, N]")
    if bias.shape[1] != bias.shape[2]:
        raise ValueError(f"bias must be [H, N, N], got shape {tuple(bias.shape)}")
    batch, tokens = _tensor("home", home, (2,), "int64 [B, M]").shape
    _per_token("home", home, batch, tokens, (torch.int64,), bias.device)
    if key_bias is not None:
        _per_token("key_bias", key_bias, batch, tokens, FLOATING, bias.device)


def quick_gelu(x: Tensor) -> None:
    _channels("x", x)


def swiglu(gate: Tensor, x: Tensor) -> None:
    _channels("gate", gate)
    _channels("x", x)
    if gate.dtype != x.dtype or gate.device != x.device:
        raise TypeError(
            f"gate and x must share dtype and device, got {gate.dtype} on {gate.device}, {x.dtype} on {x.device}"
        )
    if gate.shape != x.shape:
        raise ValueError(f"x must have the shape of gate {tuple(gate.shape)}, got {tuple(x.shape)}")


def swiglu_norm(gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    swiglu(gate, x)
    _integer("width", width, 1, gate.shape[-1])
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _floating(name, value, (1,), f"[{width}]")
        if value.shape[0] != width:
            raise ValueError(f"{name} must be [{width}], got shape {tuple(value.shape)}")
        _on(name, value, gate.device)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> None:
    _channels("x", x)
    _linear("linear_gelu", (weight, bias), None, x.shape[-1], x)
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be one of {', '.join(APPROXIMATIONS)}, got {approximate!r}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        _floating(name, value, (4,), "[B, H, N, D]")
        if value.dtype != q.dtype or value.device != q.device:
            raise TypeError(
                f"q, k and v must share dtype and device, got {name} {value.dtype} on {value.device} "
                f"with q {q.dtype} on {q.device}"
            )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "q must be [B, H, Nq, D], k and v [B, H, N, D], got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    _size(size, k.shape[0], k.shape[2], k.device)


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
) -> None:
    _floating("x", x, (3,), "[B, N, C]")
    _addition(x, branch, gamma, is_partial=True)
    _norm(x, (weight, bias, eps), norm_dtype)
    if slot is not None and branch is None:
        raise ValueError("slot must be None where there is no branch: merge x by itself")
    if slot is None:
        _integer("tokens", tokens, x.shape[1], x.shape[1])
        _size(size, x.shape[0], x.shape[1], x.device)
    else:
        merge(x, slot, tokens, size)


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
) -> None:
    _floating("x", x, (3,), "[B, N, C]")
    batch, n, channels = x.shape
    _integer("heads", heads, 1)
    _integer("prefix", prefix, 0, n)
    width = _qkv(qkv, heads, qkv_linear, x)
    _size(size, batch, n, x.device)
    if slot is None:
        _integer("tokens", tokens, n - (n - prefix) // 2, n)
    else:
        merge(x, slot, tokens, size)
    _linear("proj", proj, channels, width, x)
    _per_channel("gamma", gamma, x)
    _norm(x, norm, norm_dtype)
    _drop(drop, x)


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
) -> None:
    _floating("x", x, (3,), "[B, N, C]")
    _floating("y", y, (3,), "[B, N, C]")
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"y must have the tokens of x {tuple(x.shape)}, got shape {tuple(y.shape)}")
    if gelu not in GELUS:
        raise ValueError(f"gelu must be one of {', '.join(GELUS)}, got {gelu!r}")
    hidden = _linear("fc1", fc1, None, y.shape[2], x)
    _linear("fc2", fc2, x.shape[2], hidden, x)
    _per_channel("gamma", gamma, x)
    _norm(x, norm, norm_dtype)
    _drop(drop, x)


def _drop(drop: Tensor | None, x: Tensor) -> None:
    """What each image of x has of a branch, [B]."""
    if drop is not None:
        _floating("drop", drop, (1,), "[B]")
        if drop.shape[0] != x.shape[0]:
            raise ValueError(f"drop must be [{x.shape[0]}], got shape {tuple(drop.shape)}")
        _on("drop", drop, x.device)


def _tensor(name: str, value: object, dims: tuple[int, ...], layout: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    return value


def _channels(name: str, value: object) -> None:
    """A tensor [..., C]."""
    dims = value.dim() if isinstance(value, Tensor) else 1
    _floating(name, value, (max(dims, 1),), "[..., C]")


def _floating(name: str, value: object, dims: tuple[int, ...], layout: str) -> Tensor:
    tensor = _tensor(name, value, dims, layout)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    return tensor


def _sequence(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple or list of tensors, got {type(value).__name__}")


def _integer(name: str, value: object, low: int, high: int | torch.SymInt | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _on(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the tokens, got {tensor.device}")


def _keys(keys: Tensor, prefix: int) -> None:
    _floating("keys", keys, (3, 4), "[B, N, D] or [B, H, N, D]")
    if keys.shape[-1] == 0 or (keys.dim() == 4 and keys.shape[1] == 0):
        raise ValueError(f"keys need at least one channel and one head, got shape {tuple(keys.shape)}")
    _integer("prefix", prefix, 0, keys.shape[-2])


def _slot(name: str, slot: object, x: Tensor, length: int | None = None) -> None:
    """A slot map of tokens x, int32 [B, N]."""
    tensor = _tensor(name, slot, (2,), "int32 [B, N]")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    if tensor.shape[0] != x.shape[0] or (length is not None and tensor.shape[1] != length):
        expected = f"[{x.shape[0]}, {'N' if length is None else length}]"
        raise ValueError(f"{name} must be {expected}, got shape {tuple(tensor.shape)}")
    _on(name, tensor, x.device)


def _steps(steps: Sequence[Tensor], x: Tensor) -> None:
    """Slot maps of one batch; each has at most the tokens of the one before it."""
    for i, step in enumerate(steps):
        _slot(f"steps[{i}]", step, x)
        if i > 0 and step.shape[1] > steps[i - 1].shape[1]:
            raise ValueError(
                f"steps must go from first to last: steps[{i}] has {step.shape[1]} tokens, the one before it "
                f"{steps[i - 1].shape[1]}"
            )


def _size(size: object, batch: int, tokens: int, device: torch.device) -> None:
    """Token sizes, float32 [B, N], or None for all ones."""
    if size is None:
        return
    tensor = _tensor("size", size, (2,), "float32 [B, N]")
    if tensor.dtype != torch.float32:
        raise TypeError(f"size must be float32 whatever the dtype of the tokens, got {tensor.dtype}")
    if tuple(tensor.shape) != (batch, tokens):
        raise ValueError(f"size must be [{batch}, {tokens}], got shape {tuple(tensor.shape)}")
    _on("size", tensor, device)


def _per_token(
    name: str, value: object, batch: int, tokens: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """A tensor [B, N] of one of these dtypes."""
    known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    tensor = _tensor(name, value, (2,), f"{known} [B, N]")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {known}, got {tensor.dtype}")
    if tuple(tensor.shape) != (batch, tokens):
        raise ValueError(f"{name} must be [{batch}, {tokens}], got shape {tuple(tensor.shape)}")
    _on(name, tensor, device)


def _addition(x: Tensor, branch: Tensor | None, gamma: Tensor | None, is_partial: bool = False) -> None:
    """What is added to x [B, N, C]: a branch of its shape (partial: or of fewer tokens), times gamma [C]."""
    _per_channel("gamma", gamma, x)
    if branch is None:
        if gamma is not None:
            raise ValueError("gamma must be None where there is no branch")
        return
    _floating("branch", branch, (3,), "[B, N, C]")
    batch, n, channels = branch.shape
    if (batch, channels) != (x.shape[0], x.shape[2]) or n > x.shape[1] or (n < x.shape[1] and not is_partial):
        or_fewer = ", or fewer tokens" if is_partial else ""
        raise ValueError(f"branch must have the shape of x {tuple(x.shape)}{or_fewer}, got {tuple(branch.shape)}")
    if branch.dtype != x.dtype and x.dtype != torch.float32:
        raise TypeError(f"branch must be {x.dtype} like x (or x float32), got {branch.dtype}")
    _on("branch", branch, x.device)


def _per_channel(name: str, value: Tensor | None, x: Tensor) -> None:
    """A parameter [C] of tokens x, or None."""
    if value is None:
        return
    _floating(name, value, (1,), f"[{x.shape[2]}]")
    if value.shape[0] != x.shape[2]:
        raise ValueError(f"{name} must be [{x.shape[2]}], got shape {tuple(value.shape)}")
    _on(name, value, x.device)


def _norm(x: Tensor, norm: Norm, norm_dtype: torch.dtype | None) -> None:
    """A LayerNorm of tokens x: (weight, bias, eps), and the dtype of its output."""
    if not isinstance(norm, tuple) or len(norm) != 3:
        raise TypeError(f"norm must be (weight, bias, eps), got {norm!r}")
    weight, bias, eps = norm
    _per_channel("weight", weight, x)
    _per_channel("bias", bias, x)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if norm_dtype is not None and norm_dtype not in FLOATING:
        raise TypeError(f"norm_dtype must be float16, bfloat16, float32 or float64, got {norm_dtype}")


def _linear(name: str, layer: Linear, outputs: int | None, inputs: int, x: Tensor) -> int:
    """A linear layer (weight, bias or None) on the device of x; how many channels it gives."""
    if not isinstance(layer, tuple) or len(layer) != 2:
        raise TypeError(f"{name} must be a pair (weight, bias or None), got {type(layer).__name__}")
    weight = _floating(f"{name}'s weight", layer[0], (2,), "[outputs, inputs]")
    expected = (weight.shape[0] if outputs is None else outputs, inputs)
    if tuple(weight.shape) != expected:
        raise ValueError(f"{name}'s weight must be {list(expected)}, got shape {tuple(weight.shape)}")
    _on(f"{name}'s weight", weight, x.device)
    if layer[1] is not None:
        bias = _floating(f"{name}'s bias", layer[1], (1,), f"[{expected[0]}]")
        if bias.shape[0] != expected[0]:
            raise ValueError(f"{name}'s bias must be [{expected[0]}], got shape {tuple(bias.shape)}")
        _on(f"{name}'s bias", bias, x.device)
    return weight.shape[0]


def _qkv(qkv: Sequence[Tensor], heads: int, linear: Linear | None, x: Tensor) -> int:
    """Queries, keys and values in one of their three forms; H * D."""
    _sequence("qkv", qkv)
    batch, n, _ = x.shape
    if len(qkv) == 3:
        if linear is not None:
            raise ValueError("qkv_linear must be None where q, k and v are given apart")
        attention(qkv[0], qkv[1], qkv[2])
        if tuple(qkv[0].shape[:3]) != (batch, heads, n):
            raise ValueError(f"q, k and v must be [{batch}, {heads}, {n}, D], got shape {tuple(qkv[0].shape)}")
        _on("q", qkv[0], x.device)
        return heads * qkv[0].shape[3]
    if len(qkv) != 1:
        raise ValueError(f"qkv must be (q, k, v) or one tensor alone, got {len(qkv)} tensors")
    packed = _floating("qkv", qkv[0], (3,), "[B, N, 3 * H * D], or [B, N, C] with qkv_linear")
    if packed.shape[:2] != x.shape[:2]:
        raise ValueError(f"qkv must have the tokens of x {tuple(x.shape)}, got shape {tuple(packed.shape)}")
    _on("qkv", packed, x.device)
    width = packed.shape[2] if linear is None else _linear("qkv_linear", linear, None, packed.shape[2], x)
    if width == 0 or width % (3 * heads) != 0:
        raise ValueError(f"{width} channels of qkv cannot be split into 3 * {heads} heads")
    return width // 3
