"""A wrong argument raises at once and names the value and what was expected, on every backend."""

import pytest
import torch

from tome import ops

X = torch.randn(2, 8, 4)
SLOT = torch.arange(8, dtype=torch.int32).expand(2, 8).contiguous()
SIZE = torch.ones(2, 8)
Q = torch.randn(2, 2, 8, 4)
W = torch.ones(4)

MATCH = [
    ((X.int(), 1), TypeError, "keys must be float16, bfloat16, float32 or float64, got torch.int32"),
    ((X[0], 1), ValueError, r"keys must be \[B, N, D\] or \[B, H, N, D\], got shape \(8, 4\)"),
    ((X[..., :0], 1), ValueError, "at least one channel"),
    (([1.0], 1), TypeError, "keys must be a tensor .*, got list"),
    ((X, -1), ValueError, "must be at least .*, got -1"),
    ((X, 1.5), TypeError, "must be an integer, got 1.5"),
    ((X, True), TypeError, "must be an integer, got True"),
    ((X, 1, 9), ValueError, r"prefix must be in \[0, 8\], got 9"),
    ((X, 1, -1), ValueError, r"prefix must be in \[0, 8\], got -1"),
]
ALL = torch.arange(8).repeat(2, 1)
PAIRS = torch.randn(3, 8, 8)
SETS = ALL[:, :3], ALL[:, 3:]
SET_MATCH = [
    ((X.int(), *SETS, 1), TypeError, "keys must be float16"),
    ((X, *SETS, -1), ValueError, "must be at least .*, got -1"),
    ((X, *SETS, 1, 9), ValueError, r"prefix must be in \[0, 8\], got 9"),
    ((X, *SETS, 1, 1), ValueError, "must be the 7 tokens behind the prefix, got 3 and 5"),
    ((X, ALL[:, :3].int(), ALL[:, 3:], 1), TypeError, "sources must be int64, got torch.int32"),
    ((X, ALL[0, :3], ALL[:, 3:], 1), ValueError, r"sources must be int64 \[B, S\], got shape \(3,\)"),
    ((X, ALL[:, :3], ALL[:1, 3:], 1), ValueError, r"targets must be \[2, T\], got shape \(1, 5\)"),
    ((X, ALL[:, :3], [3], 1), TypeError, "targets must be a tensor .*, got list"),
]
MERGE = [
    ((X.long(), SLOT, 8), TypeError, "x must be float16"),
    ((X[0], SLOT, 8), ValueError, r"x must be \[B, N, C\]"),
    ((X, SLOT.long(), 8), TypeError, "slot must be int32, got torch.int64"),
    ((X, SLOT[:, :7], 8), ValueError, r"slot must be \[2, 8\], got shape \(2, 7\)"),
    ((X, SLOT[0], 8), ValueError, r"slot must be int32 \[B, N\], got shape \(8,\)"),
    ((X, None, 8), TypeError, "slot must be a tensor .*, got NoneType"),
    ((X, SLOT, 9), ValueError, r"tokens must be in \[1, 8\], got 9"),
    ((X, SLOT, 0), ValueError, r"tokens must be in \[1, 8\], got 0"),
    ((X, SLOT, 8, SIZE.half()), TypeError, "size must be float32 .*, got torch.float16"),
    ((X, SLOT, 8, SIZE[:, 1:]), ValueError, r"size must be \[2, 8\], got shape \(2, 7\)"),
]
ATTENTION = [
    ((Q, Q.half(), Q), TypeError, "q, k and v must share dtype and device, got k torch.float16"),
    ((Q[0], Q, Q), ValueError, r"q must be \[B, H, N, D\]"),
    ((Q, Q, Q[:, :, 1:]), ValueError, r"\(2, 2, 8, 4\) and \(2, 2, 7, 4\)"),
    ((Q, Q, Q, SIZE[:1]), ValueError, r"size must be \[2, 8\]"),
    ((Q, Q, Q, None, None, 1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
]
ADD_NORM = [
    ((X[:, 1:], X, None, 7, None, W, W, 1e-5), ValueError, "branch must have the shape of x"),
    ((X, X[:1, 1:], None, 8, None, W, W, 1e-5), ValueError, "branch must have the shape of x"),
    ((X.half(), X, None, 8, None, W, W, 1e-5), TypeError, "branch must be torch.float16 like x"),
    ((X, X, None, 7, None, W, W, 1e-5), ValueError, r"tokens must be in \[8, 8\], got 7"),
    ((X, X, None, 8, None, W[1:], W, 1e-5), ValueError, r"weight must be \[4\], got shape \(3,\)"),
    ((X, X, None, 8, None, W, W.int(), 1e-5), TypeError, "bias must be float16"),
    ((X, X, None, 8, None, W, W, 0.0), ValueError, "eps must be positive, got 0.0"),
    ((X, X, SLOT.long(), 8, None, W, W, 1e-5), TypeError, "slot must be int32"),
    ((X, None, None, 8, None, W, W, 1e-5, W), ValueError, "gamma must be None where there is no branch"),
    ((X, None, SLOT, 8, None, W, W, 1e-5), ValueError, "slot must be None where there is no branch"),
    ((X, X, None, 8, None, W, W, 1e-5, None, torch.int8), TypeError, "norm_dtype must be float16.*, got torch.int8"),
]
RESTORE = [
    ((X[0], None, [SLOT]), ValueError, r"x must be \[B, M, C\]"),
    ((X, None, SLOT), TypeError, "steps must be a tuple or list of tensors, got Tensor"),
    ((X, None, [SLOT.long()]), TypeError, r"steps\[0\] must be int32, got torch.int64"),
    ((X, None, [SLOT, SLOT[:1]]), ValueError, r"steps\[1\] must be \[2, N\], got shape \(1, 8\)"),
    ((X, None, [SLOT, SLOT[:, 1:]]), ValueError, r"must lead to the 8 tokens of x, got shape \(2, 7\)"),
    ((X, X[:, 1:], [SLOT]), ValueError, "branch must have the shape of x"),
    ((X, None, [SLOT], W), ValueError, "gamma must be None where there is no branch"),
    ((X, X, [SLOT], W[1:]), ValueError, r"gamma must be \[4\], got shape \(3,\)"),
]
FOLLOW = [
    (([],), ValueError, "steps must hold at least one slot map, got none"),
    ((SLOT,), TypeError, "steps must be a tuple or list of tensors, got Tensor"),
    (([None],), TypeError, r"steps\[0\] must be a tensor int32 \[B, N\], got NoneType"),
    (([SLOT[:, 1:], SLOT],), ValueError, r"from first to last: steps\[1\] has 8 tokens, the one before it 7"),
]
TABLE, HOME = torch.randn(7, 8), torch.arange(8).expand(2, 8)
ROTATE = [
    ((Q[0], Q, TABLE, None, 1), ValueError, r"q must be \[B, H, N, D\]"),
    ((Q, Q.half(), TABLE, None, 1), TypeError, "q and k must share dtype and device, got torch.float32 on"),
    ((Q, Q[:, :, 1:], TABLE, None, 1), ValueError, r"k must have the batch, tokens and channels of q \(2, 2, 8, 4\)"),
    ((Q[..., :3], Q[..., :3], TABLE, None, 1), ValueError, "an even number of channels, got 3"),
    ((Q, Q, TABLE, None, 9), ValueError, r"prefix must be in \[0, 8\], got 9"),
    ((Q, Q, TABLE.int(), None, 1), TypeError, "table must be float16"),
    ((Q, Q, TABLE[:, 1:], None, 1), ValueError, r"table must be \[P, 2 \* D\].*, got shape \(7, 7\)"),
    ((Q, Q, TABLE.expand(3, 7, 8), None, 1), ValueError, r"table must be .*, got shape \(3, 7, 8\)"),
    ((Q, Q, TABLE.expand(3, 1, 7, 8), None, 1), ValueError, r"table must be .*, got shape \(3, 1, 7, 8\)"),
    ((Q, Q[:, :1], TABLE.expand(2, 7, 8), None, 1), ValueError, "for all heads alike where k has 1 and q 2, got 2"),
    ((Q, Q, TABLE), ValueError, "table must be of the 8 tokens behind the prefix, got 7"),
    ((Q, Q, TABLE, HOME.float(), 1), TypeError, "home must be int64 or int32, got torch.float32"),
    ((Q, Q, TABLE, HOME[:, 1:], 1), ValueError, r"home must be \[2, 8\], got shape \(2, 7\)"),
]
HOMES = [
    ((SLOT.long(), 8), TypeError, "slot must be int32"),
    ((SLOT[0], 8), ValueError, r"slot must be int32 \[B, N\], got shape \(8,\)"),
    ((SLOT, 9), ValueError, r"tokens must be in \[1, 8\], got 9"),
    ((SLOT, 8, HOME.int()), TypeError, "home must be int64, got torch.int32"),
    ((SLOT, 8, HOME[:1]), ValueError, r"home must be \[2, 8\], got shape \(1, 8\)"),
    ((SLOT, 8, HOME, SIZE), TypeError, "valid must be bool, got torch.float32"),
]
SWIGLU = [
    ((X.int(), X), TypeError, "gate must be float16"),
    ((X, None), TypeError, r"x must be a tensor \[..., C\], got NoneType"),
    ((X, X.half()), TypeError, "gate and x must share dtype and device, got torch.float32 on"),
    ((X, X[:, :7]), ValueError, r"x must have the shape of gate \(2, 8, 4\), got \(2, 7, 4\)"),
]
SWIGLU_NORM = [
    *(((*args, 4, None, None, 1e-5), *expected) for args, *expected in SWIGLU),
    ((X, X, 5, None, None, 1e-5), ValueError, r"width must be in \[1, 4\], got 5"),
    ((X, X, 0, None, None, 1e-5), ValueError, r"width must be in \[1, 4\], got 0"),
    ((X, X, 3, W, None, 1e-5), ValueError, r"weight must be \[3\], got shape \(4,\)"),
    ((X, X, 4, W, W.int(), 1e-5), TypeError, "bias must be float16"),
    ((X, X, 4, W, W, 0.0), ValueError, "eps must be positive, got 0.0"),
]
PAIR_BIAS = [
    ((Q[0], ALL), ValueError, r"bias must be \[H, N, N\], got shape \(2, 8, 4\)"),
    ((X[0], ALL), ValueError, r"bias must be \[H, N, N\], got shape \(8, 4\)"),
    ((PAIRS.int(), ALL), TypeError, "bias must be float16"),
    ((PAIRS, ALL.int()), TypeError, "home must be int64, got torch.int32"),
    ((PAIRS, ALL[0]), ValueError, r"home must be int64 \[B, M\], got shape \(8,\)"),
    ((PAIRS, None), TypeError, "home must be a tensor .*, got NoneType"),
    ((PAIRS, ALL, SIZE[:, 1:]), ValueError, r"key_bias must be \[2, 8\], got shape \(2, 7\)"),
    ((PAIRS, ALL, ALL), TypeError, "key_bias must be float16 or .*, got torch.int64"),
]
PROJ, NORM, LINEAR = (torch.randn(4, 8), None), (W, W, 1e-5), (torch.randn(24, 4), torch.randn(24))
PACKED = torch.randn(2, 8, 24)
NORMED = {"gamma": None, "norm": NORM, "norm_dtype": None}
ATTEND = {"x": X, "qkv": (Q, Q, Q), "heads": 2, "size": None, "slot": None, "tokens": 6, "prefix": 1}
ATTEND |= {"is_weighted": True, "scale": None, "qkv_linear": None, "proj": PROJ, **NORMED}
MLP = {"x": X, "y": X, "fc1": LINEAR, "gelu": "erf", "fc2": (torch.randn(4, 24), None), **NORMED}
HALF = [
    ({"norm": (W, W)}, TypeError, r"norm must be \(weight, bias, eps\)"),
    ({"norm": (W, W, 0.0)}, ValueError, "eps must be positive, got 0.0"),
    ({"norm": (W[1:], W, 1e-5)}, ValueError, r"weight must be \[4\], got shape \(3,\)"),
    ({"gamma": W.int()}, TypeError, "gamma must be float16"),
    ({"norm_dtype": torch.int8}, TypeError, "norm_dtype must be float16.*, got torch.int8"),
    ({"x": X[0]}, ValueError, r"x must be \[B, N, C\]"),
]
ATTEND_HALF = [
    *HALF,
    ({"qkv": Q}, TypeError, "qkv must be a tuple or list of tensors, got Tensor"),
    ({"qkv": (Q, Q)}, ValueError, r"qkv must be \(q, k, v\) or one tensor alone, got 2 tensors"),
    ({"qkv": (Q, Q, Q.half())}, TypeError, "q, k and v must share dtype and device, got v torch.float16"),
    ({"qkv": (Q[:, :, 1:],) * 3}, ValueError, r"q, k and v must be \[2, 2, 8, D\], got shape \(2, 2, 7, 4\)"),
    ({"qkv_linear": LINEAR}, ValueError, "qkv_linear must be None where q, k and v are given apart"),
    ({"qkv": (PACKED[..., 1:],)}, ValueError, r"23 channels of qkv cannot be split into 3 \* 2 heads"),
    ({"qkv": (PACKED[:, 1:],)}, ValueError, r"qkv must have the tokens of x \(2, 8, 4\), got shape \(2, 7, 24\)"),
    ({"qkv": (X,), "qkv_linear": (LINEAR[0].T, None)}, ValueError, r"qkv_linear's weight must be \[4, 4\]"),
    ({"qkv": (X,), "qkv_linear": LINEAR[0]}, TypeError, r"qkv_linear must be a pair \(weight, bias or None\)"),
    ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
    ({"heads": 3}, ValueError, r"q, k and v must be \[2, 3, 8, D\]"),
    ({"tokens": 4}, ValueError, r"tokens must be in \[5, 8\], got 4"),
    ({"tokens": 9}, ValueError, r"tokens must be in \[5, 8\], got 9"),
    ({"slot": SLOT, "tokens": 0}, ValueError, r"tokens must be in \[1, 8\], got 0"),
    ({"slot": SLOT.long()}, TypeError, "slot must be int32"),
    ({"prefix": 9}, ValueError, r"prefix must be in \[0, 8\], got 9"),
    ({"size": SIZE.half()}, TypeError, "size must be float32"),
    ({"proj": (PROJ[0].T, None)}, ValueError, r"proj's weight must be \[4, 8\], got shape \(8, 4\)"),
    ({"proj": (PROJ[0], W[1:])}, ValueError, r"proj's bias must be \[4\], got shape \(3,\)"),
]
MLP_HALF = [
    *HALF,
    ({"y": X[:, 1:]}, ValueError, r"y must have the tokens of x \(2, 8, 4\), got shape \(2, 7, 4\)"),
    ({"fc1": (LINEAR[0].T, None)}, ValueError, r"fc1's weight must be \[4, 4\], got shape \(4, 24\)"),
    ({"fc2": LINEAR}, ValueError, r"fc2's weight must be \[4, 24\], got shape \(24, 4\)"),
    ({"gelu": "none"}, ValueError, "gelu must be one of erf, tanh, quick, got 'none'"),
    ({"fc2": (LINEAR[0].T.int(), None)}, TypeError, "fc2's weight must be float16"),
]
CASES = [
    *(("match", *case) for case in MATCH),
    *(("kth_match", *case) for case in MATCH),
    *(("random_match", *case) for case in MATCH),
    *(("set_match", *case) for case in SET_MATCH),
    *(("merge", *case) for case in MERGE),
    ("unmerge", (X[0], SLOT), ValueError, r"x must be \[B, M, C\]"),
    ("unmerge", (X, SLOT[:1]), ValueError, r"slot must be \[2, N\], got shape \(1, 8\)"),
    ("unmerge", (X, SLOT.long()), TypeError, "slot must be int32"),
    *(("attention", *case) for case in ATTENTION),
    *(("merge_add_norm", *case) for case in ADD_NORM),
    *(("restore", *case) for case in RESTORE),
    *(("follow", *case) for case in FOLLOW),
    *(("rotate", *case) for case in ROTATE),
    *(("homes", *case) for case in HOMES),
    *(("swiglu", *case) for case in SWIGLU),
    *(("swiglu_norm", *case) for case in SWIGLU_NORM),
    *(("pair_bias", *case) for case in PAIR_BIAS),
    ("quick_gelu", (X.long(),), TypeError, "x must be float16"),
    ("quick_gelu", (W[0],), ValueError, r"x must be \[..., C\], got shape \(\)"),
    ("linear_gelu", (X, LINEAR[0].T), ValueError, r"weight must be \[4, 4\], got shape \(4, 24\)"),
    ("linear_gelu", (X, LINEAR[0], W), ValueError, r"bias must be \[24\], got shape \(4,\)"),
    ("linear_gelu", (X, LINEAR[0].half()), TypeError, "weight must be torch.float32 like x, got torch.float16"),
    ("linear_gelu", (X, LINEAR[0], None, "erf"), ValueError, "approximate must be one of none, tanh, got 'erf'"),
    ("linear_gelu", (X.long(), LINEAR[0]), TypeError, "x must be float16"),
    *(("attend_half", tuple((ATTEND | change).values()), *expected) for change, *expected in ATTEND_HALF),
    *(("mlp_half", tuple((MLP | change).values()), *expected) for change, *expected in MLP_HALF),
]


def on(device, value):
    if isinstance(value, (tuple, list)):
        return type(value)(on(device, v) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("op", "args", "error", "message"), CASES)
def test_bad_arguments(device, op, args, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, op)(*on(device, args))


@pytest.mark.parametrize("values", [[0, 1, 1, 1], [0, 2, 3, 4], [1, 2, 3, 3], [-1, 0, 1, 2], [0, 1, 2, 9]])
def test_a_map_that_is_not_onto_is_refused_where_reading_it_is_free(values):
    slot = torch.tensor([[0, 1, 2, 2], values], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slot must map onto \[0, 3\) in every row"):
        ops.merge(torch.randn(2, 4, 2), slot, 3)


@pytest.mark.parametrize("targets", [[3, 4, 5, 6, 6], [2, 3, 4, 5, 6], [3, 4, 5, 6, 8], [-1, 4, 5, 6, 7]])
def test_sets_that_do_not_cover_the_tokens_are_refused_where_reading_them_is_free(targets):
    with pytest.raises(ValueError, match="must hold each of the positions 0 to 7 once"):
        ops.set_match(X, ALL[:, :3], torch.tensor([ALL[0, 3:].tolist(), targets]), 2)


def test_unmerge_refuses_a_slot_beyond_the_tokens():
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        ops.unmerge(X[:, :3], SLOT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="slot must be on cuda:0 like the tokens, got cpu"):
        ops.merge(X.cuda(), SLOT, 8)
    with pytest.raises(ValueError, match="size must be on cuda:0"):
        ops.merge(X.cuda(), SLOT.cuda(), 8, SIZE)
