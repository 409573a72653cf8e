"""What the operators themselves refuse: the last check before pointers are followed, whoever calls."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import cuda_emulator as emulator
import pytest
import torch
from strategies import HEAD_DIMS
from torch import Tensor

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

KEYS = torch.randn(2, 3, 9, 16)
X, Y = torch.randn(2, 9, 8), torch.randn(2, 6, 8)
SLOT = torch.arange(9).clamp(max=5).int().repeat(2, 1)
SIZE, TOTAL, STATS = torch.ones(2, 9), torch.ones(2, 6), torch.ones(2, 6, 2)
POSITIONS = torch.arange(1, 9).repeat(2, 1)
LISTS = POSITIONS[:, :3].contiguous(), POSITIONS[:, 3:].contiguous()
HEADS = torch.randn(2, 3, 9, 64).half()
TABLE = torch.randn(9, 128)
SQUARE = torch.eye(8)


def first(x: Tensor, **changed: Any) -> tuple[Any, ...]:
    """The arguments of merge_add_norm, some of them changed."""
    named = {"branch": x, "slot": None, "tokens": 9, "size": None, "weight": None, "bias": None, "eps": 1e-5}
    named |= {"gamma": None, "norm_dtype": torch.float32, "training": True}
    assert named.keys() >= changed.keys()
    return (x, *(named | changed).values())


def back(**changed: Any) -> tuple[Any, ...]:
    """Those of its gradient."""
    named = {"grad_x": Y, "grad_y": Y, "merged": Y, "stats": STATS, "slot": SLOT, "size": SIZE, "total": TOTAL}
    named |= {"weight": None, "gamma": None, "length": 9, "branch_dtype": torch.float32}
    assert named.keys() >= changed.keys()
    return tuple((named | changed).values())


def attend(**changed: Any) -> tuple[Any, ...]:
    """Those of attend_half, with queries, keys and values in three tensors."""
    named = {"x": torch.randn(2, 9, 8), "qkv": [HEADS] * 3, "heads": 3, "size": None, "slot": None, "tokens": 9}
    named |= {"prefix": 1, "is_weighted": False, "scale": 0.1, "qkv_weight": None, "qkv_bias": None}
    named |= {"proj_weight": torch.randn(8, 192).half(), "proj_bias": None, "gamma": None, "norm_weight": None}
    named |= {"norm_bias": None, "eps": 1e-5, "norm_dtype": torch.float32}
    assert named.keys() >= changed.keys()
    return tuple((named | changed).values())


def attended(**changed: Any) -> tuple[Any, ...]:
    """The arguments of attention_backward, some of them changed."""
    named: dict[str, Any] = dict.fromkeys(("grad", "q", "k", "v", "out"), HEADS)
    named |= {"lse": HEADS[..., 0].float().contiguous(), "size": None, "scale": 0.1}
    assert named.keys() >= changed.keys()
    return tuple((named | changed).values())


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("bipartite_match", (KEYS[0, 0], 2, 1), "keys must be"),
        ("bipartite_match", (KEYS.double(), 2, 1), "keys must be float32, float16 or bfloat16"),
        ("bipartite_match", (KEYS[..., :0], 2, 1), "the head dimension must be in"),
        ("bipartite_match", (torch.randn(1, 9, 257), 2, 1), "the head dimension must be in"),
        ("bipartite_match", (KEYS[:, :0], 2, 1), "at least one head"),
        ("bipartite_match", (KEYS, 2, 10), "prefix must be in"),
        ("bipartite_match", (KEYS, 5, 1), r"r must be in \[0, 4\], got 5"),
        ("bipartite_match", (KEYS, 0, 1), "nothing to match"),
        ("kth_match", (KEYS, 1, 1), "k must be in"),
        ("kth_match", (KEYS, 9, 1), "k must be in"),
        ("listed_match", (KEYS, POSITIONS[:, :3].int(), POSITIONS[:, 3:], 3, 1), "sources has the wrong dtype"),
        ("listed_match", (KEYS, POSITIONS[:, :3], POSITIONS[:, 3:].contiguous(), 3, 1), "sources must be contiguous"),
        ("listed_match", (KEYS, POSITIONS[:, :0].contiguous(), POSITIONS, 3, 1), "sources must not be empty"),
        ("listed_match", (KEYS, *[POSITIONS[:, :3].contiguous()] * 2, 3, 1), "must cover the tokens"),
        ("listed_match", (KEYS, *LISTS, 4, 1), r"r must be in \[1, 3\], got 4"),
        ("listed_match", (KEYS, *LISTS, 0, 1), r"r must be in \[1, 3\], got 0"),
        ("merge", (X[0], SLOT, 6, None), "x must have 3 dimensions"),
        ("merge", (X, SLOT.long(), 6, None), "slot has the wrong dtype"),
        ("merge", (X, SLOT[:, :8], 6, None), r"slot must be \[2, 9\]"),
        ("merge", (X, SLOT, 10, None), "tokens must be in"),
        ("merge", (X, SLOT, 0, None), "tokens must be in"),
        ("merge", (X, SLOT, 6, SIZE.half()), "size has the wrong dtype"),
        ("merge", (X, SLOT, 6, SIZE[:1]), "size must be"),
        ("merge_backward", (Y, SLOT, SIZE, TOTAL[:, :5]), "total must be"),
        ("unmerge", (Y, SLOT[0]), "slot must be"),
        ("unmerge", (Y.double(), SLOT), "x must be float32"),
        ("unmerge_backward", (X, SLOT[:1], 6), "slot must be"),
        ("merge_add_norm", first(X[:, 1:], branch=X, tokens=8), "no more tokens than x"),
        ("merge_add_norm", first(X, branch=X[:1]), "branch must be like x"),
        ("merge_add_norm", first(X.half(), branch=X), "branch has the wrong dtype"),
        ("merge_add_norm", first(X, tokens=6), "tokens must be in"),
        ("merge_add_norm", first(X, eps=0.0), "eps must be positive"),
        ("merge_add_norm", first(X, weight=torch.ones(7)), r"weight must be \[8\]"),
        ("merge_add_norm", first(X, bias=torch.ones(8).double()), "bias must be float32"),
        ("merge_add_norm", first(X, branch=None, slot=SLOT, tokens=6), "branch"),
        ("merge_add_norm", first(X, norm_dtype=torch.float64), "y must be float32"),
        ("merge_add_norm_backward", back(merged=Y.mT.contiguous().mT), "merged must be contiguous"),
        ("merge_add_norm_backward", back(merged=Y[:, :5].contiguous()), "must be like its output"),
        ("merge_add_norm_backward", back(merged=Y.half()), "grad_x has the wrong dtype"),
        ("merge_add_norm_backward", back(stats=STATS.mT.contiguous().mT), "stats must be contiguous"),
        ("merge_add_norm_backward", back(stats=STATS[:, :5].contiguous()), "stats must be"),
        ("merge_add_norm_backward", back(stats=STATS.double()), "stats has the wrong dtype"),
        ("merge_add_norm_backward", back(total=None), "a merge needs its totals"),
        ("merge_add_norm_backward", back(slot=None), "a merge needs its totals"),
        ("merge_add_norm_backward", back(length=8), "slot must be"),
        ("column_sums", (X, Y, None), "must have one shape"),
        ("column_sums", (Y, Y, STATS.mT.contiguous().mT), "stats must be contiguous"),
        ("column_sums", (Y, Y, STATS[:1].contiguous()), "stats must be"),
        ("follow", ([SLOT.long()],), "a slot map has the wrong dtype"),
        ("follow", ([SLOT, SLOT[:1]],), "a slot map must be"),
        ("follow", ([SLOT] * 65,), "at most 64 slot maps"),
        ("restore", (Y, None, [SLOT], torch.ones(8)), "nothing to scale"),
        ("restore", (Y, X, [SLOT], None), "branch must be like x"),
        ("rotate", (HEADS[0], HEADS, TABLE, None, 0, True, False), "q must have 4 dimensions"),
        ("rotate", (HEADS, HEADS[:, 0], TABLE, None, 0, True, False), "k must have 4 dimensions"),
        ("rotate", (HEADS, HEADS.float(), TABLE, None, 0, True, False), "k has the wrong dtype"),
        ("rotate", (HEADS, HEADS[:, :, :8], TABLE, None, 0, True, False), "k must have the batch, tokens"),
        ("rotate", (HEADS[..., :63],) * 2 + (TABLE, None, 0, True, False), "must be even, got 63"),
        ("rotate", (HEADS, HEADS, TABLE, None, 10, True, False), r"prefix must be in \[0, 9\]"),
        ("rotate", (HEADS, HEADS, TABLE.double(), None, 0, True, False), "the table must be float32"),
        ("rotate", (HEADS, HEADS, TABLE[0], None, 0, True, False), "2 to 4 dimensions"),
        ("rotate", (HEADS, HEADS, TABLE[:, 1:], None, 0, True, False), "must have 128 channels"),
        ("rotate", (HEADS, HEADS, TABLE, None, 1, True, False), "must be of 8 places, got 9"),
        ("rotate", (HEADS, HEADS, TABLE.expand(2, -1, -1), None, 0, True, False), "1 or all heads, got 2"),
        ("rotate", (HEADS, HEADS[:, :1], TABLE.expand(3, -1, -1), None, 0, True, False), "1 or all heads, got 3"),
        ("rotate", (HEADS, HEADS, TABLE.expand(3, 1, -1, -1), None, 0, True, False), "1 or all images, got 3"),
        ("rotate", (HEADS, HEADS, TABLE, SLOT[:, 1:], 0, True, False), r"home must be \[2, 9\]"),
        ("rotate", (HEADS, HEADS, TABLE, SIZE, 0, True, False), "home has the wrong dtype"),
        ("homes", (SLOT[0], 6, None, None), "slot must have 2 dimensions"),
        ("homes", (SLOT.long(), 6, None, None), "slot has the wrong dtype"),
        ("homes", (SLOT, 10, None, None), r"tokens must be in \[0, 9\], got 10"),
        ("homes", (SLOT, 6, SLOT, None), "home has the wrong dtype"),
        ("homes", (SLOT, 6, SLOT[:1].long(), None), r"home must be \[2, 9\]"),
        ("homes", (SLOT, 6, None, SLOT), "valid has the wrong dtype"),
        ("homes", (SLOT, 6, None, SLOT[:, 1:].bool()), r"valid must be \[2, 9\]"),
        ("quick_gelu", (X[0],), "x must have 3 dimensions"),
        ("quick_gelu", (X.double(),), "x must be float32"),
        ("swiglu", (X[0], X), "gate must have 3 dimensions"),
        ("swiglu", (X.half(), X), "gate has the wrong dtype"),
        ("swiglu", (X[:, :8], X), "gate must have the shape of x"),
        ("swiglu_norm", (X, X, 0, None, None, 1e-5), "width must be in"),
        ("swiglu_norm", (X, X, 4, X[0, 0], None, 1e-5), r"weight must be \[4\]"),
        ("swiglu_norm", (X, X, 4, None, None, 0.0), "eps must be positive"),
        ("swiglu_norm", (X[:, :8], X, 4, None, None, 1e-5), "gate must have the shape of x"),
        ("pair_bias", (X[0], SLOT.long(), None), "bias must have 3 dimensions"),
        ("pair_bias", (X[:, :3], SLOT.long(), None), r"bias must be \[H, N, N\]"),
        ("pair_bias", (X[:, :3, :3], SLOT, None), "home has the wrong dtype"),
        ("pair_bias", (X[:, :3, :3], SLOT.long(), SIZE[:, 1:]), r"key_bias must be \[2, 9\]"),
        ("linear_gelu", (X[0], SQUARE, None, False, -1), "x must have 3 dimensions"),
        ("linear_gelu", (X, SQUARE, None, False, 0), "tile must be -1, got 0"),
        ("attention", (HEADS[0],) * 3 + (None, 0.1), "q must have 4 dimensions"),
        ("attention", (HEADS.float(),) * 3 + (None, 0.1), "q must be float16 or bfloat16"),
        ("attention", (HEADS, HEADS.bfloat16(), HEADS, None, 0.1), "k has the wrong dtype"),
        ("attention", (HEADS, HEADS[:, :2], HEADS, None, 0.1), "k must have the batch, heads"),
        ("attention", (HEADS, HEADS, HEADS[:, :, :8], None, 0.1), "as many rows as k"),
        ("attention", (HEADS, HEADS.mT.contiguous().mT, HEADS, None, 0.1), "channels without gaps"),
        ("attention", (HEADS[..., :48],) * 3 + (None, 0.1), "no kernel for the head dimension 48"),
        ("attention", (HEADS, HEADS[:, :, :0], HEADS[:, :, :0], None, 0.1), "at least one key"),
        ("attention", (HEADS, HEADS, HEADS, SIZE[:, :8], 0.1), "size must be"),
        ("attention", (HEADS, HEADS, HEADS, SIZE.half(), 0.1), "size has the wrong dtype"),
        ("attention", (HEADS, HEADS, HEADS, None, 0.0), "scale must be positive"),
        ("attention_training", (HEADS, HEADS, HEADS[:, :, :8], None, 0.1), "as many rows as k"),
        ("attention_backward", attended(grad=HEADS.float()), "grad has the wrong dtype"),
        ("attention_backward", attended(grad=HEADS[:, :, :8]), "as many rows as q"),
        ("attention_backward", attended(out=HEADS.mT.contiguous().mT), "out must have channels without gaps"),
        ("attention_backward", attended(lse=HEADS[..., 0].float().mT.contiguous().mT), "lse must be"),
        ("attention_backward", attended(lse=HEADS[..., 0].contiguous()), "lse has the wrong dtype"),
        ("attention_backward", attended(size=SIZE[:, :8]), "size must be"),
        ("attend_half", attend(heads=2), "q must have 2 heads"),
        ("attend_half", attend(qkv=[HEADS] * 2), "one tensor or three"),
        ("attend_half", attend(qkv_weight=SQUARE), "projected already"),
        ("attend_half", attend(qkv=[HEADS]), "qkv must be"),
        ("attend_half", attend(qkv=[X]), "can't be split"),
        ("mlp_half", (X[0], X, SQUARE, None, 0, SQUARE, None, None, None, None, 1e-5, torch.float32),
         "x must have 3 dimensions"),
        ("mlp_half", (X, X, SQUARE, None, 3, SQUARE, None, None, None, None, 1e-5, torch.float32),
         "gelu must be 0, 1 or 2, got 3"),
    ],
)  # fmt: skip
def test_refused(name: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        emulator.run(name, *arguments)


def test_what_is_shared_with_python_is_as_promised() -> None:
    describe = emulator.library().tome_cuda_build_info
    describe.restype = ctypes.c_char_p
    told = json.loads(describe())
    assert tuple(told["head_dims"]) == HEAD_DIMS
    assert (told["max_channels"], told["least_scale"], told["max_steps"]) == (256, 1e-30, 64)
    assert told["least_rows"] == 2048


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 9, 0)])
def test_empty_tensors_launch_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    slot = SLOT[: shape[0]]
    launches = int(shape[0] > 0)  # of sizes there are still sums
    assert emulator.planned("merge", x, slot, 6, None) == launches
    assert emulator.planned("unmerge", x[:, :6], slot) == 0
    assert emulator.planned("unmerge_backward", x, slot, 6) == 0
    assert emulator.planned("restore", x[:, :6], x[:, :6], [slot], None) == 0
