"""Argument checks of the operations, in the words of the reference. Each error names the value and what fits."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of which the kernels lack the last
MAX_CHANNELS = 256  # of a metric
INTEGERS = (int, torch.SymInt)


def _tensor(name: str, value: object, dims: tuple[int, ...], layout: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    return value


def floating(name: str, value: object, dims: tuple[int, ...], layout: str) -> None:
    """A floating-point tensor with one of the ranks ``dims``, of a dtype and on a device that the kernels know."""
    tensor = _tensor(name, value, dims, layout)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dtype is torch.float64:
        raise TypeError(f"{name} must be float16, bfloat16 or float32 for the kernels, got {tensor.dtype}")
    if tensor.device.type not in ("cuda", "meta"):
        raise ValueError(f"{name} must be on a CUDA device for the kernels, got {tensor.device}")


def integer(name: str, value: object, low: int, high: int | torch.SymInt | None = None) -> None:
    """A Python integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def keys(value: Tensor, prefix: int) -> None:
    """Keys [B, N, D] or [B, H, N, D] and the number of protected tokens."""
    floating("keys", value, (3, 4), "[B, N, D] or [B, H, N, D]")
    if value.shape[-1] == 0 or (value.dim() == 4 and value.shape[1] == 0):
        raise ValueError(f"keys need at least one channel and one head, got shape {tuple(value.shape)}")
    if value.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"keys can have at most {MAX_CHANNELS} channels, got shape {tuple(value.shape)}")
    integer("prefix", prefix, 0, value.shape[-2])


def slot(value: object, batch: int, device: torch.device, length: int | None = None) -> None:
    """A slot map, int32 [B, N]."""
    tensor = _tensor("slot", value, (2,), "int32 [B, N]")
    if tensor.dtype != torch.int32:
        raise TypeError(f"slot must be int32, got {tensor.dtype}")
    if tensor.shape[0] != batch or (length is not None and tensor.shape[1] != length):
        expected = f"[{batch}, {'N' if length is None else length}]"
        raise ValueError(f"slot must be {expected}, got shape {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"slot must be on {device} like the tokens, got {tensor.device}")


def size(value: object, batch: int, tokens: int, device: torch.device) -> None:
    """Token sizes, float32 [B, N], or None for all ones."""
    if value is None:
        return
    tensor = _tensor("size", value, (2,), "float32 [B, N]")
    if tensor.dtype != torch.float32:
        raise TypeError(f"size must be float32 whatever the dtype of the tokens, got {tensor.dtype}")
    if tuple(tensor.shape) != (batch, tokens):
        raise ValueError(f"size must be [{batch}, {tokens}], got shape {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"size must be on {device} like the tokens, got {tensor.device}")


def merging(x: Tensor, slot_: object, tokens: int, size_: object) -> None:
    """Arguments of merge: x [B, N, C], slot [B, N], tokens in [min(N, 1), N], size [B, N]."""
    floating("x", x, (3,), "[B, N, C]")
    slot(slot_, x.shape[0], x.device, x.shape[1])
    integer("tokens", tokens, min(x.shape[1], 1), x.shape[1])
    size(size_, x.shape[0], x.shape[1], x.device)


def add_norm(
    x: Tensor, branch: Tensor | None, params: dict[str, Tensor | None], eps: float, norm_dtype: torch.dtype | None
) -> None:
    """The residual stream x [B, N, C], its branch [B, N, C] and per-channel parameters [C] or None."""
    floating("x", x, (3,), "[B, N, C]")
    floating("branch", branch, (3,), "[B, N, C]")
    assert branch is not None
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x {tuple(x.shape)}, got {tuple(branch.shape)}")
    if branch.dtype != x.dtype and x.dtype != torch.float32:
        raise TypeError(f"branch must be {x.dtype} like x (or x float32), got {branch.dtype}")
    if branch.device != x.device:
        raise ValueError(f"branch must be on {x.device} like x, got {branch.device}")
    for name, value in params.items():
        if value is None:
            continue
        floating(name, value, (1,), f"[{x.shape[2]}]")
        if value.shape[0] != x.shape[2]:
            raise ValueError(f"{name} must be [{x.shape[2]}], got shape {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {value.device}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if norm_dtype is not None and norm_dtype not in FLOATING:
        raise TypeError(f"norm_dtype must be float16, bfloat16, float32 or float64, got {norm_dtype}")
    if norm_dtype is torch.float64:
        raise TypeError(f"norm_dtype must be float16, bfloat16 or float32 for the kernels, got {norm_dtype}")


def attention(q: Tensor, k: Tensor, v: Tensor, size_: object, dropout_p: float) -> None:
    """Arguments of attention: q [B, H, Nq, D], k and v [B, H, N, D] of one dtype and device, size [B, N]."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        floating(name, value, (4,), "[B, H, N, D]")
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
    size(size_, k.shape[0], k.shape[2], k.device)
