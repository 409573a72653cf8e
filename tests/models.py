"""Small timm models of different construction, with random weights."""

import timm
import torch
from torch import nn

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}

WIDE = {"embed_dim": 128, "num_heads": 2}  # a head dimension that the kernels of attention know

# name -> (timm model, arguments, protected tokens)
HOSTS = {
    "plain": ("vit_tiny_patch16_224", {}, 1),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3 layer scale": ("deit3_small_patch16_224", {"init_values": 0.3}, 1),
    "dinov2": ("vit_small_patch14_dinov2", {"init_values": 0.3}, 1),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.3}, 5),
    "clip": ("vit_base_patch32_clip_224", {}, 1),
    "clip quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}, 1),
    "tanh": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, 1),
    "siglip map": ("vit_base_patch16_siglip_224", {}, 0),
    "siglip gap": ("vit_base_patch16_siglip_gap_224", {}, 0),
    "mae avg": ("vit_base_patch16_224", {"global_pool": "avg"}, 1),
    "class-free avg": ("vit_base_patch16_gap_224", {}, 0),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}, 1),
    "max": ("vit_tiny_patch16_224", {"global_pool": "max"}, 1),
    "prefix pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, 1),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    "scale norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}, 1),
    "res-post-norm": ("vit_relpos_none", {}, 1),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}, 4),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 1),
    "drop path": ("vit_tiny_patch16_224", {"drop_path_rate": 0.3, "attn_drop_rate": 0.1}, 1),
    "swiglu": ("vit_giant_patch14_dinov2", {"init_values": 0.3}, 1),
}


def make(name: str, **kwargs) -> nn.Module:
    """A small model of HOSTS in eval mode, float32, with weights that make its tokens differ."""
    host, extra, prefix = HOSTS[name]
    torch.manual_seed(0)  # whatever ran before
    if host == "vit_relpos_none":
        from timm.models.vision_transformer import ResPostBlock, VisionTransformer

        model = VisionTransformer(**{**SMALL, "block_fn": ResPostBlock, "init_values": 0.3, **kwargs})
    else:
        model = timm.create_model(host, pretrained=False, **{**SMALL, **extra, **kwargs})
    features = kwargs.get("features_only", False)
    assert features or model.num_prefix_tokens == prefix
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def images(batch: int = 2, size: int = 48) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
