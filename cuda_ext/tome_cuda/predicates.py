"""Why an operation can't run on given arguments: the question every choice of a backend asks first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tome_cuda import checks, library

OPERATIONS = ("match", "kth_match", "random_match", "merge", "unmerge", "attention", "merge_add_norm")
# The name of the first argument; elsewhere "keys".
FIRST = {"merge": "x", "unmerge": "x", "merge_add_norm": "x", "attention": "q"}
MATCHING = ("match", "kth_match", "random_match")
HEAD_DIMS = (32, 64, 72, 80, 96, 128)
LEAST_SCALE = 1e-30  # of csrc/attention/attention.h


def why_not(op_name: str, *args: object, **kwargs: object) -> str | None:
    """The reason why ``op_name`` can't run on these arguments, or None.

    Only what the kernels lack counts. Arguments that no backend accepts (a wrong rank, a negative r) are the
    operation's own to refuse.

    Args:
        op_name: a name of ``tome_cuda``'s operations.
        *args: the operation's arguments.
        **kwargs: likewise.

    Returns:
        None, or one sentence.

    """
    if op_name not in OPERATIONS:
        return f"the extension has no kernel for {op_name}"
    tensor = args[0] if args else kwargs.get(FIRST.get(op_name, "keys"))
    if not isinstance(tensor, Tensor):
        return None
    if tensor.device.type != "cuda":
        return f"the tokens are on {tensor.device.type}, and the kernels run on CUDA devices only"
    if tensor.layout is not torch.strided:
        return f"the tokens are {tensor.layout}, and the kernels read strided tensors only"
    if tensor.dtype is torch.float64:
        return "the tokens are torch.float64, and the kernels know float32, float16 and bfloat16"
    if op_name == "merge_add_norm":  # parameters and the dtype of the norm count too
        values = (*args, *kwargs.values())
        if torch.float64 in [value.dtype if isinstance(value, Tensor) else value for value in values]:
            return "an argument is torch.float64, and the kernels know float32, float16 and bfloat16"
    if op_name in MATCHING and tensor.dim() > 0 and tensor.shape[-1] > checks.MAX_CHANNELS:
        return f"the metric has {tensor.shape[-1]} channels, and the kernels take at most {checks.MAX_CHANNELS}"
    reason: str | None = library.missing() or library.unsupported_device(_index(tensor))
    return reason


def remark(op_name: str, *args: Any, **kwargs: Any) -> str | None:
    """What else to know of an operation that can run on these arguments: attention may be left to torch."""
    return _remark_on_attention(*args, **kwargs) if op_name == "attention" else None


def _remark_on_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    reason = without_kernel(q, k, v, scale, dropout_p)
    return None if reason is None else f"by torch: {reason}"


def without_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout_p: float) -> str | None:
    """Why attention on these arguments is left to torch's own function, or None where the kernels compute it.

    ``tome_cuda.attention`` runs either way, so :func:`why_not` doesn't ask: a float32 model has merging to gain.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "the kernels of attention have no gradient, and one is wanted"
    if q.dtype is not torch.float16 and q.dtype is not torch.bfloat16:
        return f"the kernels of attention know float16 and bfloat16, not {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"the kernels of attention know head dimensions {HEAD_DIMS}, not {q.shape[3]}"
    if dropout_p > 0.0:
        return "the kernels of attention drop no weights"
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return "the kernels of attention read channels without gaps"
    if scale is not None and not LEAST_SCALE <= scale < float("inf"):
        return f"the kernels of attention take positive scales, not {scale}"
    return None if k.shape[2] > 0 else "there are no keys"


def takes_block(dtype: torch.dtype, head_dim: int, scale: float) -> bool:
    """Whether the operator of a whole block computes attention of this kind."""
    is_half = dtype is torch.float16 or dtype is torch.bfloat16
    return is_half and head_dim in HEAD_DIMS and LEAST_SCALE <= scale < float("inf")


def _index(tensor: Tensor) -> int:
    index = tensor.device.index
    return torch.cuda.current_device() if index is None else index
