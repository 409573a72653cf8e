"""Averaging tokens along a slot map, and the way back (arXiv 2210.09461, section 3).

Sums are written in gather form: no scatter with a reduction (ONNX and TensorRT cannot take one) and no atomic
addition, so the same input gives the same bits on every device, and a bad number stays in its own group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks


class _Groups(NamedTuple):
    """The members of every output token. R = N - M tokens are not the first of their group ("the rest")."""

    rest: Tensor  # int64 [B, R]: the rest, in the order of their slots
    rest_slot: Tensor  # int32 [B, R]: their slots, ascending
    first: Tensor  # int64 [B, R]: the first member of the group of each
    source: Tensor  # int64 [B, M]: token i for a group of one, N + j for the group that ends at rest[j]


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
    checks.merge(x, slot, tokens, size)
    groups = _groups(slot, tokens)
    size = torch.ones(slot.shape, dtype=torch.float32, device=x.device) if size is None else size.detach()
    total = _group_sum(size[:, :, None], groups)[:, :, 0]
    return _group_sum(x, groups, size / total.gather(1, slot.long())), total


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Undo a merge: token i of the restored sequence is output token ``slot[i]``.

    Args:
        x: [B, M, C], floating point, any strides.
        slot: int32 [B, N] with values in [0, M), onto it where a gradient is wanted.

    Returns:
        [B, N, C] in the dtype of x. Gradients flow to x.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.

    """
    checks.unmerge(x, slot)
    restored: Tensor = _Unmerge.apply(x, slot)
    return restored


def follow(steps: Sequence[Tensor]) -> Tensor:
    """Compose consecutive merges: where each token of the first is behind the last.

    Args:
        steps: the slot maps, first to last: int32 [B, N_0], [B, N_1], ..., of which each has the tokens that the
            one before it left.

    Returns:
        slot, int32 [B, N_0]; that of a single step is the step itself.

    Raises:
        TypeError, ValueError: no step, a wrong dtype, rank, shape or device.

    """
    checks.follow(steps)
    slot = steps[0]
    for step in steps[1:]:
        slot = step.gather(1, slot.long())
    return slot


def restore(x: Tensor, branch: Tensor | None, steps: Sequence[Tensor], gamma: Tensor | None = None) -> Tensor:
    """Add what waits to be added, and undo consecutive merges: x + gamma * branch, behind ``follow(steps)``.

    Args:
        x: [B, M, C], the residual stream behind the last merge.
        branch: [B, M, C], the dtype of x, or any where x is float32 (autocast); None adds nothing.
        steps: the slot maps as for :func:`follow`, the last onto [0, M); none leaves the tokens where they are.
        gamma: [C], LayerScale's factor, or None for 1.

    Returns:
        [B, N_0, C] in the dtype of x; the addition rounds as in :func:`merge_add_norm`. Gradients flow to x, branch
        and gamma.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.

    """
    checks.restore(x, branch, steps, gamma)
    x = add(x, branch, gamma)
    return unmerge(x, follow(steps)) if steps else x


def add(x: Tensor, branch: Tensor | None, gamma: Tensor | None) -> Tensor:
    """X + gamma * branch in the dtype of x, where it has fewer tokens to the last of x; without a branch x itself."""
    if branch is None:
        return x
    added = (branch if gamma is None else branch * gamma).to(x.dtype)
    skip = x.shape[1] - added.shape[1]
    return x + (F.pad(added, (0, 0, skip, 0)) if skip else added)


class _Unmerge(torch.autograd.Function):
    """A gather whose gradient is a group sum: autograd's own scatter adds in no fixed order on a GPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slot: Tensor) -> Tensor:
        return _rows(x, slot.long())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, slot = inputs
        ctx.tokens = x.shape[1]
        ctx.save_for_backward(slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        (grad,) = grads
        return _group_sum(grad, _groups(slot, ctx.tokens)), None


def _groups(slot: Tensor, tokens: int) -> _Groups:
    n = slot.shape[1]
    position = torch.arange(n, device=slot.device)
    # Positions make the sort keys distinct: a stable sort does not export.
    by_slot = (slot.long() * n + position).argsort(dim=1)
    sorted_slot = slot.gather(1, by_slot)
    is_first = torch.ones_like(slot, dtype=torch.bool)
    is_first[:, 1:] = sorted_slot[:, 1:] != sorted_slot[:, :-1]
    _check_onto(sorted_slot, is_first, tokens)
    firsts_then_rest = ((~is_first).long() * n + position).argsort(dim=1)
    start, others = firsts_then_rest[:, :tokens], firsts_then_rest[:, tokens:]
    first = by_slot.gather(1, start)
    rest_slot = sorted_slot.gather(1, others)
    # Group m begins at sorted position start[m], so start[m] - m members of the rest come before it.
    before = start - position[:tokens]
    end = torch.cat([before[:, 1:], torch.full_like(before[:, :1], n - tokens)], dim=1)
    return _Groups(
        rest=by_slot.gather(1, others),
        rest_slot=rest_slot,
        first=first.gather(1, rest_slot.long()),
        source=torch.where(end == before, first, n + end - 1),
    )


def _group_sum(x: Tensor, groups: _Groups, weight: Tensor | None = None) -> Tensor:
    """Sum the rows of x [B, N, C] in each group, times weight [B, N] unless they are alone -> [B, M, C]."""
    length = groups.rest.shape[1]
    if length == 0:
        return _rows(x, groups.source)
    sums = _weighted_rows(x, groups.rest, weight)
    # Sums over ever longer stretches of one group; the last member of a group then holds the sum of its rest.
    step = 1
    while step < length:
        same = groups.rest_slot[:, step:] == groups.rest_slot[:, :-step]
        earlier = sums[:, :-step].masked_fill(~same[:, :, None], 0.0)
        sums = torch.cat([sums[:, :step], sums[:, step:] + earlier], dim=1)
        step *= 2
    sums = _weighted_rows(x, groups.first, weight) + sums
    return _rows(torch.cat([x, sums.to(x.dtype)], dim=1), groups.source)


def _weighted_rows(x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    rows = _rows(x, index).to(torch.promote_types(x.dtype, torch.float32))
    return rows if weight is None else rows * weight.gather(1, index)[:, :, None].to(rows.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    # Whole rows at once: several times faster on a CPU than a gather of single entries.
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _check_onto(sorted_slot: Tensor, is_first: Tensor, tokens: int) -> None:
    """Reading the values would stop a GPU, and a trace has none: there the caller answers for the map."""
    if torch.compiler.is_compiling() or sorted_slot.device.type != "cpu" or sorted_slot.numel() == 0:
        return
    try:
        low, high = int(sorted_slot[:, 0].min()), int(sorted_slot[:, -1].max())
        distinct = int(is_first.sum(dim=1).min())
    except RuntimeError:  # of a fake tensor, and of those that torch.func.vmap hands out, which stand for many
        return
    if low != 0 or high != tokens - 1 or distinct != tokens:
        raise ValueError(
            f"slot must map onto [0, {tokens}) in every row, got values in [{low}, {high}] "
            f"and a row with {distinct} distinct ones"
        )
