"""Patched timm models run addition, merge and norm as one operation, and the patch embedding as a matrix product,
wherever nobody can tell the difference.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from models import HOSTS, SMALL, images, make
from timm.models import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import tome
from tome import backend, recording, report
from tome.patch import ends
from tome.tokens import Norm

NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
every_host = pytest.mark.parametrize("host", HOSTS)


def twins(host, r=NOTHING):
    """A model, and a patched copy of it."""
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = r
    return model, twin


def calls(model, x=None):
    return {part.name: part.calls for part in report.parts(model, images() if x is None else x)}


def ops_of(calls):
    return [(call.op, call.backend) for call in calls]


@every_host
@pytest.mark.parametrize("autocast", [False, True])
def test_the_chain_of_norms_is_the_unpatched_model_bit_for_bit(host, autocast):
    model, twin = twins(host)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(twin(images()), model(images()))
        assert torch.equal(twin.forward_features(images()), model.forward_features(images()))
        features, intermediates = twin.forward_intermediates(images(), norm=True, stop_early=True, indices=[0, 2])
        expected, expected_intermediates = model.forward_intermediates(
            images(), norm=True, stop_early=True, indices=[0, 2]
        )
        assert torch.equal(features, expected)
        assert all(map(torch.equal, intermediates, expected_intermediates))


@pytest.mark.parametrize("host", ["plain", "deit3 layer scale", "drop path", "registers"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_through_the_chain_are_those_of_the_unpatched_model(host, checkpointed):
    model, twin = (each.train() for each in twins(host))
    twin.set_grad_checkpointing(checkpointed)
    for each in (model, twin):
        torch.manual_seed(3)
        each(images()).square().sum().backward()
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), name


def test_every_addition_is_computed_with_its_norm():
    found = calls(twins("plain", 3)[1])
    assert list(found) == ["patch_embed", *(f"blocks.{i}" for i in range(4))]
    for i in range(4):
        before = ["merge_add_norm"] if i else []  # the addition that waited since the block before
        after = ["restore"] if i == 3 else []
        names = [*before, "match", "attention", "merge_add_norm", *after]
        assert ops_of(call for call in found[f"blocks.{i}"] if call.backend) == [(op, "reference") for op in names]


def test_a_hook_on_a_block_sees_and_may_change_the_full_grid():
    model, twin = twins("plain")
    x = images()
    with torch.no_grad():
        before = model(x)
        for each in (model, twin):
            each.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
        assert torch.equal(twin(x), model(x))
        assert not torch.equal(model(x), before)
        for each in (model, twin):
            each.blocks[3].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        assert torch.equal(twin(x), model(x))


def test_a_hook_on_a_block_that_changes_nothing_changes_nothing():
    _, twin = twins("plain", 4)
    with torch.no_grad():
        expected, seen = twin(images()), []
        for block in twin.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape)))
        assert torch.equal(twin(images()), expected)
    assert seen == 4 * [((2, 37, 32), (2, 37, 32))]


@pytest.mark.parametrize(
    "part", ["blocks.2.norm1", "blocks.1.norm2", "norm", "blocks.0.ls1", "blocks.0.attn.proj_drop"]
)
def test_hooks_inside_a_block_are_called(part):
    model, twin = twins("deit3 layer scale")
    seen = []
    for each in (model, twin):
        each.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    with torch.no_grad():
        assert torch.equal(twin(images()), model(images()))
    assert torch.equal(*seen)
    reasons = [call.reason for part in calls(twin).values() for call in part if call.backend is None]
    assert any(f"{part.rpartition('.')[2]} has hooks" in str(reason) for reason in reasons) == (part[:6] == "blocks")


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_norm_that_is_not_plain_is_called_and_reported():
    model = make("plain")
    model.blocks[2].norm1.__class__ = OtherNorm
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = NOTHING
    with torch.no_grad():
        assert torch.equal(twin(images()), model(images()))
    found = calls(twin)
    assert recording.Call("merge_add_norm", None, "norm1 is a OtherNorm and no plain LayerNorm") in found["blocks.2"]
    kinds = [call[:2] for call in found["blocks.2"] if call.backend]
    assert kinds == [("attention", "reference"), ("merge_add_norm", "reference")]


def test_a_report_tells_what_was_left_out_and_joins_equal_blocks():
    _, model = twins("res-post-norm", [0, 3, 3])
    joined = report.ranges(report.parts(model, images()))
    assert [part.name for part in joined] == ["patch_embed", "blocks.0", "blocks.1-2", "blocks.3"]
    assert joined[1].calls == ()
    done = [call for call in joined[2].calls if call.backend]
    assert ops_of(done) == [("match", "reference"), ("attention", "reference"), ("merge", "reference")]
    assert {call.reason for call in done} == {"the tokens are not on a GPU"}
    with tome.use_backend("reference"):
        found = report.parts(model, images())[2].calls
        assert {call.reason for call in found if call.backend} == {"the reference was chosen"}


@pytest.mark.usefixtures("kernels")
@every_host
def test_blocks_that_merge_nothing_take_the_kernels_too(host):
    model, twin = (each.bfloat16() for each in twins(host, 0))
    x = images().bfloat16()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(twin(x), expected, rtol=5e-2, atol=5e-2)
        found = calls(twin, x)
        assert all("attention" in [call.op for call in found[f"blocks.{i}"]] for i in range(4))
        with tome.use_backend("reference"):
            assert torch.equal(twin(x), expected)
            assert calls(twin, x)["blocks.2"] == ()


JOINED = pytest.mark.parametrize("host", ["plain", "deit3 layer scale", "registers", "siglip map", "dinov2 registers"])


@pytest.mark.usefixtures("kernels")
@JOINED
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_and_positions_are_joined_in_one_step_with_the_first_norm(host, r, autocast):
    model, twin = twins(host, r)
    x = images()
    if not autocast:
        model, twin, x = model.bfloat16(), twin.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = (each._pos_embed(each.patch_embed(x)) for each in (model, twin))
        assert isinstance(found, tome.Tokens)
        assert found.x.dtype == expected.dtype
        assert torch.equal(found.x, expected)
        added, normed = found.waiting.add(found.unadded, Norm(twin.blocks[0].norm1.weight, None, 1e-6))
        assert torch.equal(added, expected)
        assert torch.equal(normed, F.layer_norm(expected, (32,), twin.blocks[0].norm1.weight, None, 1e-6))
        assert calls(twin, x)["blocks.0"][0].op == "merge_add_norm"


@pytest.mark.usefixtures("kernels")
def test_tokens_and_positions_are_joined_by_the_host_where_anyone_would_notice():
    def joined(model, x=None):
        x = images().bfloat16() if x is None else x
        return type(model._pos_embed(model.patch_embed(x)))

    class Own(VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x) * 2

    _, twin = twins("plain", 3)
    with torch.no_grad():
        assert joined(twin, images()) is torch.Tensor  # float32: nothing to gain
        twin = twin.bfloat16()
        assert joined(twin) is tome.Tokens
        for module in (twin.pos_drop, twin.norm_pre, twin.patch_drop, twin.blocks, twin.blocks[0]):
            handle = module.register_forward_pre_hook(lambda module, args: None)
            assert joined(twin) is torch.Tensor
            handle.remove()
        assert joined(twin) is tome.Tokens
        with tome.use_backend("reference"):
            assert joined(twin) is torch.Tensor
        own = Own(**SMALL).bfloat16().eval()
        expected = own._pos_embed(own.patch_embed(images().bfloat16()))
        tome.patch.timm(own).r = 3
        assert torch.equal(own._pos_embed(own.patch_embed(images().bfloat16())), expected)
    assert joined(twin) is torch.Tensor  # gradients


@pytest.mark.usefixtures("kernels")
@every_host
def test_a_model_that_is_not_to_use_the_kernels_is_the_hosts_own(host, monkeypatch):
    monkeypatch.setattr(ends, "pays", lambda x: backend.get_backend() != "reference")
    model = make(host).bfloat16()
    twin = tome.patch.timm(copy.deepcopy(model), use_cuda_ext=False)
    x = images().bfloat16()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        assert ops_of(calls(twin, x)["patch_embed"]) == [("convolution", "torch")]
    again = tome.patch.timm(twin)
    assert ops_of(calls(again, x)["patch_embed"]) == [("matrix product", "torch")]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_EXTENSION)])
def test_reentrant_checkpoints_get_tensors_as_long_as_nothing_merges(device):
    model, twin = (each.bfloat16().train().to(device) for each in twins("plain", 0))
    for each in (model, twin):
        x = each._pos_embed(each.patch_embed(images().bfloat16().to(device)))
        for block in each.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        each.forward_head(each.norm(x)).sum().backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.usefixtures("kernels")
def test_a_mask_reaches_the_host_as_long_as_nothing_merges():
    model, twin = (each.bfloat16() for each in twins("plain", 0))
    x, mask = images().bfloat16(), torch.zeros(1, 1, 37, 37, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(twin.forward_features(x, attn_mask=mask), model.forward_features(x, attn_mask=mask))
        twin.r = 3
        with pytest.raises(tome.UnsupportedModelError, match="attn_mask"):
            twin.forward_features(x, attn_mask=mask)


@pytest.mark.usefixtures("kernels")
def test_where_more_is_wanted_a_block_that_merges_nothing_is_the_hosts_own():
    model, twin = (each.bfloat16() for each in twins("plain", 0))
    x = images().bfloat16()
    assert torch.equal(twin(x), model(x))  # gradients
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin.float()(x.float()), model.float()(x.float()))
        model, twin = model.bfloat16(), twin.bfloat16()
        embedded = model._pos_embed(model.patch_embed(x))
        mask = torch.zeros(1, 1, 37, 37, dtype=torch.bfloat16)
        assert torch.equal(twin.blocks[0](embedded, attn_mask=mask), model.blocks[0](embedded, attn_mask=mask))
        seen = []
        for block in twin.blocks:
            block.register_forward_hook(lambda block, args, out: seen.append((args[0], out)))
        assert torch.equal(twin(x), expected)
        assert all(type(value) is torch.Tensor for pair in seen for value in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 14), (4, 7), (8, 3), (1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_patches_are_those_of_unfold(dtype, height, width, layout):
    x = torch.randn(2, 3, 3 * height, 2 * width + (layout == "sliced")).to(dtype)
    x = x[..., 1:] if layout == "sliced" else x
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    expected = F.unfold(x.double(), (height, width), stride=(height, width)).transpose(1, 2).to(dtype)
    assert torch.equal(ends.patches(x, (height, width)), expected)


@pytest.mark.parametrize("layout", ["contiguous", "frames first"])
def test_patches_of_a_video(layout):
    x = torch.randn(2, 4, 3, 6, 16) if layout == "contiguous" else torch.randn(2, 3, 4, 6, 16).transpose(1, 2)
    conv = nn.Conv3d(4, 5, (1, 3, 8), (1, 3, 8))
    expected = conv(x).flatten(2).transpose(1, 2)
    found = F.linear(ends.patches(x, (1, 3, 8)), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def products(monkeypatch):
    """Let the CPU do what is done on a GPU."""
    monkeypatch.setattr(ends, "pays", lambda x: True)


@pytest.mark.usefixtures("products")
@every_host
def test_the_embedding_as_a_matrix_product_is_the_convolution(host):
    model, twin = (each.double() for each in twins(host))
    x = images().double()
    with torch.no_grad():
        assert ops_of(calls(twin, x)["patch_embed"]) == [("matrix product", "torch")]
        torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
    twin(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(twin.patch_embed.proj.weight.grad, model.patch_embed.proj.weight.grad)
    twin.zero_grad()
    leaf = x.clone().requires_grad_()
    twin(leaf).sum().backward()
    assert leaf.grad is not None
    assert type(tome.unpatch(twin).patch_embed.proj) is nn.Conv2d


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("host", ["plain", "registers", "siglip map"])
def test_the_embedding_under_autocast(host):
    model, twin = twins(host)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for embedded in (lambda m: m.patch_embed(images()), lambda m: m._pos_embed(m.patch_embed(images()))):
            ours, theirs = embedded(twin), embedded(model)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("products")
def test_images_that_patches_do_not_tile_are_left_to_the_convolution():
    model, twin = (each.patch_embed.proj for each in twins("plain"))
    x = images(size=50)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_only_convolutions_over_whole_patches_are_products():
    for conv, expected in (
        (nn.Conv2d(3, 8, 16, 16), True),
        (nn.Conv2d(3, 8, (4, 8), (4, 8)), True),
        (nn.Conv2d(3, 8, 16, 16, padding="valid"), True),
        (nn.Conv2d(3, 8, 1, padding="same"), False),
        (nn.Conv3d(3, 8, (2, 16, 16), (2, 16, 16)), True),
        (nn.Conv3d(3, 8, (2, 16, 16), (1, 16, 16)), False),
        (nn.Conv1d(3, 8, 4, 4), False),
        (nn.Conv2d(3, 8, 16, 8), False),
        (nn.Conv2d(3, 8, 16, 16, padding=1), False),
        (nn.Conv2d(4, 8, 16, 16, groups=2), False),
        (nn.Conv2d(3, 8, 16, 16, dilation=2), False),
        (nn.Linear(3, 8), False),
        (None, False),
    ):
        assert ends.is_patch_conv(conv) == expected
