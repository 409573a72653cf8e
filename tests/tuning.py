"""What the tests of tuning share: a clock that counts FLOPs, and a model with a layer in which merging does harm."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PLANTED = 1  # the layer of planted() in which merging does harm


def flops_clock(calls, device, warm_up, runs, progress=True):
    """As measure.time_calls, but a second is 1e9 FLOPs of products: the same in every run."""
    seconds = {}
    for name, call in calls.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        seconds[name] = [counter.get_total_flops() / 1e9 + 1e-9] * runs
    return seconds


def vit(depth=4, classes=5, seed=0):
    """A ViT of 64 patches."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=32, patch_size=4, num_classes=classes, embed_dim=32, depth=depth, num_heads=2, init_values=0.1
    )
    for parameter in model.parameters():  # timm's first values make all blocks nearly nothing
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


@torch.no_grad()
def planted():
    """The same with one layer whose keys are noise of the position: there unlike tokens merge."""
    model = vit()
    model.pos_embed.mul_(0.05)
    for i, block in enumerate(model.blocks):
        keys = block.attn.qkv.weight[32:64]
        if i == PLANTED:
            keys.zero_()  # all keys are alike, so that any two tokens may merge
        else:
            keys.copy_(torch.eye(32))
    return model


def twins(count=6):
    """Images whose patches are alike in pairs that bipartite matching can see: half of the tokens are redundant."""
    generator = torch.Generator().manual_seed(1)
    patches = 2 * torch.randn(count, 3, 8, 4, generator=generator).repeat_interleave(2, dim=3)
    return patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
