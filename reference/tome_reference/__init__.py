"""Token merging in plain PyTorch: the definition of every operation.

A merge is a map. ``slot``, an int32 tensor [B, N], gives the output position of every input token; matching
makes it, merging averages along it, unmerging gathers through it. What another backend computes is right when
it agrees with this package.
"""

from tome_reference.activation import linear_gelu, quick_gelu, swiglu, swiglu_norm
from tome_reference.attention import attention
from tome_reference.halves import attend_half, mlp_half
from tome_reference.matching import kth_match, match, max_r, random_match, set_match
from tome_reference.merging import follow, merge, restore, unmerge
from tome_reference.norm import merge_add_norm
from tome_reference.position import homes, pair_bias, rotate

__all__ = [
    "attend_half",
    "attention",
    "follow",
    "homes",
    "kth_match",
    "linear_gelu",
    "match",
    "max_r",
    "merge",
    "merge_add_norm",
    "mlp_half",
    "pair_bias",
    "quick_gelu",
    "random_match",
    "restore",
    "rotate",
    "set_match",
    "swiglu",
    "swiglu_norm",
    "unmerge",
]
