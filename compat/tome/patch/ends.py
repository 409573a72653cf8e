"""What stands before and behind the blocks, as it is cheapest on a GPU: the patch embedding, and the last norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome import backend, ops
from tome.patch import plain
from tome.patch.swap import Patched, swap
from tome.recording import PART, record

WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


class End(Patched):
    """Mixed into a module that stands before or behind the blocks, and computes by the backend of their model."""

    _tome_backend: str | None = None


class PatchConv(End):
    """Mixed into a convolution over patches. On a GPU cuDNN's takes many times as long as gathering them and a product.

    The products are those of the convolution, added in another order; on the reference backend it is the convolution.
    What it gives is laid out as tokens, whose channels lie side by side.
    """

    def forward(self, x: Tensor) -> Tensor:
        with backend.use_backend(self._tome_backend):
            return self._embedded(x)

    def _embedded(self, x: Tensor) -> Tensor:
        record(PART, None, "patch_embed")
        conv, batched = cast(Any, self), x.dim() == 2 + len(cast(Any, self).kernel_size)
        grid = [length // size for length, size in zip(x.shape[2:], conv.kernel_size, strict=False)]
        whole = batched and [count * size for count, size in zip(grid, conv.kernel_size, strict=True)] == [*x.shape[2:]]
        if not pays(x) or not whole or (x.requires_grad and torch.is_grad_enabled()):
            record("convolution", "torch")
            return cast(Tensor, super().forward(x))
        record("matrix product", "torch")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = F.linear(patches(x, conv.kernel_size), conv.weight.flatten(1), conv.bias)
        return y.transpose(1, 2).view(*y.shape[::2], *grid)


class PatchConv2d(PatchConv, nn.Conv2d):
    """Of images."""

    _tome_base = nn.Conv2d


class PatchConv3d(PatchConv, nn.Conv3d):
    """Of videos."""

    _tome_base = nn.Conv3d


PATCH_CONVS: dict[type, type[nn.Module]] = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}


class LastNorm(End):
    """Mixed into the LayerNorm behind the blocks, which reads the full grid: on a GPU one read and one write."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    normalized_shape: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        with backend.use_backend(self._tome_backend):
            return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        is_known = len(self.normalized_shape) == 1 and not getattr(self, "_fast_norm", False)
        if (
            not is_known
            or torch.is_grad_enabled()
            or plain.why_watched(x) is not None
            or x.dim() != 3
            or x.dtype is torch.float64
            or not backend.takes_kernels(x)
        ):
            normed: Tensor = super().forward(x)
            return normed
        record(PART, None, "norm")
        # Autocast computes norms in float32, and leaves them so.
        is_kept = plain.NORMS.get(self._tome_base) or not torch.is_autocast_enabled(x.device.type)
        dtype = x.dtype if is_kept else torch.float32
        return ops.merge_add_norm(x, None, None, x.shape[1], None, self.weight, self.bias, self.eps, None, dtype)[1]


def pays(x: Tensor) -> bool:
    """Whether other kernels than PyTorch's own choice are wanted for these images."""
    return x.is_cuda and backend.get_backend() != "reference"


def swap_ends(embedding: Iterable[nn.Module | None], norm: nn.Module | None, chosen: str | None) -> None:
    """Swap what can be computed faster: of the embedding's parts the convolutions over patches, and the last norm.

    ``chosen`` is the backend that their model was patched for, None for any.
    """
    parts = [*embedding, norm]
    for part in parts[:-1]:
        if part is not None and is_patch_conv(part):
            part.__class__ = PATCH_CONVS[type(part)]
    if norm is not None and type(norm) in plain.NORMS:
        swap(norm, LastNorm)
    for part in parts:
        if isinstance(part, End):
            part._tome_backend = chosen


def is_last_norm(norm: nn.Module) -> bool:
    """Whether the module is such a norm, as it was made, which norms each token by itself."""
    return type(norm).forward is LastNorm.forward


def is_patch_conv(module: object) -> bool:
    """Whether the module is a convolution over windows that neither overlap nor leave gaps."""
    return (
        isinstance(module, (nn.Conv2d, nn.Conv3d))
        and type(module) in PATCH_CONVS
        and module.stride == module.kernel_size
        and (module.padding == "valid" or not any(module.padding))
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def patches(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Images [B, C, H, W] or videos [B, C, T, H, W] -> [B, patches, C * of a patch], in the order of weights.

    The pixels of a patch's row move as 8-byte words where they can: two to four times as fast as one by one.
    """
    row_bytes = sizes[-1] * x.element_size()
    word = next(word for word in WORDS if row_bytes % word.itemsize == 0)
    split: list[int] = [*x.shape[:2]]
    for length, size, inside in zip(x.shape[2:], sizes, (*sizes[:-1], row_bytes // word.itemsize), strict=True):
        split += [length // size, inside]
    dims = len(sizes)
    order = (0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    parts = x.contiguous().view(word).view(split).permute(order)
    return parts.flatten(dims + 1).flatten(1, dims).view(x.dtype)
