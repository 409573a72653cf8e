"""Tokens and FLOPs of models, counted without running them."""

import itertools

import pytest
import timm
import torch
from models import HOSTS, images, make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tome
from tome import cost, schedule


def on_meta(name, **kwargs):
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs).eval()
    except RuntimeError:  # older versions of timm read tensors while they make a model
        return timm.create_model(name, **kwargs).to("meta").eval()


def by_hand(model, tokens):
    """Two for each weight of a linear layer or convolution and each place it sees, and the products of attention."""
    places = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, y: places.update({m: y.shape[2] * y.shape[3]}))
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, _, y: places.update({m: y.numel() // y.shape[-1]}))
    with torch.no_grad():
        model(torch.empty(1, *cost.input_size(model), device="meta"))
    total = 0
    for block, (n, m) in zip(model.blocks, itertools.pairwise(tokens), strict=True):
        places |= dict.fromkeys(block.attn.modules(), n)  # attention sees n tokens
        places |= dict.fromkeys(block.mlp.modules(), m)  # the MLP sees the m that are left
        total += 4 * n * n * block.attn.num_heads * block.attn.head_dim
    weighty = (nn.Conv2d, nn.Linear)
    return total + sum(2 * m.weight.numel() * count for m, count in places.items() if isinstance(m, weighty))


# Tokens that enter, pixels, GFLOPs, and the speed-up that the saved arithmetic of r = 16 allows.
MODELS = {
    "vit_base_patch16_224": (197, 224, 35.13, 2.00),
    "vit_tiny_r_s16_p8_224": (50, 224, 0.87, 2.13),  # the others have stems that are networks of their own
    "vit_base_r50_s16_384": (577, 384, 134.31, 1.18),
    "vitamin_small_224": (196, 224, 11.78, 1.77),
    "vitamin_large_224": (196, 224, 149.85, 3.43),
    "vitamin_xlarge_336": (441, 336, 459.72, 2.04),  # whose configuration says 256 pixels
}


@pytest.mark.parametrize(("name", "expected"), MODELS.items())
def test_every_product_counts(name, expected):
    model = on_meta(name)
    tokens, pixels, gflops, allowed = expected
    assert cost.tokens(model) == tokens
    assert cost.input_size(model) == (3, pixels, pixels)
    flops = [cost.flops(model, r) for r in (0, 16)]
    assert (round(flops[0] / 1e9, 2), round(flops[0] / flops[1], 2)) == (gflops, allowed)
    plans = [schedule.plan(r, len(model.blocks), tokens, model.num_prefix_tokens).tokens for r in (0, 16)]
    assert flops == [by_hand(model, plan) for plan in plans]


def test_the_figures_of_the_readme():
    model = on_meta("vit_small_patch16_224")
    flops = [cost.flops(model, r) for r in (0, 8, 16, (16, -1.0))]
    assert [round(f / 1e9, 2) for f in flops] == [9.20, 6.83, 4.58, 3.08]
    assert [round(flops[0] / f, 2) for f in flops] == [1.00, 1.35, 2.01, 2.99]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("r", [0, (6, -1.0)], ids=str)
def test_flops_are_those_of_a_run_without_its_matching(host, r):
    model = tome.patch.timm(make(host)).requires_grad_(False)  # else the counter looks for gradient functions
    model.r = r
    plan = schedule.plan(r, 4, cost.tokens(model), model.num_prefix_tokens)
    # torch counts the products of plain attention on every version; its fused CPU kernel only on newer ones.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, tome.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(images(1))
    matching = sum(
        2 * ((n - model.num_prefix_tokens) // 2) * ((n - model.num_prefix_tokens + 1) // 2) * 16
        for n, merged in zip(plan.tokens, plan.r, strict=False)
        if merged
    )
    assert cost.flops(model, r) == counter.get_total_flops() - matching


def test_another_size_and_other_channels():
    model = on_meta("vit_tiny_patch16_224", dynamic_img_size=True, in_chans=1)
    assert cost.input_size(model) == (1, 224, 224)
    assert cost.tokens(model) == 197
    assert cost.tokens(model, (1, 64, 96)) == 25
    assert cost.flops(model, 0, (1, 64, 96)) < cost.flops(model) / 7


def test_counting_leaves_the_model_as_it_is():
    model = tome.patch.timm(make("plain", drop_path_rate=0.3)).train()
    model.r = 3
    before = tome.merged(model, images()).x.shape[1]
    assert cost.flops(model, 5) < cost.flops(model)
    assert cost.tokens(model) == 37
    assert (model.r, model.training, tome.merged(model, images()).x.shape[1]) == (3, True, before)
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    with tome.use_backend("cuda"):  # which runs nothing on the meta device
        assert cost.flops(model, 5) < cost.flops(model)
    with pytest.raises(ValueError, match="negative"):
        cost.flops(model, -1)
