"""SWAG's and MAE's classes, and the names of the original package for them."""

import copy
import inspect

import pytest
import torch
from mha_hosts import images, make, shaken
from stand_in_hosts import Mae, Swag
from torch import nn

import tome

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}


@pytest.mark.parametrize(("name", "prop_attn"), [("timm", True), ("swag", True), ("mae", False)])
def test_the_signatures_of_the_original_package(name, prop_attn):
    parameters = list(inspect.signature(getattr(tome.patch, name)).parameters.values())
    assert [(p.name, p.default) for p in parameters[1:4]] == [
        ("trace_source", False),
        ("prop_attn", prop_attn),
        ("use_cuda_ext", None),
    ]
    assert parameters[0].name == "model"


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_swag(classifier):
    model = shaken(Swag(classifier))
    twin = tome.patch.swag(copy.deepcopy(model), trace_source=True)
    x = images(model, 3)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        twin.r = 4
        assert twin(x).shape == (3, 7)
    prefix = int(classifier == "token")
    info = twin._tome_info
    assert info["source"].shape == (3, 36 + prefix - 16, 36 + prefix)
    assert (info["class_token"], info["prop_attn"], twin._tome_prefix()[0]) == (prefix == 1, True, prefix)


def test_the_mean_of_swag_is_that_of_all_tokens():
    """Tokens that are merged count as often as they are: with equal patches nothing changes."""
    model = shaken(Swag("gap"))
    model.encoder.pos_embedding.data.zero_()
    twin = tome.patch.swag(copy.deepcopy(model))
    twin.r = 6
    x = torch.randn(2, 3, 16, 8).repeat(1, 1, 3, 6)  # rows of equal patches
    with torch.no_grad():
        assert tome.merged(twin, x).count() == 12
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_only_looks_like_swag_is_refused():
    for model in (make("torchvision"), nn.Linear(2, 2)):
        with pytest.raises(tome.UnsupportedModelError, match=r"is not SWAG's VisionTransformer, whose encoder\.layers"):
            tome.patch.swag(model)
    model = shaken(Swag())
    model.encoder.layers[2] = Other(model.encoder.layers[2])
    with pytest.raises(tome.UnsupportedModelError, match=r"encoder\.layers\.2: Other is not supported"):
        tome.patch.swag(model)


class Other(nn.Module):
    """The same parts, and nobody knows in which order."""

    def __init__(self, block):
        super().__init__()
        for name, part in block.named_children():
            setattr(self, name, part)


@pytest.mark.parametrize("global_pool", [True, False])
def test_mae(global_pool):
    model = shaken(Mae(global_pool, **SMALL))
    x = images(Swag())
    twins = {
        "mae": tome.patch.mae(copy.deepcopy(model)),
        "auto": tome.patch.auto(copy.deepcopy(model)),
        "weighed": tome.patch.mae(copy.deepcopy(model), prop_attn=True),
        "auto, weighed": tome.patch.auto(copy.deepcopy(model), prop_attn=True),
        "timm": tome.patch.timm(copy.deepcopy(model)),
    }
    with torch.no_grad():
        for twin in twins.values():
            assert torch.equal(twin(x), model(x))
            twin.r = 4
        out = {name: twin(x) for name, twin in twins.items()}
    assert [twin._tome_info["prop_attn"] for twin in twins.values()] == [False, False, True, True, True]
    assert torch.equal(out["mae"], out["auto"])
    assert torch.equal(out["weighed"], out["auto, weighed"])
    assert torch.equal(out["weighed"], out["timm"])
    assert not torch.allclose(out["mae"], out["weighed"], atol=1e-5)
    assert tome.merged(twins["mae"], x).count() == 37 - 16


def test_the_mean_of_mae_is_that_of_all_patches():
    model = tome.patch.mae(shaken(Mae(True, **SMALL)))
    model.r = 4
    x, seen = images(Swag()), []
    handle = model.fc_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        tokens = tome.merged(model, x)
    weighed = (tokens.x * tokens.size[:, :, None])[:, 1:].sum(1) / 36
    torch.testing.assert_close(seen[0], weighed)
