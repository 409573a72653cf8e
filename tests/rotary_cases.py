"""Small models of timm's rotary families, and what merging makes of them, by the models' own modules one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import tome_reference

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
TOWER = SMALL | {"out_features": 16}
ENCODER = {key: value for key, value in TOWER.items() if key != "num_classes"}
GEMMA = SMALL | {"head_dim": 16, "num_kv_heads": 1, "intermediate_size": 64, "position_embedding_size": 64}
MROPE = {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3), "rope_grid_indexing": "ij"}
QWEN = {"pos_embed_grid_size": 4}

# name -> (timm model, arguments, protected tokens)
HOSTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "eva": ("eva_giant_patch14_224", SMALL, 1),
    "eva02": ("eva02_tiny_patch14_224", SMALL, 1),
    "eva02 clip": ("eva02_base_patch16_clip_224", SMALL, 1),
    "eva02 post-norm": ("eva02_enormous_patch14_clip_224", SMALL, 1),
    "post-norm rope": ("eva02_tiny_patch14_224", SMALL | {"use_post_norm": True}, 1),
    "dinov3": ("vit_small_patch16_dinov3", SMALL | {"init_values": 0.3}, 5),
    "dinov3 swiglu": ("vit_small_plus_patch16_dinov3_qkvb", SMALL | {"init_values": 0.3}, 5),
    "registers": ("vit_betwixt_patch16_rope_reg4_gap_256", SMALL | {"init_values": 0.3}, 4),
    "9 registers": ("vit_base_patch16_rope_reg1_gap_256", SMALL | {"num_reg_tokens": 9}, 9),
    "pe core": ("vit_pe_core_tiny_patch16_384", SMALL, 1),
    "pe lang": ("vit_pe_lang_gigantic_patch14_448", SMALL | {"init_values": 0.3}, 0),
    "pe spatial": ("vit_pe_spatial_tiny_patch16_512", SMALL, 1),
    "rope": ("vit_small_patch16_rope_ape_224", SMALL, 1),
    "mixed": ("vit_small_patch16_rope_mixed_224", SMALL | {"init_values": 0.3}, 1),
    "mrope": ("vit_small_patch16_rope_224", SMALL | MROPE, 1),
    "q/k norm": ("vit_small_patch16_rope_224", SMALL | {"qk_norm": True, "scale_attn_inner": True}, 1),
    "sapiens2": ("vit_base_patch16_sapiens2", SMALL | {"num_heads": 4, "num_kv_heads": (4, 2, 1)}, 9),
    "qwen3": ("qwen3_vit_88m", TOWER | QWEN, 0),
    "qwen3 merge": ("qwen3_vit_88m_merge", TOWER | QWEN, 0),
    "qwen3 encoder": ("qwen3_vit_88m_enc", ENCODER | QWEN, 0),
    "deepseek": ("deepseek_vit_412m", TOWER, 0),
    "deepseek align": ("deepseek_vit_412m_align", TOWER, 0),
    "deepseek encoder": ("deepseek_vit_412m_enc", ENCODER, 0),
    "gemma4": ("gemma4_vit_167m", GEMMA, 0),
    "gemma4 soft": ("gemma4_vit_570m", GEMMA | {"encoder_pool": "soft", "use_clipped_linears": True}, 0),
}


def make(name: str, **changed: Any) -> nn.Module:
    """A small model of HOSTS."""
    host, kwargs, prefix = HOSTS[name]
    if not timm.is_model(host):
        pytest.skip(f"timm {timm.__version__} has no {host}")
    with may_fail_in_older_timm(TypeError):
        model = shaken(timm.create_model(host, pretrained=False, **{**kwargs, **changed}))
    assert trunk(model).num_prefix_tokens == prefix or "num_reg_tokens" in changed
    return model


@contextmanager
def may_fail_in_older_timm(*errors: type[Exception]) -> Iterator[None]:
    """Skip the test where timm itself, unpatched, cannot do what follows."""
    try:
        yield
    except errors as error:
        if tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) >= (1, 0, 31):
            raise
        pytest.skip(f"timm {timm.__version__}: {error}")


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode, with weights that make its tokens differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def trunk(model: nn.Module) -> Any:
    """What has the blocks."""
    return getattr(model, "encoder", model)


def by_hand(
    model: nn.Module, r: list[int], *inputs: Any, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What an unpatched model's blocks would make of tokens that merge.

    Returns:
        The tokens behind the last block on the full grid, how many tokens without padding each of the merged stands
        for [B, M], and the slot maps.

    """
    blocks = list(trunk(model).blocks)
    calls: list[Any] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    x = calls[0][0][0]
    batch, n, _ = x.shape
    count = torch.ones(batch, n) if valid is None else valid.float()
    home = torch.arange(n).expand(batch, n)
    steps = []
    for block, (args, kwargs), amount in zip(blocks, calls, r, strict=True):
        given = args[1:3] or kwargs.get("rope")
        leading = trunk(model).num_prefix_tokens
        mask = count.log()[:, None, None]
        table = placed(given, home, leading)
        value, _ = attended(block, x, table, mask)
        unturned = (torch.ones_like(table[0]), torch.zeros_like(table[1])) if isinstance(table, tuple) else None
        _, keys = attended(block, x, unturned, mask)
        x = x + value
        if amount:
            keys = keys.masked_fill((count == 0)[:, None, :, None], torch.nan)
            slot = tome_reference.match(keys, amount, leading)
            left = x.shape[1] - amount
            x, _ = tome_reference.merge(x, slot, left, count.clamp(min=1e-12))
            home = torch.stack([
                torch.stack([places[first(slots == j, counts)] for j in range(left)])
                for places, slots, counts in zip(home, slot, count, strict=True)
            ])  # fmt: skip
            count = torch.zeros(batch, left).scatter_add(1, slot.long(), count)
            steps.append(slot)
        x = x + mlp(block, x)
    return tome_reference.restore(x, None, steps) if steps else x, count, steps


def first(is_member: Tensor, counts: Tensor) -> Tensor:
    """The first member of a group that is no padding, if there is one."""
    real = is_member & (counts > 0)
    return (real if real.any() else is_member).nonzero()[0, 0]


def placed(given: Any, home: Tensor, leading: int) -> Any:
    """The rows of rotary tables at these places."""
    if isinstance(given, tuple):
        return tuple(torch.stack([t[h] for t, h in zip(table, home, strict=True)]) for table in given)
    if given is None:
        return None
    table = given[None] if given.dim() == 2 else given
    tables = table if table.dim() == 4 else [table] * len(home)
    return torch.stack([t[:, h[leading:] - leading] for t, h in zip(tables, home, strict=True)])


def attended(block: Any, x: Tensor, given: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What attention adds to x, and its keys."""
    kind, keys, real = type(block).__name__, [], functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        keys.append(k)
        return real(q, k, v, **kwargs)

    block.attn.fused_attn = True
    y = x if kind.endswith("PostNorm") else block.norm1(x)
    with mock.patch.object(functional, "scaled_dot_product_attention", spy):
        if isinstance(given, tuple):
            value = block.attn(y, *given, attn_mask=mask)
        else:
            value = block.attn(y, attn_mask=mask, **({} if given is None else {"rope": given}))
    if kind.endswith("PostNorm"):
        value = block.norm1(value)
    elif kind == "Gemma4Block":
        value = block.norm2(value)
    return scaled(block, 1, value), keys[0]


def mlp(block: Any, x: Tensor) -> Tensor:
    """What the MLP adds to x."""
    if type(block).__name__ == "Gemma4Block":
        return block.norm4(block.mlp(block.norm3(x)))
    if type(block).__name__.endswith("PostNorm"):
        return block.norm2(block.mlp(x))
    return scaled(block, 2, block.mlp(block.norm2(x)))


def scaled(block: Any, i: int, value: Tensor) -> Tensor:
    """Behind LayerScale."""
    gamma = getattr(block, f"gamma_{i}", None)
    value = value if gamma is None else gamma * value
    return getattr(block, f"ls{i}")(value) if hasattr(block, f"ls{i}") else value


def behind(model: nn.Module, x: Tensor, *inputs: Any) -> Any:
    """What the model makes of its inputs where its last block gives x."""
    hook = trunk(model).blocks[-1].register_forward_hook(lambda *_: x)
    out = model(*inputs)
    hook.remove()
    return out
