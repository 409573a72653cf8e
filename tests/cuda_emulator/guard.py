"""Tensors that end where readable memory ends: one byte read behind them stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def at_the_end(tensor: Tensor) -> Tensor:
    """A copy with the same shape and strides whose last element ends at a page that can't be read.

    The memory is never given back: tests are short.
    """
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = span * tensor.element_size() if tensor.numel() else 0
    page = mmap.PAGESIZE
    pages = (count + page - 1) // page + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _LIBC.mmap(None, pages * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    end = start + (pages - 1) * page
    if _LIBC.mprotect(end, page, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    if count == 0:
        return tensor.clone()
    buffer = (ctypes.c_char * count).from_address(end - count)
    flat = torch.frombuffer(buffer, dtype=tensor.dtype)
    copy = flat.as_strided(tensor.shape, tensor.stride())
    copy.copy_(tensor)
    return copy
