"""Why an operation can't run on given arguments: the question every choice of a backend asks first.

Only what the kernels lack counts. Arguments that no backend accepts (a wrong rank, a negative r) are for the
operation's own check to refuse. What the kernels are built for is told by the library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack

from . import library

Linear = tuple[Tensor, Tensor | None]
Norm = tuple[Tensor | None, Tensor | None, float]


def why_not(op: str, *args: Any, **kwargs: Any) -> str | None:
    """The reason why ``op`` can't run on these arguments, or None.

    Args:
        op: a name of ``tome_cuda``'s operations.
        *args: the operation's arguments.
        **kwargs: likewise.

    Returns:
        None, or one sentence.

    """
    predicate = PREDICATES.get(op)
    return f"the extension has no kernel for {op}" if predicate is None else predicate(*args, **kwargs)


def _match(keys: Tensor, *_: object, **__: object) -> str | None:
    return _lacks(keys) or _lacks_width(keys)


def _tokens(x: Tensor, *_: object, **__: object) -> str | None:
    return _lacks(x)


def _follow(steps: Sequence[Tensor]) -> str | None:
    return (_lacks(steps[0]) or _lacks_steps(steps)) if steps else None


def _restore(x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None = None) -> str | None:
    return _lacks(x) or _lacks_double(branch, gamma) or _lacks_steps(steps)


def _rotate(q: Tensor, k: Tensor, table: Tensor, *_: object, **__: object) -> str | None:
    reason = _lacks(q) or _lacks_double(k, table)
    if reason is None and torch.is_grad_enabled() and _requires_grad(table):
        return "the kernel of rotate has no gradient of its table, and one is wanted"
    return reason


def _pair_bias(bias: Tensor, home: Tensor, key_bias: Tensor | None = None) -> str | None:
    return _lacks(bias) or _lacks_double(key_bias)


def _swiglu_norm(
    gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    return _lacks(gate) or _lacks(x) or _lacks_double(weight, bias)


def _swiglu(gate: Tensor, x: Tensor) -> str | None:
    return _lacks(gate) or _lacks(x)


def _attention(q: Tensor, *_: object, **__: object) -> str | None:
    return _lacks(q)


def _merge_add_norm(x: Tensor, *others: object, **named: object) -> str | None:
    return _lacks(x) or _lacks_double(*others, *named.values())  # parameters and the dtype of the norm count too


# The halves are for few images, where the host sets the pace: what all calls ask is written out here.


def _attend_half(
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
) -> str | None:
    reason = _lacks(x) or _is_watched(x) or _lacks_affine(gamma, norm, norm_dtype)
    if reason is not None:
        return reason
    dtype, head_dim = qkv[0].dtype, qkv[0].shape[-1]
    written = linear_dtype(qkv[0])
    if qkv_linear is not None:
        dtype, head_dim = written, qkv_linear[0].shape[0] // (3 * heads)
    elif len(qkv) == 1:
        head_dim //= 3 * heads
    lacks = _lacks_attention if torch.compiler.is_compiling() else _lacks_heads
    reason = lacks(dtype, head_dim, scale)
    if reason is not None:
        return reason
    if x.dtype is not written and x.dtype is not torch.float32:
        return _lacks_addition(written, x.dtype)
    if qkv_linear is None and any(t.stride(-1) != 1 for t in qkv):
        return GAPS
    return None if tokens > 0 else NO_KEYS


def _mlp_half(
    x: Tensor,
    y: Tensor,
    fc1: Linear,
    gelu: str,
    fc2: Linear,
    gamma: Tensor | None,
    norm: Norm,
    norm_dtype: torch.dtype | None,
    drop: Tensor | None = None,
) -> str | None:
    reason = _lacks(x) or _is_watched(x) or _lacks_affine(gamma, norm, norm_dtype)
    if reason is not None:
        return reason
    written = linear_dtype(y)
    return None if x.dtype is written or x.dtype is torch.float32 else _lacks_addition(written, x.dtype)


PREDICATES: dict[str, Callable[..., str | None]] = {
    "match": _match,
    "kth_match": _match,
    "random_match": _match,
    "set_match": _match,
    "merge": _tokens,
    "unmerge": _tokens,
    "follow": _follow,
    "restore": _restore,
    "rotate": _rotate,
    "homes": _tokens,
    "pair_bias": _pair_bias,
    "quick_gelu": _tokens,
    "swiglu": _swiglu,
    "swiglu_norm": _swiglu_norm,
    "linear_gelu": _tokens,
    "attention": _attention,
    "merge_add_norm": _merge_add_norm,
    "attend_half": _attend_half,
    "mlp_half": _mlp_half,
}


def remark(op: str, *args: Any, **kwargs: Any) -> str | None:
    """What else to know of an operation that can run on these arguments: some, or a part, may be left to torch."""
    if op == "mlp_half":
        _, y, fc1 = args[:3]
        reason = without_product(y, *fc1)
        inside = "with GELU inside its product where it pays"
        return inside if reason is None else f"without a product with GELU inside: {reason}"
    left: dict[str, Callable[..., str | None]] = {"attention": without_kernel, "linear_gelu": without_product}
    reason = left[op](*args, **kwargs) if op in left else None
    return None if reason is None else f"by torch: {reason}"


def without_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """Why attention on these arguments is left to torch's own function, or None where the kernels compute it.

    ``tome_cuda.attention`` runs either way, so :func:`why_not` doesn't ask: a float32 model has merging to gain.
    """
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return TRANSFORMED
    if dropout_p != 0.0:
        return "the kernels of attention drop no weights"
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return GAPS
    return _lacks_attention(q.dtype, q.shape[3], scale) or (None if k.shape[2] > 0 else NO_KEYS)


def without_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> str | None:
    """Why a linear layer and its GELU are left to torch's own functions, or None where one kernel can compute both.

    The kernel does of few rows and of many; between them a product of cuBLAS and a GELU behind it take less time.
    ``tome_cuda.linear_gelu`` runs either way, as attention does.
    """
    if torch.is_grad_enabled() and _requires_grad(x, weight, bias):
        return "torch's backward pass reads what the kernel of linear_gelu never writes"
    reason = _lacks_hopper(x)
    if reason is not None:
        return reason
    dtype, casts = linear_dtype(x), torch.is_autocast_enabled()
    if dtype is not torch.float16 and dtype is not torch.bfloat16:
        return f"the kernel of linear_gelu knows float16 and bfloat16, not {dtype}"
    if not casts and (weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype)):
        return f"the kernel of linear_gelu takes a weight and a bias of {dtype} like x"
    if x.dtype is torch.float64 or weight.dtype is torch.float64:
        return f"an argument is torch.float64, {KNOWN}"
    outputs, inputs = weight.shape
    if inputs % 8 or outputs % 8 or inputs == 0:
        return f"the kernel of linear_gelu takes multiples of 8 channels, not {inputs} to {outputs}"
    is_dense = weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if not is_dense or (x.dtype is dtype and not _has_rows(x)):
        return "the kernel of linear_gelu reads rows of x at even distances of 16 bytes, and a weight without gaps"
    return None


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer of these tokens."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled() else x.dtype


def _lacks_hopper(x: Tensor) -> str | None:
    runs = x.is_cuda and library.runs_hopper(x.get_device())
    return None if runs else "the kernel of linear_gelu is for GPUs of compute capability 9.0"


def _has_rows(x: Tensor) -> bool:
    """Whether x [..., K] is a list of rows, the same distance from each to the next."""
    if x.dim() == 1 or x.stride(-1) != 1 or x.stride(-2) % 8 or x.stride(-2) < x.shape[-1]:
        return False
    return all(x.shape[i] == 1 or x.stride(i) == x.shape[i + 1] * x.stride(i + 1) for i in range(x.dim() - 2))


KNOWN = "and the kernels know float32, float16 and bfloat16"
GAPS = "the kernels of attention read channels without gaps"
NO_KEYS = "there are no keys"
TRANSFORMED = "a transform of torch.func sees each operation"


def _lacks(tensor: object) -> str | None:
    """The reasons that tokens of any operation can give."""
    if not isinstance(tensor, Tensor):
        return None
    if not tensor.is_cuda:
        return f"the tokens are on {tensor.device.type}, and the kernels run on CUDA devices only"
    if tensor.layout is not torch.strided:
        return f"the tokens are {tensor.layout}, and the kernels read strided tensors only"
    if tensor.dtype is torch.float64:
        return f"the tokens are torch.float64, {KNOWN}"
    reason: str | None = library.unsupported_device(tensor.get_device())
    return reason


def _lacks_double(*values: object) -> str | None:
    for value in values:
        if (value.dtype if isinstance(value, Tensor) else value) is torch.float64:
            return f"an argument is torch.float64, {KNOWN}"
    return None


def _lacks_affine(gamma: Tensor | None, norm: Norm, norm_dtype: torch.dtype | None) -> str | None:
    weight, bias, _ = norm
    double = torch.float64
    if (
        (gamma is not None and gamma.dtype is double)
        or (weight is not None and weight.dtype is double)
        or (bias is not None and bias.dtype is double)
        or norm_dtype is double
    ):
        return f"an argument is torch.float64, {KNOWN}"
    return None


def _lacks_width(keys: object) -> str | None:
    if not isinstance(keys, Tensor) or keys.dim() == 0:
        return None
    width, most = keys.shape[-1], library.info().max_channels
    return f"the metric has {width} channels, and the kernels take at most {most}" if width > most else None


def _lacks_steps(steps: Sequence[Tensor]) -> str | None:
    most = library.info().max_steps
    return f"there are {len(steps)} merges, and the kernels follow at most {most}" if len(steps) > most else None


def _lacks_attention(dtype: torch.dtype, head_dim: int, scale: float | None) -> str | None:
    if dtype is not torch.float16 and dtype is not torch.bfloat16:
        return f"the kernels of attention know float16 and bfloat16, not {dtype}"
    kernels = library.info()
    if head_dim not in kernels.head_dims:
        return f"the kernels of attention know head dimensions {kernels.head_dims}, not {head_dim}"
    if scale is not None and not kernels.least_scale <= scale < float("inf"):
        return f"the kernels of attention take positive scales, not {scale}"
    return None


_lacks_heads = functools.cache(_lacks_attention)  # torch.compile reads no cache


def _lacks_addition(branch: torch.dtype, x: torch.dtype) -> str:
    return f"the kernels add no {branch} to {x}"


def _is_watched(x: Tensor) -> str | None:
    """Whether someone wants to see each operation by itself."""
    if torch.compiler.is_compiling():
        return None
    if x.__class__ is not Tensor:
        return f"the tokens are a {type(x).__name__}, which sees each operation"
    if _len_torch_dispatch_stack() or _len_torch_function_stack():
        return "a mode of torch wants to see each operation"
    if peek_interpreter_stack() is not None:
        return TRANSFORMED
    return None


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
