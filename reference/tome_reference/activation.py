"""The activations between the linear layers of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_reference import checks


def quick_gelu(x: Tensor) -> Tensor:
    """The quick GELU of CLIP: x * sigmoid(1.702 * x).

    Args:
        x: [..., C], floating point, any strides.

    Returns:
        The shape and dtype of x. Gradients flow to x.

    Raises:
        TypeError, ValueError: a wrong dtype or rank.

    """
    checks.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x)


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """The gated activation of SwiGLU: silu(gate) * x.

    Args:
        gate: [..., C], floating point, any strides: a half of a packed tensor is read where it lies.
        x: the shape and dtype of gate.

    Returns:
        Likewise. Gradients flow to both.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device.

    """
    checks.swiglu(gate, x)
    return F.silu(gate) * x


def gelu(x: Tensor, kind: str) -> Tensor:
    """One of the GELUs: "erf", "tanh" or "quick"."""
    return quick_gelu(x) if kind == "quick" else F.gelu(x, approximate="tanh" if kind == "tanh" else "none")
