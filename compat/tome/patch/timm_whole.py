"""Blocks of timm as one call of the extension, where nobody watches their parts and no gradient is wanted.

One call launches the kernels that the parts launch, with the same bits. But with few images, asking for nine operations
one by one takes the host longer than running them takes the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, Mlp
from timm.layers.activations import GELU, GELUTanh
from timm.models.vision_transformer import Attention, LayerScale
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tome import backend
from tome.patch.block import Norm, Tokens, has_hooks

INERT_IN_EVAL = (nn.Dropout, DropPath)
Linear = tuple[Tensor, Tensor | None]  # weight and bias


class Parameters(NamedTuple):
    """What a block of nothing but attention, linear layers, GELU and LayerScale computes with."""

    qkv: Linear
    proj: Linear
    gamma1: Tensor | None
    fc1: Linear
    is_tanh: bool  # which GELU
    fc2: Linear
    gamma2: Tensor | None


def run_whole(block: Any, tokens: Tokens, r: int, next_norm: Norm) -> Tokens | None:
    """A patched block as one call, or None where its parts must be called one by one.

    Args:
        block: the block.
        tokens: what enters it.
        r: how many tokens it merges.
        next_norm: the norm that reads its result.

    """
    x, size, slot, normed = tokens
    device = x.device.type
    if slot is not None or not _is_unwatched(x):
        return None
    kernels = backend.unrecorded_extension(x)
    if kernels is None:
        return None
    parts = parameters(block)
    if parts is None or (norm := block.mlp_norm(device)) is None:
        return None
    attn = block._modules["attn"]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    scale = attn.head_dim**-0.5 if attn.fused_attn else attn.scale
    if (x.dtype is not dtype and x.dtype is not torch.float32) or not kernels.takes_block(dtype, attn.head_dim, scale):
        return None
    x, normed, total = kernels.operators().block(
        *(x, block.norm1(x) if normed is None else normed, size, r, block._tome_prefix, block._tome_prop_attn),
        *(attn.num_heads, scale, *parts.qkv, *parts.proj, parts.gamma1, *_norm(norm, x), *parts.fc1, parts.is_tanh),
        *(*parts.fc2, parts.gamma2, *_norm(next_norm, x)),
    )
    return Tokens(x, total if r > 0 else size, None, normed)


def parameters(block: nn.Module) -> Parameters | None:
    """The parameters of a block whose parts do what their types say; None where one is another, or is watched."""
    # Submodules from their dictionaries: as attributes they take ten times as long, of which a block has many.
    own: Any = block._modules
    attn, mlp = own["attn"], own["mlp"]
    if type(attn) is not Attention or type(mlp) is not Mlp or attn.training or has_hooks(attn) or has_hooks(mlp):
        return None
    a, m = attn._modules, mlp._modules
    inert = [own["drop_path1"], own["drop_path2"], a["q_norm"], a["k_norm"], a["proj_drop"]]
    inert += [m["drop1"], m["norm"], m["drop2"]]
    inert += [a["norm"]] if "norm" in a else []  # not in every version of timm
    if a.get("gate") is not None or not all(map(is_inert, inert)):
        return None
    try:
        gammas = _gamma(own["ls1"]), _gamma(own["ls2"])
        qkv, proj, fc1, fc2 = _linear(a["qkv"]), _linear(a["proj"]), _linear(m["fc1"]), _linear(m["fc2"])
        return Parameters(qkv, proj, gammas[0], fc1, _is_tanh(m["act"]), fc2, gammas[1])
    except _OtherPart:
        return None


def through(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output; a call costs microseconds, which count where a block takes a hundred."""
    return x if is_inert(module) else module(x)


def is_inert(module: nn.Module) -> bool:
    """Whether the module returns what it is given."""
    kind = type(module)
    inert = kind is nn.Identity or (kind in INERT_IN_EVAL and not module.training)
    return inert and not has_hooks(module)


class _OtherPart(Exception):  # noqa: N818  # no error
    pass


def _is_unwatched(x: Tensor) -> bool:
    """Whether nothing but the result counts: no gradient, no compiler, no mode or hook that sees each operation."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not _has_any_global_hook()
    )


def _linear(module: Any) -> Linear:
    if type(module) is not nn.Linear or has_hooks(module):
        raise _OtherPart
    return _parameter(module, "weight"), module._parameters["bias"]


def _gamma(module: Any) -> Tensor | None:
    if type(module) is LayerScale and not has_hooks(module):
        return _parameter(module, "gamma")
    if not is_inert(module):
        raise _OtherPart
    return None


def _parameter(module: Any, name: str) -> Tensor:
    value = module._parameters.get(name)  # not there in a replica of DataParallel
    if type(value) is not nn.Parameter:  # of a quantised or distributed layer it is a subclass
        raise _OtherPart
    return value


def _is_tanh(module: Any) -> bool:
    kind = type(module)
    if kind not in (nn.GELU, GELU, GELUTanh) or has_hooks(module):
        raise _OtherPart
    return kind is GELUTanh or (kind is nn.GELU and module.approximate == "tanh")


def _norm(norm: Norm, x: Tensor) -> tuple[Tensor | None, Tensor | None, float, torch.dtype]:
    parameters = norm.module._parameters
    return parameters["weight"], parameters["bias"], norm.module.eps, x.dtype if norm.dtype is None else norm.dtype
