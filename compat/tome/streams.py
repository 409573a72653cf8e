"""Where matching may run beside attention: on a second branch of the CUDA graph that is being captured."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def side_stream(x: Tensor) -> torch.cuda.Stream | None:
    """A stream that has waited for the current one; None where no graph is captured, or one with gradients.

    Few images fill no GPU, so that the two take hardly longer than one of them. Outside of a graph the host would pay
    more for a second stream than the GPU gains, and the batches of training fill it. Each capture has a side stream of
    its own, since it has a current stream of its own. Who uses it lets the current stream wait for it before anything
    that it reads is freed.
    """
    infers = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not x.is_cuda or not infers or not torch.cuda.is_current_stream_capturing():
        return None
    capturing = torch.cuda.current_stream(x.device)
    side = _side_of(capturing)
    side.wait_stream(capturing)
    return side


@functools.cache
def _side_of(capturing: torch.cuda.Stream) -> torch.cuda.Stream:
    side = torch.cuda.Stream(capturing.device)
    while side == capturing:  # streams come from a pool, and come again
        side = torch.cuda.Stream(capturing.device)
    return side
