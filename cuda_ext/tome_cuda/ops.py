"""The operations on top of the kernels: those of ``tome_reference``, with its signatures and its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_cuda import checks, predicates
from tome_cuda.registration import operators

T = TypeVar("T")
C = TypeVar("C", Tensor, "Tensor | None")


def max_r(n: int, prefix: int) -> int:
    """The most tokens that one bipartite matching of ``n`` tokens can merge: half the unprotected ones."""
    return (n - prefix) // 2


def match(keys: Tensor, r: int, prefix: int = 1) -> Tensor:
    """Bipartite soft matching (section 3, "Bipartite Soft Matching").

    Tokens at even positions form set A, at odd positions set B. Each A token is paired with its most similar B
    token and the ``r`` best pairs are merged. Output order: prefix, unmerged A ascending, B ascending.

    Args:
        keys: [B, N, D], or [B, H, N, D] whose mean over heads is the metric; floating point, any strides.
        r: how many tokens to merge; clipped to (N - prefix) // 2. 0 gives the identity.
        prefix: how many leading tokens (class, distillation, registers) are neither sources nor targets.

    Returns:
        slot, int32 [B, N], onto [0, N - r). On equal scores the lowest index wins, both for a token's best
        target and for the choice of the r pairs. A zero vector scores 0, NaN scores -inf.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, r or prefix.

    """
    checks.keys(keys, prefix)
    checks.integer("r", r, 0)
    r = min(r, max_r(keys.shape[-2], prefix))
    if r == 0:
        return _identity(keys)
    return operators().bipartite_match(keys.detach(), r, prefix)  # type: ignore[no-any-return]


def kth_match(keys: Tensor, k: int, prefix: int = 1) -> Tensor:
    """K-th bipartite matching: of each run of ``k`` tokens the last is a target, all others merge into their best.

    Args:
        keys: as for :func:`match`.
        k: the length of a run; clipped to N - prefix, so that one target remains. 1 gives the identity.
        prefix: how many leading tokens stay untouched; runs are counted behind them.

    Returns:
        slot, int32 [B, N], onto [0, prefix + (N - prefix) // k); kept tokens stay in ascending order, and a last
        run shorter than k merges into the targets before it.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, k or prefix.

    """
    checks.keys(keys, prefix)
    checks.integer("k", k, 1)
    k = min(k, keys.shape[-2] - prefix)
    if k <= 1:
        return _identity(keys)
    return operators().kth_match(keys.detach(), k, prefix)  # type: ignore[no-any-return]


def random_match(keys: Tensor, r: int, prefix: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Random matching: ``r`` tokens drawn at random in each image merge into their best among the others.

    Args:
        keys: as for :func:`match`.
        r: how many tokens to merge; clipped to (N - prefix) // 2.
        prefix: how many leading tokens stay untouched.
        generator: the source of randomness, on the device of ``keys``; None for PyTorch's default. One
            ``torch.rand(B, N - prefix)`` is drawn, and the r tokens with the smallest numbers are merged.

    Returns:
        slot, int32 [B, N], onto [0, N - r); kept tokens stay in ascending order.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, r or prefix.

    """
    checks.keys(keys, prefix)
    checks.integer("r", r, 0)
    n = keys.shape[-2]
    r = min(r, max_r(n, prefix))
    if r == 0:
        return _identity(keys)
    drawn = torch.rand(keys.shape[0], n - prefix, device=keys.device, generator=generator).argsort(dim=1)
    sources = prefix + drawn[:, :r]
    targets = prefix + drawn[:, r:].sort(dim=1).values
    return operators().listed_match(  # type: ignore[no-any-return]
        keys.detach(), sources.contiguous(), targets.contiguous(), prefix
    )


def merge(x: Tensor, slot: Tensor, tokens: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge tokens: output m is the size-weighted mean of the tokens with ``slot == m``.

    Args:
        x: [B, N, C], floating point, any strides.
        slot: int32 [B, N], onto [0, tokens) in every row.
        tokens: M, the number of tokens that remain.
        size: float32 [B, N], how many original tokens each token stands for; None for one each.

    Returns:
        x [B, M, C] in the dtype of x, summed in float32 and rounded once; a token that is merged with no other
        keeps its bits. size float32 [B, M], the sums of the sizes. Gradients flow to x; sizes are counts and
        have none.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device; on the CPU also a slot map that is not onto
        [0, tokens).

    """

    def run() -> tuple[Tensor, Tensor]:
        merged, total = operators().merge(x, slot, tokens, _constant(size))
        return merged, _constant(total)

    return _checked(x, lambda: checks.merging(x, slot, tokens, size), run)


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Undo a merge: token i of the restored sequence is output token ``slot[i]``.

    Args:
        x: [B, M, C], floating point, any strides.
        slot: int32 [B, N] with values in [0, M).

    Returns:
        [B, N, C] in the dtype of x. Gradients flow to x.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.

    """
    checks.floating("x", x, (3,), "[B, M, C]")
    checks.slot(slot, x.shape[0], x.device)
    return operators().unmerge(x, slot)  # type: ignore[no-any-return]


def merge_add_norm(
    x: Tensor,
    branch: Tensor | None,
    slot: Tensor | None,
    tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """X := merge(x + gamma * branch); y = layer_norm(x). Without a branch the norm alone.

    Args:
        x: [B, N, C], the residual stream.
        branch: [B, N, C], the dtype of x, or any where x is float32 (autocast); None adds nothing, and then x is
            returned as it is, and ``slot`` and ``gamma`` must be None.
        slot: int32 [B, N], onto [0, tokens); None merges nothing, and ``tokens`` is then N.
        tokens: M, the number of tokens that remain.
        size: float32 [B, N] or None for one each; returned as it is where nothing is merged.
        weight: [C], the LayerNorm's scale, or None for 1.
        bias: [C], the LayerNorm's shift, or None for 0.
        eps: added to the variance.
        gamma: [C], LayerScale's factor, or None for 1.
        norm_dtype: the dtype of y, such as that of the linear layer behind it under autocast; None for that of x.

    Returns:
        x [B, M, C] in the dtype of x, y [B, M, C] in ``norm_dtype``, size float32 [B, M]. Gradients flow to x, branch,
        weight, bias and gamma.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or eps.

    """

    def check() -> None:
        checks.add_norm(x, branch, {"weight": weight, "bias": bias, "gamma": gamma}, eps, norm_dtype)
        if slot is None:
            checks.integer("tokens", tokens, x.shape[1], x.shape[1])
            checks.size(size, x.shape[0], x.shape[1], x.device)
        else:
            checks.merging(x, slot, tokens, size)

    def run() -> tuple[Tensor, Tensor, Tensor | None]:
        leaves = (x, branch, weight, bias, gamma)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
        merged, y, total, _ = operators().merge_add_norm(
            *(x, branch, slot, tokens, _constant(size), weight, bias, eps, gamma),
            *(x.dtype if norm_dtype is None else norm_dtype, training),
        )
        return merged, y, size if slot is None else _constant(total)

    return _checked(x, check, run)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Proportional attention: softmax(q k^T scale + log size) v.

    Args:
        q: [B, H, Nq, D], floating point, any strides.
        k: [B, H, N, D], the dtype of q.
        v: [B, H, N, D], the dtype of q.
        size: float32 [B, N], positive: how many original tokens each key stands for; None is plain attention.
        scale: the factor of the scores; None is D ** -0.5.
        dropout_p: the probability of dropping an attention weight, in [0, 1).

    Returns:
        [B, H, Nq, D] in the dtype of q. Gradients flow to q, k and v.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device or probability.

    """

    def run() -> Tensor:
        if q.numel() == 0:
            return q.clone()  # on a GPU torch's own function fails on an empty batch
        if predicates.without_kernel(q, k, v, scale, dropout_p) is not None:
            # Training, float32, dropout, rare head dimensions: torch computes, so that every model runs under an
            # explicit "cuda". Its two passes take less time than our forward pass and its backward pass together.
            checks.attention(q, k, v, size, dropout_p)
            bias = None if size is None else size.detach().log()[:, None, None, :].to(q.dtype)
            return F.scaled_dot_product_attention(
                _aligned(q), _aligned(k), _aligned(v), attn_mask=bias, dropout_p=dropout_p, scale=scale
            )
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = operators().attention(q, k, v, _constant(size), factor)
        return out.transpose(1, 2)

    return _checked(q, lambda: checks.attention(q, k, v, size, dropout_p), run)


def _identity(keys: Tensor) -> Tensor:
    n = keys.shape[-2]
    return torch.arange(n, dtype=torch.int32, device=keys.device).expand(keys.shape[0], n).contiguous()


def _checked(x: Tensor, check: Callable[[], None], run: Callable[[], T]) -> T:
    """Run an operator, whose own checks are fast; where they fail, say what is wrong in the words of the reference.

    Nothing is launched before the operator's checks. Where it doesn't run (while compiling, on meta tensors) or takes
    what isn't a tensor, the other checks come first.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_cuda:
        check()
        return run()
    try:
        return run()
    except Exception:
        check()
        raise


def _constant(size: C) -> C:
    """Sizes are counts: no gradient flows to them."""
    return size.detach() if size is not None and size.requires_grad else size


def _aligned(x: Tensor) -> Tensor:
    """X, or a copy where it starts off a 16-byte boundary: torch's own function fails on one such token."""
    if torch.compiler.is_compiling():  # which knows no offsets, and lays out its own tensors
        return x
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x
