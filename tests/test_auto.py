"""tome.patch.auto: whose model it is, and models in wrappers of the user's own."""

import copy

import pytest
import timm
import torch
from mha_hosts import images, make, shaken
from models import make as make_timm
from stand_in_hosts import Mae, Swag
from test_open_clip import TRUNK, clip
from torch import nn

import tome
from tome.patch import hosts
from tome.patch.model import Holder
from tome.patch.swap import Patched


class Wrapper(nn.Module):
    def __init__(self, model, **others):
        super().__init__()
        self.model = nn.ModuleDict({"backbone": model})
        self.head = nn.Linear(2, 2)
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x):
        return self.model["backbone"](x)


@pytest.mark.parametrize("make_inner", [make_timm, make], ids=["timm", "mha"])
def test_a_model_in_a_wrapper(make_inner):
    inner = make_inner("plain" if make_inner is make_timm else "torchvision")
    model = Wrapper(inner)
    x = images(make("torchvision"))
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        twin.r = 4
        assert not torch.equal(twin(x), model(x))
    backbone = twin.model["backbone"]
    assert backbone.r == twin.model.r == twin.r == 4
    twin.model.r = 3
    assert backbone.r == 3
    assert sum(twin._tome_info["size"][0]) == 37
    assert [name for name, m in twin.named_modules() if isinstance(m, Holder)] == ["", "model"]
    parallel = nn.DataParallel(twin)
    parallel.r = 2
    assert backbone.r == 2
    assert not [m for m in tome.unpatch(twin).modules() if isinstance(m, Patched) and "ends" not in type(m).__module__]
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_a_model_in_a_model_in_a_wrapper():
    model = clip(vision=TRUNK)
    twin = tome.patch.auto(Wrapper(model))
    twin.r = 2
    assert (twin.model["backbone"].r, model.r, model.visual.r, model.visual.trunk.r) == (2, 2, 2, 2)
    assert tome.merged(twin, torch.randn(1, 3, 160, 160)).count() == 101 - 12


def test_a_model_of_transformers_in_a_wrapper():
    transformers = pytest.importorskip("transformers")
    config = {"image_size": 48, "patch_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32}
    model = Wrapper(shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**config))))
    tome.patch.auto(model).r = 4
    assert model.model["backbone"].r == model.model["backbone"].vit.r == 4


def test_mae_in_a_wrapper_is_not_weighed():
    small = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = tome.patch.auto(Wrapper(shaken(Mae(True, **small))))
    assert model._tome_info["prop_attn"] is False
    assert tome.patch.auto(Wrapper(shaken(Swag())))._tome_info["prop_attn"] is True


def test_what_auto_finds_but_cannot_patch():
    cases = {
        r"Linear comes from none of timm, .* and holds no model of theirs.*Supported: timm \(VisionTrans": nn.Linear(
            2, 2
        ),
        r"Wrapper comes from none of .* holds no model of theirs": Wrapper(timm.create_model("test_resnet")),
        r"and holds model.backbone, teacher: it must hold one": Wrapper(
            make_timm("plain"), teacher=make("torchvision")
        ),
        r"Wrapper has an attribute r of its own: patch its model.backbone itself": Wrapper(make_timm("plain"), r=4),
        r"DataParallel: patch the model in it before torch.compile, DataParallel": nn.DataParallel(make_timm("plain")),
        r"OptimizedModule: patch the model in it before": torch.compile(make_timm("plain")),
        r"ResNet is not supported": timm.create_model("test_resnet"),
    }
    for reason, model in cases.items():
        with pytest.raises(tome.UnsupportedModelError, match=reason):
            tome.patch.auto(model)
        assert not any(isinstance(module, Patched) for module in model.modules())


def test_a_model_that_stands_twice_is_one():
    inner = make_timm("plain")
    model = tome.patch.auto(Wrapper(inner, alias=inner))
    model.r = 4
    assert inner.r == 4


def test_the_table_of_what_is_supported(monkeypatch):
    rows = {row.library: row for row in hosts.supported()}
    assert list(rows) == ["timm", "transformers", "torchvision", "open_clip", "SWAG", "MAE"]
    for row in rows.values():
        assert row.models
        assert hasattr(tome.patch, row.function.removeprefix("tome.patch."))
    assert "ViTModel" in rows["transformers"].models
    monkeypatch.setattr(hosts, "find_spec", lambda name: None)
    assert hosts.supported()[3] == hosts.Support(
        "open_clip", "tome.patch.open_clip", (), "pip install 'token-merging[open_clip]'"
    )
    reasons = hosts.unsupported()
    assert len(reasons) == len(set(reasons.values()))
    assert any("Swin" in names and "transformers.sam" in names for names in reasons.values())
