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
    ((X, X[:, 1:], None, 8, None, W, W, 1e-5), ValueError, "branch must have the shape of x"),
    ((X.half(), X, None, 8, None, W, W, 1e-5), TypeError, "branch must be torch.float16 like x"),
    ((X, X, None, 7, None, W, W, 1e-5), ValueError, r"tokens must be in \[8, 8\], got 7"),
    ((X, X, None, 8, None, W[1:], W, 1e-5), ValueError, r"weight must be \[4\], got shape \(3,\)"),
    ((X, X, None, 8, None, W, W.int(), 1e-5), TypeError, "bias must be float16"),
    ((X, X, None, 8, None, W, W, 0.0), ValueError, "eps must be positive, got 0.0"),
    ((X, X, SLOT.long(), 8, None, W, W, 1e-5), TypeError, "slot must be int32"),
    ((X, X, None, 8, None, W, W, 1e-5, None, torch.int8), TypeError, "norm_dtype must be float16.*, got torch.int8"),
]
CASES = [
    *(("match", *case) for case in MATCH),
    *(("kth_match", *case) for case in MATCH),
    *(("random_match", *case) for case in MATCH),
    *(("merge", *case) for case in MERGE),
    ("unmerge", (X[0], SLOT), ValueError, r"x must be \[B, M, C\]"),
    ("unmerge", (X, SLOT[:1]), ValueError, r"slot must be \[2, N\], got shape \(1, 8\)"),
    ("unmerge", (X, SLOT.long()), TypeError, "slot must be int32"),
    *(("attention", *case) for case in ATTENTION),
    *(("merge_add_norm", *case) for case in ADD_NORM),
]


@pytest.mark.parametrize(("op", "args", "error", "message"), CASES)
def test_bad_arguments(device, op, args, error, message):
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error, match=message):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("values", [[0, 1, 1, 1], [0, 2, 3, 4], [1, 2, 3, 3], [-1, 0, 1, 2], [0, 1, 2, 9]])
def test_a_map_that_is_not_onto_is_refused_where_reading_it_is_free(values):
    slot = torch.tensor([[0, 1, 2, 2], values], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slot must map onto \[0, 3\) in every row"):
        ops.merge(torch.randn(2, 4, 2), slot, 3)


def test_unmerge_refuses_a_slot_beyond_the_tokens():
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        ops.unmerge(X[:, :3], SLOT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="slot must be on cuda:0 like the tokens, got cpu"):
        ops.merge(X.cuda(), SLOT, 8)
    with pytest.raises(ValueError, match="size must be on cuda:0"):
        ops.merge(X.cuda(), SLOT.cuda(), 8, SIZE)
