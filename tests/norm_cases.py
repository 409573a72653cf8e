"""Calls of merge_add_norm for the kernels' tests: structure and a seed are drawn, tensors are built from the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from judge import ROUNDING, error
from torch import Tensor

import tome_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


class Call(NamedTuple):
    """The arguments of merge_add_norm, in its order."""

    x: Tensor
    branch: Tensor
    slot: Tensor | None
    tokens: int
    size: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    gamma: Tensor | None
    norm_dtype: torch.dtype | None

    def double(self) -> Call:
        return Call(*(v.double() if isinstance(v, Tensor) and v.dim() != 2 else v for v in self[:-1]), None)


@dataclass(frozen=True)
class NormCase:
    """``repr`` reproduces the arguments: ``NormCase(...).build("cuda")``."""

    batch: int
    n: int
    tokens: int  # n and no map where merging is False
    channels: int
    merging: bool
    sized: bool
    dtype: torch.dtype
    branch_dtype: torch.dtype
    norm_dtype: torch.dtype | None
    parameters: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]  # weight, bias, gamma
    layouts: tuple[str, str]  # of x and branch
    crowded: bool  # all that is merged goes into one token
    skip: int  # leading tokens to which nothing is added
    seed: int

    def build(self, device: str, place: Callable[[Tensor], Tensor] = lambda value: value) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense") -> Tensor:
            value = torch.randn(shape, generator=generator).to(dtype).to(device)
            return place(_lay(value, layout))

        shape = (self.batch, self.n, self.channels)
        x = normal(shape, self.dtype, self.layouts[0])
        branch = normal((self.batch, self.n - self.skip, self.channels), self.branch_dtype, self.layouts[1])
        weight, bias, gamma = (None if d is None else normal((self.channels,), d) for d in self.parameters)
        size = torch.randint(1, 40, (self.batch, self.n), generator=generator).float()
        rest = torch.randint(
            1 if self.crowded else self.tokens, (self.batch, self.n - self.tokens), generator=generator
        )
        slot = torch.cat([torch.arange(self.tokens).expand(self.batch, -1), rest], dim=1)
        slot = slot.gather(1, torch.rand(slot.shape, generator=generator).argsort(dim=1)).int()
        return Call(
            *(x, branch, place(slot.to(device)) if self.merging else None, self.tokens),
            *(place(size.to(device)) if self.sized else None, weight, bias, EPS, gamma, self.norm_dtype),
        )


def _lay(value: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # behind a class token: rows stay aligned
        return torch.cat([value[:, :1], value], dim=1)[:, 1:]
    if layout == "misaligned":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    return value


@st.composite
def norm_cases(
    draw: st.DrawFn, lengths: tuple[int, ...], widths: tuple[int, ...], most: int, partial: bool = True
) -> NormCase:
    """Any legal call, with at most ``most`` numbers in x, and a branch for each token where it is not partial."""
    channels = draw(st.sampled_from(widths))
    n = min(draw(st.sampled_from(lengths)), max(2, most // channels))
    batch = min(draw(st.sampled_from([1, 2, 3])), max(1, most // (channels * n)))
    merging = draw(st.booleans()) or draw(st.booleans())
    tokens = draw(st.sampled_from([1, n, max(1, n // 2), max(1, n - 1), max(1, n - n // 12)])) if merging else n
    dtype = draw(st.sampled_from(DTYPES))
    maybe = st.sampled_from([None, dtype, torch.float32, draw(st.sampled_from(DTYPES))])
    layout = st.sampled_from(["dense", "dense", "sliced", "misaligned", "transposed"])
    return NormCase(
        *(batch, n, tokens, channels, merging, draw(st.booleans()), dtype),
        branch_dtype=draw(st.sampled_from(DTYPES)) if dtype is torch.float32 else dtype,
        norm_dtype=draw(st.sampled_from([None, None, torch.float16, *DTYPES])),
        parameters=(draw(maybe), draw(maybe), draw(maybe)),
        layouts=(draw(layout), draw(layout)),
        crowded=draw(st.booleans()),
        skip=draw(st.sampled_from([0, 0, 0, 1, n // 2])) if partial else 0,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def check_outputs(call: Call, out: Tensor, y: Tensor) -> None:
    """As close to float64 as the reference in the same dtypes, up to a rounding."""
    theirs = tome_reference.merge_add_norm(*call)
    truth = tome_reference.merge_add_norm(*call.double())
    for ours, other, exact in ((out, theirs[0], truth[0]), (y, theirs[1], truth[1])):
        assert ours.dtype == other.dtype
        assert ours.shape == other.shape
        if exact.numel() == 0:
            continue
        largest = float(truth[0].abs().max())
        floor = ROUNDING[out.dtype] * largest
        if ours is y:  # which has the rounding of x in it, magnified where a row hardly varies
            slope = float((truth[0].var(-1, correction=0) + call.eps).rsqrt().max())
            weight = 1.0 if call.weight is None else float(call.weight.abs().max())
            floor = ROUNDING[y.dtype] * float(exact.abs().max()) + 2 * slope * weight * floor
        assert error(ours, exact) <= error(other, exact) + floor
