"""Which operations of a patched model run on which backend, block by block, and why: a forward pass, recorded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tome.recording import PART, Call, recorded


class Part(NamedTuple):
    """A stretch of the model: its name ("patch_embed", "blocks.3"), and the operations it asked for, in their order."""

    name: str
    calls: tuple[Call, ...]


def parts(model: nn.Module, images: Tensor) -> list[Part]:
    """Run the model once and tell what each of its parts ran on.

    Args:
        model: a patched model; one that is not patched asks for no operation.
        images: [B, 3, H, W], on the device and in the dtype that matter.

    Returns:
        One entry for each part that asked for an operation, in their order. A block without a call ran as it is in the
        host's library: nothing is merged in it or before it.

    """
    with torch.inference_mode(), recorded() as calls:
        model(images)
    found: list[Part] = []
    for call in calls:
        if call.op == PART:
            found.append(Part(call.reason or "", ()))
        elif found:
            found[-1] = found[-1]._replace(calls=(*found[-1].calls, call))
    return found


def ranges(found: list[Part]) -> list[Part]:
    """The same with equal neighbours as one: "blocks.0", "blocks.1", "blocks.2" become "blocks.0-2"."""
    joined: list[Part] = []
    for part in found:
        stem, number = _split(part.name)
        if joined and number and joined[-1].calls == part.calls and joined[-1].name.startswith(stem):
            first = joined[-1].name.removeprefix(stem).partition("-")[0]
            joined[-1] = part._replace(name=f"{stem}{first}-{number}")
        else:
            joined.append(part)
    return joined


def _split(name: str) -> tuple[str, str]:
    """A part's name without its number, and the number: "blocks." and "3"."""
    stem = name.rstrip("0123456789")
    return stem, name[len(stem) :]
