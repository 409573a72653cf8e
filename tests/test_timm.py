"""Patched timm models: nothing skipped, nothing changed at r = 0, the planned tokens at r > 0."""

import copy

import pytest
import timm
import torch
from models import HOSTS, images, make
from timm.models.vision_transformer import Block, VisionTransformer

import tome
from tome import Tokens, UnsupportedModelError, cost, schedule

SCHEDULES = [3, (3, -1.0), [5, 0, 2], 0.2, 100]
every_host = pytest.mark.parametrize("host", HOSTS)
CLOSE = {"rtol": 0, "atol": 2e-5}


pytestmark = pytest.mark.usefixtures("reference_without_gradients")


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
        tokens = patched(Tokens(x))
        assert torch.equal(tokens[:], expected)
        if patched is not twin.blocks[-1]:
            assert isinstance(tokens, Tokens)
            assert tokens.size is None
        x = expected


def counts(model, x=None):
    """How many tokens each block leaves."""
    left = []
    hooks = [block.register_forward_hook(lambda module, args, out: left.append(out)) for block in model.blocks[:-1]]
    last = tome.merged(model, images() if x is None else x)
    for hook in hooks:
        hook.remove()
    return [out.count() if isinstance(out, Tokens) else out.shape[1] for out in left] + [last.count()]


@every_host
@pytest.mark.parametrize("r", SCHEDULES, ids=str)
@pytest.mark.filterwarnings("ignore:r = 100:UserWarning")
def test_r_gives_the_planned_tokens_and_the_full_grid(host, r):
    model = tome.patch.timm(make(host))
    grid = model.forward_features(images()).shape
    model.r = r
    assert model.r == r
    n = cost.tokens(model)
    plan = schedule.plan(r, 4, n, model.num_prefix_tokens)
    assert counts(model) == list(plan.tokens[1:])
    assert model.forward_features(images()).shape == grid
    assert model(images()).shape == (2, 7)
    assert model(images()).isfinite().all()
    assert torch.equal(model(images()), model(images()))


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
def test_the_grid_is_that_of_the_merged_tokens(host):
    """Every pooling and head of timm reads what it reads unpatched: each token's place in the merged tokens."""
    model = tome.patch.timm(make(host))
    model.r = (5, -1.0)
    merged = tome.merged(model, images())
    restored = tome.unmerge(merged.x, merged.slot)
    base = tome.unpatch(copy.deepcopy(model))
    torch.testing.assert_close(model.forward_features(images()), base.norm(restored), **CLOSE)
    torch.testing.assert_close(model(images()), base.forward_head(base.norm(restored)), **CLOSE)
    mean = (merged.x * merged.size[:, :, None]).sum(1) / merged.size.sum(1, keepdim=True)
    torch.testing.assert_close(restored.mean(1), mean, **CLOSE)


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


def test_merged_tokens_say_where_every_token_went():
    model = tome.patch.timm(make("plain"))
    model.r = [9, 9, 4]
    merged = tome.merged(model, images())
    assert merged.x.shape == (2, 37 - 22, 32)
    for slot, size in zip(merged.slot, merged.size, strict=True):
        assert torch.equal(slot.bincount().float(), size)
    model.r = 0
    merged = tome.merged(model, images())
    assert torch.equal(merged.size, torch.ones(2, 37))
    assert torch.equal(merged.slot[1], torch.arange(37, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match="VisionTransformer runs no patched block"):
        tome.merged(make("plain"), images())


def test_a_model_without_pooling_returns_the_grid():
    model = tome.patch.timm(make("plain", num_classes=0, global_pool=""))
    model.r = 4
    assert model(images()).shape == (2, 37, 32)
    assert tome.merged(model, images()).x.shape == (2, 21, 32)


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
    for host in ("plain", "siglip map"):  # with and without tokens that are no patches
        model = tome.patch.timm(make(host))
        model.r = 4
        for option in (
            {"norm": True},
            {"output_fmt": "NLC"},
            {"output_fmt": "NLC", "indices": [0, 1], "stop_early": True},
        ):
            final, taken = model.forward_intermediates(images(), **option)
            assert all(type(each) is torch.Tensor for each in (final, *taken))


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
    assert tome.merged(model, images(size=80)).count() == 101 - 16
    assert model.forward_intermediates(images(size=80))[1][-1].shape == (2, 32, 10, 10)
    fixed = tome.patch.timm(make("plain"))
    fixed.set_input_size((64, 64))
    fixed.r = 4
    assert tome.merged(fixed, images(size=64)).count() == 65 - 16


def test_reset_classifier_and_pooling():
    model = tome.patch.timm(make("plain"))
    model.r = 4
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)
    assert torch.equal(model(images()), model.forward_head(model.forward_features(images())))


def test_pruned_models_keep_working():
    model = tome.patch.timm(make("plain"))
    model.r = (4, -1.0)
    model.prune_intermediate_layers([0, 1], prune_head=True)
    assert model.r == (4, -1.0)
    assert model._tome_info["r"] == list(schedule.plan((4, -1.0), 2, 37).r)
    assert counts(model) == [37 - 8, 37 - 8]
    model.r = [4, 2]
    assert counts(model) == [37 - 4, 37 - 6]
    model.prune_intermediate_layers([0])
    assert model.r == [4]
    assert model.forward_features(images()).shape[1] == 37


def test_a_new_patch_size_keeps_the_embedding_fast():
    model = tome.patch.timm(make("plain"))
    model.set_input_size(img_size=64, patch_size=16)
    assert type(model.patch_embed.proj).__name__ == "PatchConv2d"
    assert model(images(size=64)).shape == (2, 7)


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
    assert counts(model)[-1] == 37 - 16


def unknown_attention():
    model = make("plain")
    model.blocks[2].attn = torch.nn.MultiheadAttention(32, 2)
    return model


def unknown_part():
    model = make("plain")
    model.blocks[1].adapter = torch.nn.Linear(32, 32)
    return model


class Unknown(Block):
    """What a user may make of timm's block, with another forward."""


def unknown_block():
    return VisionTransformer(**SMALLEST, block_fn=Unknown)


SMALLEST = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is not supported"),
        (lambda: timm.create_model("crossvit_tiny_240"), "CrossVit is not supported: it has several sequences"),
        (lambda: torch.nn.DataParallel(make("plain")), "Patch before torch.compile, DataParallel"),
        (lambda: torch.compile(make("plain")), "Patch before torch.compile"),
        (unknown_block, "blocks.0: Unknown is not supported"),
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


def test_masks_are_refused_where_tokens_merge():
    model = tome.patch.timm(make("plain"))
    mask = torch.zeros(37, 37)
    expected = model(images(), attn_mask=mask)
    assert torch.equal(expected, tome.unpatch(copy.deepcopy(model))(images(), attn_mask=mask))
    model.r = 4
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UnsupportedModelError, match=r"blocks.0: a patched block takes no attn_mask"):
            call(images(), attn_mask=mask)


class Averages(VisionTransformer):
    """What users write: a loop of their own over the blocks, and a pooling of their own."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:].mean(dim=1))

    def forward_head(self, x, pre_logits=False):
        return self.head(x)


def test_subclasses_and_loops_over_blocks_get_the_full_grid():
    model = Averages(**SMALLEST | {"depth": 3, "num_classes": 5, "global_pool": "avg"}).eval()
    x = images(size=32)
    expected = model(x)
    tome.patch.timm(model)
    assert torch.equal(model(x), expected)
    model.r = 1
    merged = tome.merged(model, x)
    restored = tome.unmerge(merged.x, merged.slot)
    torch.testing.assert_close(model(x), model.head(model.fc_norm(restored[:, 1:].mean(1))))
    assert type(model) is not Averages
    assert type(tome.unpatch(model)) is Averages


def test_a_block_takes_a_tensor_and_passes_tokens_that_are_the_full_grid_to_others():
    model = tome.patch.timm(make("plain"))
    x = model._pos_embed(model.patch_embed(images()))
    assert type(model.blocks[0](x)) is torch.Tensor
    model.r = 6
    tokens = model.blocks[0](x)
    grid = tome.unmerge(tokens.x, tokens.slot)
    assert tokens.x.shape == (2, 31, 32)
    assert tokens.shape == grid.shape == x.shape
    assert torch.equal(tokens[:, 1:], grid[:, 1:])
    assert torch.equal(tokens * 2 + 1, grid * 2 + 1)
    assert torch.equal(torch.cat([tokens, tokens]), torch.cat([grid, grid]))
    assert torch.equal(model.norm(tokens), model.norm(grid))
    assert tokens.to(torch.float64).x.dtype == torch.float64
    assert tokens.to(torch.float64).size.dtype == torch.float32
    assert type(model.blocks[3](tokens)) is torch.Tensor  # the last block restores
    assert torch.equal(model.blocks[1](grid)[:], model.blocks[1](grid)[:])  # a grid in the middle starts anew


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
