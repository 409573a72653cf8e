"""What a Vision Transformer of timm computes for one image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tome import schedule


def cost(model: VisionTransformer, image_size: tuple[int, int] | None = None) -> tuple[int, schedule.Cost]:
    """Tokens that enter the first block, and the FLOPs of a timm Vision Transformer, patched or not.

    Args:
        model: the model.
        image_size: height and width in pixels; None for the model's own.

    """
    grid = model.patch_embed.grid_size if image_size is None else model.patch_embed.dynamic_feat_size(image_size)
    patches = grid[0] * grid[1]
    block = model.blocks[0]
    heads = [m for name, m in model.named_children() if name in ("head", "head_dist")]
    fixed = patches * _per_token(model.patch_embed) + sum(_per_token(m) for m in heads)
    pool, per_token = model.attn_pool, 0
    if pool is not None:
        per_token = _per_token(pool.kv) + 4 * pool.latent_len * pool.num_heads * pool.head_dim
        fixed += pool.latent_len * (_per_token(pool) - _per_token(pool.kv))
    dims = schedule.Cost(
        attention=_per_token(block.attn),
        mixing=4 * block.attn.num_heads * block.attn.head_dim,
        mlp=_per_token(block.mlp),
        fixed=fixed,
        pool=per_token,
    )
    return patches + model.num_prefix_tokens, dims


def _per_token(module: nn.Module) -> int:
    weights = [m.weight for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(2 * w.numel() for w in weights)
