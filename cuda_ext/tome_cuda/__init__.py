"""Token merging in CUDA: the operations of ``tome_reference`` as kernels for NVIDIA GPUs.

Importing this package loads no library and asks for no GPU. The first call of an operation, or of
:func:`build_info`, loads the kernels. :func:`unavailable` says why they can't run on this machine at all, and
:func:`why_not` why an operation can't run on given arguments.
"""

from .library import LibraryError, build_info, unavailable
from .ops import (
    attend_half,
    attention,
    follow,
    homes,
    kth_match,
    linear_gelu,
    match,
    max_r,
    merge,
    merge_add_norm,
    mlp_half,
    pair_bias,
    quick_gelu,
    random_match,
    restore,
    rotate,
    set_match,
    swiglu,
    swiglu_norm,
    unmerge,
)
from .predicates import PREDICATES, remark, why_not
from .registration import operators

__all__ = [
    "PREDICATES",
    "LibraryError",
    "attend_half",
    "attention",
    "build_info",
    "follow",
    "homes",
    "kth_match",
    "linear_gelu",
    "match",
    "max_r",
    "merge",
    "merge_add_norm",
    "mlp_half",
    "operators",
    "pair_bias",
    "quick_gelu",
    "random_match",
    "remark",
    "restore",
    "rotate",
    "set_match",
    "swiglu",
    "swiglu_norm",
    "unavailable",
    "unmerge",
    "why_not",
]
