"""Matching and merging written once more, slowly, in NumPy float64 and Python loops."""

import numpy as np
from torch import Tensor


def scores(keys: Tensor) -> np.ndarray:
    """Cosine of every pair of tokens, float64 [B, N, N]; NaN becomes -inf."""
    k = keys.detach().cpu().double().numpy()
    if k.ndim == 4:
        k = k.mean(axis=1)
    with np.errstate(invalid="ignore"):
        norm = np.sqrt((k * k).sum(axis=-1))
        unit = k / np.where(norm == 0, 1.0, norm)[..., None]
        result = np.einsum("bnd,bmd->bnm", unit, unit)
    return np.where(np.isnan(result), -np.inf, result)


def match(score: np.ndarray, r: int, prefix: int) -> list[int]:
    """The slot map of one image, from its scores [N, N]."""
    n = len(score)
    r = min(r, (n - prefix) // 2)
    if r == 0:
        return list(range(n))
    a = [i for i in range(prefix, n) if i % 2 == 0]
    b = [j for j in range(prefix, n) if j % 2 == 1]
    target = {i: max(b, key=lambda j, i=i: (score[i, j], -j)) for i in a}
    merged = sorted(a, key=lambda i: (-score[i, target[i]], i))[:r]
    kept = [*range(prefix), *(i for i in a if i not in merged), *b]
    place = {token: position for position, token in enumerate(kept)}
    return [place[target[i]] if i in merged else place[i] for i in range(n)]


def merge(x: np.ndarray, slot: np.ndarray, tokens: int, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One image: x [N, C], slot [N], size [N] -> the means [M, C] and sizes [M]."""
    out, total = np.zeros((tokens, x.shape[1])), np.zeros(tokens)
    for i, m in enumerate(slot):
        out[m] += x[i] * size[i]
        total[m] += size[i]
    return out / total[:, None], total
