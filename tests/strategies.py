"""Hypothesis strategies: they draw structure and a seed, and tensors are built from the seed.

Drawing elements would be slow and shrink badly. What matters is drawn on purpose: duplicates, zero rows, exact
ties, NaN and infinity, tiny and huge scale, strided views, r at 0, at the cap and above.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

HEAD_DIMS = (32, 64, 72, 80, 96, 128)  # that the kernels of attention promise to take
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
FEATURES = ("normal", "duplicates", "constant", "zero rows", "one outlier", "tiny", "huge", "nan", "inf", "mixed")
LAYOUTS = ("contiguous", "packed", "transposed", "stepped", "misaligned")
TOKENS = st.one_of(st.sampled_from((1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 197)), st.integers(1, 80))

BATCHES, WIDTHS = st.integers(0, 3), st.integers(1, 96)


@dataclass(frozen=True)
class Case:
    """Keys of one layer and what to do with them. ``repr`` reproduces them: ``Case(...).keys("cpu")``."""

    batch: int
    n: int
    d: int
    heads: int  # 0: keys [B, N, D] without heads
    r: int
    prefix: int
    dtype: torch.dtype
    layout: str
    feature: str  # of FEATURES, or "exact": scores without rounding in every dtype
    seed: int

    def keys(self, device: torch.device | str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, max(self.heads, 1), self.n, self.d)
        if self.feature == "exact":
            keys = torch.randint(0, 2, (self.batch, 1, self.n, self.d), generator=generator) * 2.0 - 1.0
            keys = keys.expand(shape)
        else:
            keys = torch.randn(shape, generator=generator)
            keys = _featured(keys, self.feature, self.dtype, generator)
        keys = keys.to(self.dtype).to(device)  # first: moving a strided view would make it contiguous
        return strided(keys if self.heads else keys[:, 0], self.layout)

    @property
    def merged(self) -> int:
        """What r comes down to."""
        return min(self.r, (self.n - self.prefix) // 2)

    @property
    def tokens(self) -> int:
        return self.n - self.merged


def _featured(keys: Tensor, feature: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    is_half = dtype is torch.float16
    rows = torch.randint(0, keys.shape[2], (max(1, keys.shape[2] // 3),), generator=generator)
    if feature == "duplicates":
        keys[:, :, rows] = keys[:, :, rows[:1]]
    elif feature == "constant":
        keys[:] = keys[:, :, :1].clone()
    elif feature == "zero rows":
        keys[:, :, rows] = 0.0
    elif feature == "one outlier":
        keys[:, :, rows[0]] *= 1000.0
    elif feature == "tiny":
        keys *= 1e-4 if is_half else 1e-38
    elif feature == "huge":
        keys *= 1e3 if is_half else 1e30
    elif feature == "nan":
        keys[:, :, rows] = torch.nan
    elif feature == "inf":
        keys[:, :, rows, 0] = torch.inf
    elif feature == "mixed":
        chance = torch.rand(keys.shape[:-1], generator=generator)
        keys[chance < 0.1] = torch.nan
        keys[(chance > 0.1) & (chance < 0.2)] = 0.0
        keys[(chance > 0.2) & (chance < 0.25)] = torch.inf
    return keys


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values, laid out as told."""
    if layout == "packed":  # as one of q, k, v in the output of one linear layer
        packed = x.new_full((*x.shape[:-1], 3, x.shape[-1]), torch.nan)
        packed[..., 1, :] = x
        return packed[..., 1, :]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "stepped":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "misaligned":  # one element off whatever torch's allocator aligns to
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x.contiguous()


@st.composite
def cases(
    draw: st.DrawFn,
    features: tuple[str, ...] = FEATURES,
    dtypes=HALF_AND_SINGLE,
    batches=BATCHES,
    tokens=TOKENS,
    heads: tuple[int, ...] = (0, 1, 2, 3, 6),
    widths=WIDTHS,
) -> Case:
    """Any legal call of match, on at most two million numbers."""
    feature = draw(st.sampled_from(features))
    n = draw(tokens)
    prefix = draw(st.one_of(st.integers(0, min(n, 5)), st.just(n)))
    cap = (n - prefix) // 2
    # Norms that are powers of two, and means over a power of two of heads, keep exact inputs exact.
    is_exact = feature == "exact"
    d = draw(st.sampled_from((1, 4, 16, 64, 256)) if is_exact else widths)
    h = draw(st.sampled_from(tuple(h for h in heads if h in (0, 1, 2, 4)) if is_exact else heads))
    return Case(
        batch=min(draw(batches), max(1, 2_000_000 // (n * d * max(h, 1)))),
        n=n,
        d=d,
        heads=h,
        r=draw(st.one_of(st.integers(0, cap), st.sampled_from((0, 1, cap, cap + 1, 10 * n)))),
        prefix=prefix,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        feature=feature,
        seed=draw(st.integers(0, 2**31)),
    )


LONG_TOKENS = st.one_of(st.sampled_from((1, 2, 3, 15, 16, 17, 63, 64, 65, 197, 577)), st.integers(1, 2000))


def long_cases(*features: str) -> st.SearchStrategy[Case]:
    """What takes a GPU, with metrics as wide as kernels take."""
    widths = st.one_of(st.sampled_from((8, 16, 32, 64, 72, 80, 128, 256)), st.integers(1, 256))
    batches = st.sampled_from((1, 2, 3, 64))
    return cases(features, batches=batches, tokens=LONG_TOKENS, heads=(0, 1, 2, 3, 12), widths=widths)


FINITE = tuple(f for f in FEATURES if f not in ("nan", "inf", "mixed"))


@dataclass(frozen=True)
class Map:
    """A slot map of any shape, not only one that matching would make, with tokens and sizes to merge."""

    batch: int
    n: int
    tokens: int
    channels: int
    dtype: torch.dtype
    layout: str
    sized: bool
    seed: int

    def build(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, N, C], slot int32 [B, N] onto [0, tokens), size float32 [B, N] or None; groups of any size."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, self.n, self.channels, generator=generator).to(self.dtype)
        slot = torch.randint(0, self.tokens, (self.batch, self.n), generator=generator)
        slot[:, : self.tokens] = torch.arange(self.tokens)
        order = torch.rand(self.batch, self.n, generator=generator).argsort(dim=1)
        slot = slot.gather(1, order).to(torch.int32)
        size = torch.randint(1, 40, (self.batch, self.n), generator=generator).float()
        return strided(x.to(device), self.layout), slot.to(device), size.to(device) if self.sized else None


@st.composite
def maps(draw: st.DrawFn, dtypes=HALF_AND_SINGLE) -> Map:
    """Any legal call of merge."""
    n = draw(TOKENS)
    return Map(
        batch=draw(st.integers(0, 3)),
        n=n,
        tokens=draw(st.one_of(st.integers(1, n), st.sampled_from((1, n)))),
        channels=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        sized=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
