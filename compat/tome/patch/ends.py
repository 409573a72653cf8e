"""What stands before and behind the blocks, as it is cheapest on a GPU: the patch embedding, and the last norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome import backend, ops
from tome.patch import plain
from tome.patch.swap import Patched, swap
from tome.recording import PART, record

WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


class PatchConv2d(Patched, nn.Conv2d):
    """Conv2d over patches. On a GPU cuDNN's takes several times as long as gathering the patches and one product.

    The products are those of the convolution, added in another order; on the reference backend it is the convolution.
    """

    _tome_base = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        record(PART, None, "patch_embed")
        height, width = self.kernel_size
        whole = x.dim() == 4 and x.shape[2] % height == 0 and x.shape[3] % width == 0
        if not pays(x) or not whole or (x.requires_grad and torch.is_grad_enabled()):
            record("convolution", "torch")
            return super().forward(x)
        record("matrix product", "torch")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = F.linear(patches(x, height, width), self.weight.flatten(1), self.bias)
        grid: Tensor = y.transpose(1, 2).unflatten(2, (x.shape[2] // height, x.shape[3] // width))
        return grid


class LastNorm(Patched):
    """Mixed into the LayerNorm behind the blocks, which reads the full grid: on a GPU one read and one write."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    normalized_shape: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        is_known = len(self.normalized_shape) == 1 and not getattr(self, "_fast_norm", False)
        if not is_known or plain.why_watched(x) is not None or x.dim() != 3 or not backend.takes_kernels(x):
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


def swap_ends(embedding: Iterable[nn.Module | None], norm: nn.Module | None) -> None:
    """Swap what can be computed faster: of the embedding's parts the convolutions over patches, and the last norm."""
    for part in embedding:
        if part is not None and is_patch_conv(part):
            part.__class__ = PatchConv2d
    if norm is not None and type(norm) in plain.NORMS:
        swap(norm, LastNorm)


def is_patch_conv(module: object) -> bool:
    """Whether the module is a Conv2d over windows that neither overlap nor leave gaps."""
    return (
        type(module) is nn.Conv2d
        and module.stride == module.kernel_size
        and module.padding == (0, 0)
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def patches(x: Tensor, height: int, width: int) -> Tensor:
    """Images [B, C, H, W] -> [B, H / height * W / width, C * height * width], in the order of Conv2d's weights.

    The pixels of a patch's row move as 8-byte words where they can: two to four times as fast as one by one.
    """
    row_bytes = width * x.element_size()
    word = next(word for word in WORDS if row_bytes % word.itemsize == 0)
    rows = x.contiguous().view(word)
    grid: Tensor = rows.unflatten(3, (-1, row_bytes // word.itemsize)).unflatten(2, (-1, height))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).view(x.dtype)
