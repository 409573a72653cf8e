"""Patched timm models: nothing skipped, nothing changed at r = 0, the planned tokens at r > 0."""

import copy

import pytest
import timm
import torch
from models import HOSTS, images, make
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

import tome
from tome import UnsupportedModelError, schedule
from tome.patch import Tokens, cost

SCHEDULES = [3, (3, -1.0), [5, 0, 2], 0.2, 100]
every_host = pytest.mark.parametrize("host", HOSTS)
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def reference_backend():
    with tome.use_backend("reference"), torch.no_grad():
        yield


@every_host
def test_r_0_is_the_unpatched_model_bit_for_bit(host):
    model = make(host)
    expected = model(images()), model.forward_features(images())
    assert tome.patch.timm(model) is model
    assert torch.equal(model(images()), expected[0])
    assert torch.equal(model.forward_features(images()), expected[1])
    assert torch.equal(model.forward_head(model.forward_features(images())), expected[0])


@every_host
def test_the_merging_path_without_a_merge_is_the_unpatched_block_bit_for_bit(host):
    """What runs for r > 0 leaves nothing of the block out: LayerScale, norms, drop path, gates."""
    model = make(host).train(host == "drop path")
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    twin = tome.patch.timm(copy.deepcopy(model))
    for block, patched in zip(model.blocks, twin.blocks, strict=True):
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        state = patched.merging_forward(Tokens(x))
        assert torch.equal(state.x, expected)
        assert state.size is None
        x = expected


@every_host
@pytest.mark.parametrize("r", SCHEDULES, ids=str)
def test_r_gives_the_planned_tokens(host, r):
    model = tome.patch.timm(make(host))
    model.r = r
    assert model.r == r
    n, _ = cost.cost(model)
    plan = schedule.plan(r, 4, n, model.num_prefix_tokens)
    counts = [x.shape[1] + model.num_prefix_tokens for x in intermediate_tokens(model)]
    assert counts == list(plan.tokens[1:])
    features = model.forward_features(images())
    assert features.shape == (2, plan.tokens[-1], 32)
    assert model(images()).shape == (2, 7)
    assert model(images()).isfinite().all()
    assert torch.equal(model(images()), model(images()))


def intermediate_tokens(model):
    return model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True, restore=False)


@every_host
def test_merging_identical_patches_changes_nothing(host):
    """Where all patches are equal, proportional attention and weighted pooling make merging exact."""
    model = make(host)
    model.pos_embed.zero_()
    flat = torch.full((2, 3, 48, 48), 0.7)
    expected = model(flat)
    tome.patch.timm(model).r = (6, -1.0)
    torch.testing.assert_close(model(flat), expected, **CLOSE)
    tome.patch.timm(model, prop_attn=False).r = (6, -1.0)
    if model.num_prefix_tokens:
        assert (model(flat) - expected).abs().max() > 1e-4, "without sizes in attention the result must differ"


@every_host
def test_pooling_of_merged_tokens_is_pooling_of_restored_ones(host):
    model = tome.patch.timm(make(host))
    model.r = (5, -1.0)
    logits = model(images())
    restored = model.forward_features(images(), restore=True)
    assert restored.shape[1] == cost.cost(model)[0]
    torch.testing.assert_close(model.forward_head(restored), logits, **CLOSE)
    torch.testing.assert_close(model.forward_head(model.forward_features(images())), logits, **CLOSE)
    base = tome.unpatch(copy.deepcopy(model))
    torch.testing.assert_close(base.forward_head(restored), logits, **CLOSE)


@every_host
def test_unpatch_leaves_nothing_behind(host):
    model = make(host)
    before = snapshot(model)
    expected = model(images())
    tome.patch.timm(model, trace_source=True).r = 4
    model(images())
    assert tome.unpatch(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(images()), expected)


def snapshot(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def test_trace_follows_every_token():
    model = tome.patch.timm(make("plain"))
    model.r = [9, 9, 4]
    state = model.forward_tokens(images(), trace=True)
    assert model.forward_tokens(images()).slot is None
    for slot, size in zip(state.slot, state.size, strict=True):
        assert torch.equal(slot.bincount().float(), size)
    # The same, layer by layer, from the features that each block leaves.
    per_layer = model.forward_intermediates(images(), indices=3, output_fmt="NLC", intermediates_only=True)
    merged = intermediate_tokens(model)[-1]
    torch.testing.assert_close(per_layer[-1], tome.unmerge(merged, state.slot[:, 1:] - 1))


def test_forward_intermediates_keeps_the_grid():
    base = make("dinov2 registers")
    model = tome.patch.timm(copy.deepcopy(base))
    options = {"indices": [1, 3], "return_prefix_tokens": True, "norm": True}
    expected, taken = base.forward_intermediates(images(), **options)
    assert shapes(model.forward_intermediates(images(), **options)) == shapes((expected, taken))
    for got, want in zip(model.forward_intermediates(images(), **options)[1], taken, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    model.r = 4
    assert shapes(model.forward_intermediates(images(), **options)) == shapes((expected, taken))
    for extra in ({"output_dict": True}, {"intermediates_only": True}, {"stop_early": True, "output_fmt": "NLC"}):
        assert shapes(model.forward_intermediates(images(), **options, **extra)) == shapes(
            base.forward_intermediates(images(), **options, **extra)
        )
    assert shapes(model.get_intermediate_layers(images(), 2, reshape=True)) == shapes(
        base.get_intermediate_layers(images(), 2, reshape=True)
    )
    with pytest.raises(ValueError, match="merged tokens have no grid"):
        model.forward_intermediates(images(), restore=False)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(v) for key, v in value.items()}
    return [shapes(v) for v in value]


def test_features_only():
    model = make("plain", features_only=True)
    expected = model(images())
    tome.patch.timm(model)
    assert all(torch.equal(a, b) for a, b in zip(model(images()), expected, strict=True))
    model.r = 6
    assert model.model.r == model.r == 6
    assert shapes(model(images())) == shapes(expected)
    assert not torch.equal(model(images())[-1], expected[-1])
    with pytest.raises(ValueError, match="must not be negative"):
        model.r = -1
    tome.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(model(images()), expected, strict=True))


def test_other_image_sizes():
    model = tome.patch.timm(make("dynamic size"))
    model.r = 4
    assert model.forward_features(images(size=80)).shape[1] == 101 - 16
    assert model.forward_intermediates(images(size=80))[1][-1].shape == (2, 32, 10, 10)
    fixed = tome.patch.timm(make("plain"))
    fixed.set_input_size((64, 64))
    fixed.r = 4
    assert fixed.forward_features(images(size=64)).shape[1] == 65 - 16


def test_reset_classifier_and_pooling():
    model = tome.patch.timm(make("plain"))
    model.r = 4
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)
    restored = model.forward_features(images(), restore=True)
    torch.testing.assert_close(model(images()), model.forward_head(restored), **CLOSE)


def test_pooling_asks_for_sizes_it_cannot_know():
    model = tome.patch.timm(make("mae avg"))
    model.r = 4
    features = model.forward_features(images())
    with pytest.raises(ValueError, match="'avg' pooling of merged tokens needs their sizes"):
        model.forward_head(features.clone())
    sizes = model.forward_tokens(images()).size
    torch.testing.assert_close(model.forward_head(features.clone(), size=sizes), model(images()))


def test_pruned_models_keep_working():
    model = tome.patch.timm(make("plain"))
    model.r = 4
    model.prune_intermediate_layers([0, 1], prune_head=True)
    assert model.forward_features(images()).shape[1] == 37 - 8
    model.r = [4, 2]
    assert model.forward_features(images()).shape[1] == 37 - 6


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "r must not be negative, got -1"),
        (True, TypeError, "r must be an int, got True"),
        ([1, 2, 3, 4, 5], ValueError, "r has 5 entries for a model of 4 layers"),
        ([1, 2.5], TypeError, r"r\[1\] must be an int, got 2.5"),
        ((8, 1.5), ValueError, r"inflection must be in \[-1, 1\], got 1.5"),
        (1.5, ValueError, r"r as a ratio must be in \(0, 1\), got 1.5"),
        ("8", TypeError, "r must be an int, .*, got '8'"),
    ],
)
def test_a_wrong_schedule_is_refused_when_set_and_changes_nothing(r, error, message):
    model = tome.patch.timm(make("plain"))
    model.r = 4
    with pytest.raises(error, match=message):
        model.r = r
    assert model.r == 4
    assert model.forward_features(images()).shape[1] == 37 - 16


class Subclass(VisionTransformer):
    pass


def unknown_attention():
    model = make("plain")
    model.blocks[2].attn = torch.nn.MultiheadAttention(32, 2)
    return model


def unknown_part():
    model = make("plain")
    model.blocks[1].adapter = torch.nn.Linear(32, 32)
    return model


SMALLEST = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is not supported"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1), "Eva is not supported"),
        (lambda: timm.create_model("beit_base_patch16_224", **SMALLEST), "Beit is not supported"),
        (lambda: Subclass(**SMALLEST), "Subclass is not supported"),
        (lambda: torch.nn.DataParallel(make("plain")), "Patch before torch.compile, DataParallel"),
        (lambda: torch.compile(make("plain")), "Patch before torch.compile"),
        (lambda: VisionTransformer(**SMALLEST, block_fn=ParallelScalingBlock), "blocks.0: ParallelScalingBlock"),
        (unknown_attention, "blocks.2.attn: MultiheadAttention is not supported"),
        (unknown_part, r"blocks.1: Block has parts that are not understood: \['adapter'\]"),
    ],
)
def test_what_is_not_understood_is_refused_and_left_alone(build, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        tome.patch.timm(model)
    assert snapshot(model) == before


def test_masks_are_refused():
    model = tome.patch.timm(make("plain"))
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UnsupportedModelError, match="takes no attn_mask"):
            call(images(), attn_mask=torch.zeros(37, 37))


def test_use_cuda_ext_chooses_the_backend():
    model = tome.patch.timm(make("plain"), use_cuda_ext=False)
    model.r = 4
    with tome.use_backend("cuda"):
        model(images())
    if tome.backend.extension_problem() is not None:
        model = tome.patch.timm(make("plain"), use_cuda_ext=True)
        model.r = 4
        with pytest.raises(tome.BackendError, match="the CUDA backend cannot run"):
            model(images())


def test_unfused_attention_gives_the_same_result():
    model = tome.patch.timm(make("plain"))
    model.r = 4
    expected = model(images())
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images()), expected, **CLOSE)
