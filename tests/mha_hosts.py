"""Small models built on nn.MultiheadAttention, and what merging in them is, by their own modules."""

import open_clip.transformer
import torch
import torch.nn.functional as F
from stand_in_hosts import Swag
from torch import nn
from torchvision.models import vision_transformer as torchvision_vit

import tome_reference

SMALL = {"image_size": 48, "patch_size": 8, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
CLIP = {"image_size": 48, "patch_size": 8, "layers": 4, "heads": 2, "width": 32, "mlp_ratio": 2.0, "output_dim": 16}
CUSTOM = dict.fromkeys(["qk_norm", "scale_heads", "scale_attn", "scale_attn_inner", "scale_fc"], True)
STEM = [torchvision_vit.ConvStemConfig(8, 3, 2), torchvision_vit.ConvStemConfig(16, 3, 2)]


def torchvision(**kwargs):
    return lambda **more: torchvision_vit.VisionTransformer(**SMALL | {"num_classes": 7} | kwargs | more)


def clip(**kwargs):
    return lambda **more: open_clip.transformer.VisionTransformer(**CLIP | kwargs | more)


# name -> (its constructor, protected tokens)
HOSTS = {
    "torchvision": (torchvision(), 1),
    "torchvision stem": (torchvision(conv_stem_configs=STEM, patch_size=4, image_size=24), 1),
    "torchvision dropout": (torchvision(dropout=0.2, attention_dropout=0.1), 1),
    "open_clip": (clip(), 1),
    "open_clip quick": (clip(act_layer=open_clip.transformer.QuickGELU), 1),
    "open_clip float32 norms": (clip(norm_layer=open_clip.transformer.LayerNormFp32), 1),
    "open_clip avg": (clip(no_ln_pre=True, final_ln_after_pool=True, pool_type="avg"), 1),
    "open_clip layer scale": (clip(ls_init_value=0.5), 1),
    "open_clip coca": (clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2, output_tokens=True), 1),
    "open_clip custom": (clip(**CUSTOM), 1),
    "open_clip custom scale": (clip(**CUSTOM, ls_init_value=0.5), 1),
    "swag": (Swag, 1),
    "swag gap": (lambda **more: Swag("gap", **more), 0),
}


def shaken(model):
    """In eval mode, with weights that make its tokens differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def make(host, **kwargs):
    return shaken(HOSTS[host][0](**kwargs))


def images(model, batch=2):
    size = model.image_size if isinstance(model.image_size, int) else model.image_size[0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def blocks_of(model):
    return list(model.encoder.layers if hasattr(model, "encoder") else model.transformer.resblocks)


def attention_of(block):
    return block.self_attention if hasattr(block, "self_attention") else block.attn


def by_hand(model, x, r, prefix):
    """The tokens behind the last block on the full grid, [B, N, C]; the model's r must be 0."""
    seen = {}
    first = blocks_of(model)[0]
    handle = first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(x)
    handle.remove()
    x, size, steps = seen["x"], None, []
    if isinstance(model, Swag):
        x = x.transpose(0, 1)
    for block in blocks_of(model):
        y = block.ln_1(x)
        attn = attention_of(block)
        batch, n, width = y.shape
        weight, bias = (p.chunk(3)[1] for p in (attn.in_proj_weight, attn.in_proj_bias))
        keys = F.linear(y, weight, bias).unflatten(2, (2, width // 2)).transpose(1, 2)
        mask = None if size is None else size.log()[:, None, None].expand(batch, 2, n, n)
        if isinstance(attn, nn.MultiheadAttention):
            mask = None if mask is None else mask.flatten(0, 1)
            turned = y if attn.batch_first else y.transpose(0, 1)
            out = attn(turned, turned, turned, attn_mask=mask)[0]
            out = out if attn.batch_first else out.transpose(0, 1)
        else:
            keys = attn.ln_k(keys)
            out = block.ln_attn(attn(y, attn_mask=mask))
        x = x + (block.ls_1(out) if hasattr(block, "ls_1") else out)
        slot = tome_reference.match(keys, r, prefix)
        x, size = tome_reference.merge(x, slot, n - r, size)
        steps.append(slot)
        out = block.mlp(block.ln_2(x))
        x = x + (block.ls_2(out) if hasattr(block, "ls_2") else out)
    return tome_reference.restore(x, None, steps)
