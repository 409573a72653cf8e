"""Tensors that end where readable memory ends: one byte read behind them stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def at_the_end(tensor: Tensor) -> Tensor:
    """A copy with the same shape and strides whose last element ends at a page that can't be read."""
    if tensor.numel() == 0:
        return tensor.clone()
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = span * tensor.element_size()
    readable = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
    if _LIBC.mprotect(end, mmap.PAGESIZE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=readable - count)  # which keeps the memory
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
