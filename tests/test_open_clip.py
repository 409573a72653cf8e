"""open_clip's models: which tower is patched, and what they give out besides their embedding."""

import copy

import open_clip
import pytest
import torch
from mha_hosts import HOSTS, images, make, shaken
from open_clip.timm_model import TimmModel

import tome
from tome.patch.open_clip_vit import BLOCKS, MODELS, NORMS, TIMM
from tome.patch.swap import Patched

VISION = {"image_size": 48, "patch_size": 8, "layers": 4, "width": 64, "mlp_ratio": 2.0, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
TRUNK = VISION | {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"}
COCA = VISION | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
IDS = torch.tensor([[1, 5, 9, 2, 49, 0, 0, 0], [1, 7, 2, 49, 0, 0, 0, 0]])
OWN = ("open_clip", "open_clip avg", "open_clip coca")


def clip(kind="CLIP", vision=VISION):
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    if kind == "CoCa":
        config |= {"multimodal_cfg": TEXT, "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True}}
    model = getattr(open_clip, kind)(**config)
    if kind == "CoCa":  # which leaves it as the memory was
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    return shaken(model)


def outputs(model, x):
    out = model(x, IDS)
    return [value for value in (out.values() if isinstance(out, dict) else out) if value.dim() > 0]


@pytest.mark.parametrize(
    ("kind", "vision"),
    [("CLIP", VISION), ("CustomTextCLIP", VISION), ("CoCa", COCA), ("CLIP", TRUNK), ("CustomTextCLIP", TRUNK)],
)
def test_of_two_towers_the_vision_tower_is_patched(kind, vision):
    model = clip(kind, vision)
    x = torch.randn(2, 3, vision["image_size"], vision["image_size"])
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        for ours, theirs in zip(outputs(twin, x), outputs(model, x), strict=True):
            assert torch.equal(ours, theirs)
        twin.r = 4
        image, text = twin.encode_image(x), twin.encode_text(IDS)
        assert not torch.equal(image, model.encode_image(x))
        assert torch.equal(text, model.encode_text(IDS))
        outputs(twin, x)
    assert twin.visual.r == 4
    depth = len(twin._tome_info["r"])
    assert tome.merged(twin, x, IDS).count() == (x.shape[2] // (8 if depth == 4 else 16)) ** 2 + 1 - 4 * depth
    assert not any(isinstance(m, Patched) for name, m in twin.named_modules() if name and not name.startswith("visual"))
    if vision is TRUNK:
        assert twin.visual.trunk.r == 4
        twin.visual.r = 3
        assert twin.r == twin.visual.trunk.r == 3
    assert torch.equal(tome.unpatch(twin).encode_image(x), model.encode_image(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("host", OWN)
@pytest.mark.parametrize("r", [0, 4])
def test_intermediates_are_on_the_grid(host, r):
    model = make(host)
    twin = tome.patch.open_clip(copy.deepcopy(model))
    x = images(model)
    with torch.no_grad():
        for options in (
            {"normalize_intermediates": True, "output_fmt": "NLC"},
            {"indices": [0, 2], "stop_early": True},
        ):
            if "coca" in host and "normalize_intermediates" in options:  # whose last norm is of another width
                continue
            ours, theirs = (
                each.forward_intermediates(x, output_extra_tokens=True, **options) for each in (twin, model)
            )
            twin.r = r
            ours = twin.forward_intermediates(x, output_extra_tokens=True, **options)
            assert ours.keys() == theirs.keys()
            for key in ours:
                mine, others = (each[key] if isinstance(each[key], list) else [each[key]] for each in (ours, theirs))
                assert [type(t) for t in mine] == [torch.Tensor] * len(others)
                assert [t.shape for t in mine] == [t.shape for t in others]
                assert r or all(map(torch.equal, mine, others))


def test_what_is_pruned_merges_over_the_blocks_that_are_left():
    model = tome.patch.open_clip(make("open_clip avg"))
    model.r = (6, -1.0)
    model.prune_intermediate_layers([1])
    assert len(model._tome_info["r"]) == 2
    assert sum(model._tome_info["r"]) == 12
    with torch.no_grad():
        assert type(model.transformer(torch.zeros(2, 37, 32))) is torch.Tensor
        assert model(images(model)).shape == (2, 32)


def test_half_weights_with_norms_in_float32():
    """As open_clip makes a model with precision="bf16"."""
    model = make("open_clip float32 norms")
    open_clip.convert_weights_to_lp(model, torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    twin = tome.patch.open_clip(copy.deepcopy(model))
    x = images(model).bfloat16()
    with torch.no_grad():
        expected = model(x)
        twin.r = 0.001
        torch.testing.assert_close(twin(x), expected, rtol=0.02, atol=0.02)
        assert twin(x).dtype is expected.dtype
        twin.r = 4
        assert tome.merged(twin, x).x.dtype is torch.bfloat16


def test_towers_that_are_not_supported_are_named():
    model = clip(vision=VISION | {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64})
    with pytest.raises(tome.UnsupportedModelError, match=r"ModifiedResNet is no vision tower that is supported"):
        tome.patch.auto(model)
    with pytest.raises(tome.UnsupportedModelError, match=r"ResNet is not supported"):
        tome.patch.auto(TimmModel("resnet18", 16, pool="avg", proj="linear"))
    model = HOSTS["open_clip"][0](scaled_cosine_attn=True)
    with pytest.raises(tome.UnsupportedModelError, match=r"resblocks\.0\.attn: attention by cosines is not supported"):
        tome.patch.open_clip(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 48, 48))


def test_every_name_is_one_of_open_clips():
    for name in (*BLOCKS, *MODELS, *NORMS, TIMM):
        home, _, kind = name.rpartition(".")
        assert hasattr(__import__(home, fromlist=[kind]), kind)
