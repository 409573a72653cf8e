"""Which token goes where: bipartite, k-th and random matching (arXiv 2210.09461, section 3 and appendix D), and between
sets that the caller gives.

All of them score pairs of tokens by the cosine of their metrics, send some tokens (sources) to their best target,
and differ only in which tokens may be sources and which targets. The result is always a slot map.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tome_reference import checks


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
    checks.match(keys, r, prefix)
    n = keys.shape[-2]
    r = min(r, max_r(n, prefix))
    if r == 0:
        return _identity(keys)
    metric = _metric(keys)
    a = torch.arange(prefix + prefix % 2, n, 2, device=keys.device)
    b = torch.arange(prefix + 1 - prefix % 2, n, 2, device=keys.device)
    best, target = _best_target(metric[:, prefix + prefix % 2 :: 2], metric[:, prefix + 1 - prefix % 2 :: 2])
    return _best_pairs(keys, r, prefix, a.expand_as(target), b.expand(keys.shape[0], -1), best, target)


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
    checks.kth_match(keys, k, prefix)
    n = keys.shape[-2]
    k = min(k, n - prefix)
    if k <= 1:
        return _identity(keys)
    count = (n - prefix) // k
    targets = prefix + k - 1 + k * torch.arange(count, device=keys.device)
    others = torch.arange(n - prefix - count, device=keys.device)
    sources = prefix + others + (others // (k - 1)).clamp(max=count)
    metric = _metric(keys)
    _, target = _best_target(metric[:, sources], metric[:, targets])
    slot_t = torch.arange(prefix, prefix + count, device=keys.device).expand(keys.shape[0], -1)
    return _slot_map(keys, prefix, sources.expand_as(target), prefix + target, targets.expand_as(slot_t), slot_t)


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
    checks.random_match(keys, r, prefix, generator)
    n = keys.shape[-2]
    r = min(r, max_r(n, prefix))
    if r == 0:
        return _identity(keys)
    metric = _metric(keys)
    drawn = torch.rand(
        metric.shape[0], n - prefix, dtype=torch.float32, device=keys.device, generator=generator
    ).argsort(dim=1)
    sources = prefix + drawn[:, :r]
    targets = prefix + drawn[:, r:].sort(dim=1).values
    _, target = _best_target(_rows(metric, sources), _rows(metric, targets))
    slot_t = torch.arange(prefix, n - r, device=keys.device).expand_as(targets)
    return _slot_map(keys, prefix, sources, prefix + target, targets, slot_t)


def set_match(keys: Tensor, sources: Tensor, targets: Tensor, r: int, prefix: int = 0) -> Tensor:
    """Matching between given sets: of the sources the ``r`` that are most like their best target merge into it.

    Args:
        keys: as for :func:`match`.
        sources: int64 [B, S], the positions of the tokens that may merge.
        targets: int64 [B, T], those of the tokens that others may merge into. Sources and targets together are every
            token behind the prefix, once.
        r: how many tokens to merge; clipped to S. 0 gives the identity.
        prefix: how many leading tokens stay untouched.

    Returns:
        slot, int32 [B, N], onto [0, N - r): prefix, unmerged sources and targets, these in the order in which they are
        given. On equal scores the first one wins, as in :func:`match`.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, r or prefix; on the CPU also a token that is in no set or in
            both.

    """
    checks.set_match(keys, sources, targets, r, prefix)
    r = min(r, sources.shape[1]) if targets.shape[1] else 0
    if r == 0:
        return _identity(keys)
    metric = _metric(keys)
    best, target = _best_target(_rows(metric, sources), _rows(metric, targets))
    return _best_pairs(keys, r, prefix, sources, targets, best, target)


def _best_pairs(
    keys: Tensor, r: int, prefix: int, sources: Tensor, targets: Tensor, best: Tensor, target: Tensor
) -> Tensor:
    """The slot map where of all sources [B, S], with the best targets and scores given, r merge."""
    # The r best, the lowest index first among those that equal the last of them. (A stable sort does not export.)
    threshold = best.topk(r, dim=1).values[:, -1:]
    merged, tied = best > threshold, best == threshold
    merged |= tied & (tied.cumsum(dim=1) <= r - merged.sum(dim=1, keepdim=True))
    first_target = prefix + sources.shape[1] - r
    slot_s = torch.where(merged, first_target + target, prefix - 1 + (~merged).cumsum(dim=1))
    slot_t = torch.arange(first_target, first_target + targets.shape[1], device=keys.device).expand_as(targets)
    return _slot_map(keys, prefix, sources, slot_s, targets, slot_t)


def _metric(keys: Tensor) -> Tensor:
    """Unit vectors [B, N, D] in float32 (float64 stays); a zero vector stays zero."""
    metric = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    if metric.dim() == 4:
        metric = metric.mean(dim=1)
    # The largest entry goes first: squares of very large or very small entries leave the range of float32.
    largest = metric.abs().amax(dim=-1, keepdim=True)
    metric = metric / largest.masked_fill(largest == 0, 1.0)
    norm = metric.square().sum(dim=-1, keepdim=True).sqrt()
    return metric / norm.masked_fill(norm == 0, 1.0)


def _best_target(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Highest cosine and the lowest index that reaches it: [B, S, D] x [B, T, D] -> [B, S], [B, S]."""
    with _without_autocast(sources.device.type):
        scores = sources @ targets.transpose(1, 2)
    best, index = scores.masked_fill(scores.isnan(), -torch.inf).max(dim=2)
    return best, index


def _slot_map(keys: Tensor, prefix: int, sources: Tensor, slot_s: Tensor, targets: Tensor, slot_t: Tensor) -> Tensor:
    """The slot map with the prefix in place and the given slots [B, S], [B, T] at the given positions."""
    positions = torch.cat([sources, targets], dim=1)
    slots = torch.cat([slot_s, slot_t], dim=1).to(torch.int32)
    return _identity(keys).scatter(1, positions, slots)


def _identity(keys: Tensor) -> Tensor:
    n = keys.shape[-2]
    return torch.arange(n, dtype=torch.int32, device=keys.device).expand(keys.shape[0], n).contiguous()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
