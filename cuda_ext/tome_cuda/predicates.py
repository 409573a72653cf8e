"""Why an operation can't run on given arguments: the question every choice of a backend asks first."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_cuda import checks, library

OPERATIONS = ("match", "kth_match", "random_match", "merge", "unmerge", "merge_add_norm")
ROWS = ("merge", "unmerge", "merge_add_norm")  # operations on tokens of any width


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
    tensor = args[0] if args else kwargs.get("x" if op_name in ROWS else "keys")
    if not isinstance(tensor, Tensor):
        return None
    if tensor.device.type != "cuda":
        return f"the tokens are on {tensor.device.type}, and the kernels run on CUDA devices only"
    if tensor.layout is not torch.strided:
        return f"the tokens are {tensor.layout}, and the kernels read strided tensors only"
    if tensor.dtype is torch.float64:
        return "the tokens are torch.float64, and the kernels know float32, float16 and bfloat16"
    if op_name == "merge_add_norm" and any(_is_double(value) for value in (*args, *kwargs.values())):
        return "an argument is torch.float64, and the kernels know float32, float16 and bfloat16"
    if op_name not in ROWS and tensor.dim() > 0 and tensor.shape[-1] > checks.MAX_CHANNELS:
        return f"the metric has {tensor.shape[-1]} channels, and the kernels take at most {checks.MAX_CHANNELS}"
    reason: str | None = library.missing() or library.unsupported_device(_index(tensor))
    return reason


def _is_double(value: object) -> bool:
    return value is torch.float64 or (isinstance(value, Tensor) and value.dtype is torch.float64)


def _index(tensor: Tensor) -> int:
    index = tensor.device.index
    return torch.cuda.current_device() if index is None else index
