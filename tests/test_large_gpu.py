"""Tensors of more than 2^31 elements: the last image equals itself computed alone."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EXTENSION
from judge import error
from torch import Tensor

import tome_cuda

GIGABYTES = 24


def has_memory() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > GIGABYTES << 30


pytestmark = [NO_EXTENSION, pytest.mark.skipif(not has_memory(), reason=f"needs {GIGABYTES} GiB of a GPU's memory")]


def filled(*shape: int) -> Tensor:
    """Random numbers; one image at a time, as torch's generator takes no tensor of this size."""
    x = torch.empty(shape, device="cuda", dtype=torch.float16)
    for images in x.split(max(1, (1 << 28) // x[0].numel())):
        images.normal_()
    return x


def test_merge_and_unmerge() -> None:
    batch, n, channels = 9, 1 << 18, 1024
    x = filled(batch, n, channels)
    slot = (torch.arange(n, device="cuda") // 2).int().expand(batch, n)
    merged, total = tome_cuda.merge(x, slot, n // 2)
    alone, _ = tome_cuda.merge(x[-1:].clone(), slot[-1:], n // 2)
    assert torch.equal(merged[-1:], alone)
    assert bool((total == 2).all())
    assert error(merged[-1, -3:], x[-1].view(n // 2, 2, channels)[-3:].double().mean(dim=1)) < 2e-3
    restored = tome_cuda.unmerge(merged, slot)
    assert torch.equal(restored[-1, -2], merged[-1, -1])


def test_match() -> None:
    keys = filled(300, 16, 8192, 64)
    slot = tome_cuda.match(keys, 1000)
    assert torch.equal(slot[-1:], tome_cuda.match(keys[-1:].clone(), 1000))


@pytest.mark.parametrize("n", [197, 577])
def test_attention(n: int) -> None:
    batch = 2**32 // (n * 3 * 1024)
    qkv = filled(batch, n, 3, 16, 64)
    size = torch.randint(1, 9, (batch, n), device="cuda").float()
    out = tome_cuda.attention(*qkv.permute(2, 0, 3, 1, 4), size)
    alone = tome_cuda.attention(*qkv[-2:].clone().permute(2, 0, 3, 1, 4), size[-2:])
    assert torch.equal(out[-2:], alone)
