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


def swiglu_norm(gate: Tensor, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The LayerNorm of :func:`swiglu`'s first channels, as EVA-02 has it; behind them zeros.

    Args:
        gate: [..., C], floating point, any strides.
        x: the shape and dtype of gate.
        width: how many channels there are to the norm; the others are there to fill rows.
        weight: [width], or None for 1.
        bias: [width], or None for 0.
        eps: added to the variance.

    Returns:
        The shape and dtype of gate. Gradients flow to gate, x, weight and bias.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape, device, width or eps.

    """
    checks.swiglu_norm(gate, x, width, weight, bias, eps)
    hidden = (F.silu(gate) * x)[..., :width]
    # PyTorch takes parameters of the dtype of the tokens, or under autocast any.
    weight, bias = (None if p is None else p.to(hidden.dtype) for p in (weight, bias))
    normed = F.layer_norm(hidden, (width,), weight, bias, eps).to(hidden.dtype)
    return F.pad(normed, (0, gate.shape[-1] - width))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """A linear layer and its GELU: gelu(x weight^T + bias).

    Args:
        x: [..., K], floating point, any strides.
        weight: [J, K], the dtype of x; under autocast any floating point, as of ``F.linear``.
        bias: [J], likewise, or None.
        approximate: "none" for the exact GELU, x times the normal distribution function; "tanh" for its approximation.

    Returns:
        [..., J] in the dtype of x, or of autocast. The kernels round it once, PyTorch the linear layer too. Gradients
        flow to x, weight and bias.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device, or another ``approximate``.

    """
    checks.linear_gelu(x, weight, bias, approximate)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def hidden_layer(y: Tensor, fc1: checks.Linear, kind: str) -> Tensor:
    """The first linear layer of an MLP with one of the GELUs: "erf", "tanh" or "quick"."""
    hidden = F.linear(y, *fc1)
    return quick_gelu(hidden) if kind == "quick" else F.gelu(hidden, approximate="tanh" if kind == "tanh" else "none")
