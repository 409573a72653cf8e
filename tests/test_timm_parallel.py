"""timm's ViTs with other blocks, and CaiT: each is what its own modules compute of merged tokens."""

import copy
import inspect
from functools import partial

import laws
import pytest
import timm
import torch
from backends import NO_EXTENSION
from laws import CLOSE, make
from models import SMALL, WIDE, images
from stand_in import Halves
from timm.models import vision_transformer as vit
from timm.models.cait import Cait
from torch import nn

import tome
import tome_reference
from tome import UnsupportedModelError, ops

SCALED = {"init_values": 0.3}
FUSED = partial(vit.ParallelScalingBlock, fuse_out_proj=True)
DIFF, DIFF_PARALLEL = "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"
# name -> (timm model, arguments, protected tokens)
HOSTS = {
    "parallel": ("vit_base_patch16_xp_224", SCALED, 1),
    "parallel biased": ("vit_pwee_patch16_reg1_gap_256", SCALED | {"qkv_bias": True}, 1),
    "parallel fused": ("vit_pwee_patch16_reg1_gap_256", {"block_fn": FUSED}, 1),
    "diff": (DIFF, SCALED, 1),
    "diff res-post-norm": (DIFF, {"block_fn": vit.ResPostBlock, "qk_norm": True}, 1),
    "diff parallel": (DIFF_PARALLEL, SCALED, 1),
    "diff parallel dual": (DIFF_PARALLEL, {"qkv_bias": True, "init_values": None}, 1),
    "things": ("vit_base_patch16_18x2_224", SCALED, 1),
    "cait": ("cait_xxs24_224", SCALED, 0),
}
every_host = pytest.mark.parametrize("host", HOSTS)


pytestmark = pytest.mark.usefixtures("reference_without_gradients")


def made(host, **kwargs):
    name, extra, _ = HOSTS[host]
    if extra.get("block_fn") is FUSED and "fuse_out_proj" not in inspect.signature(FUSED.func).parameters:
        pytest.skip(f"timm {timm.__version__} has no ParallelScalingBlock with one layer behind")
    model = make(name, **{**extra, **kwargs})
    if getattr(model.blocks[0], "qkv_bias", None) is not None:
        pytest.skip(f"timm {timm.__version__} adds a ParallelScalingBlock's biases to other channels")
    return model


@every_host
def test_nothing_changes_where_nothing_merges(host):
    laws.keeps_the_model_where_nothing_merges(made(host))


@every_host
@pytest.mark.parametrize("rate", ["attn_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_training_drops_what_the_model_drops(host, rate):
    laws.drops_as_the_model(made(host, **{rate: 0.4}))


@every_host
def test_the_planned_tokens(host):
    laws.merges_as_planned(tome.patch.timm(made(host)), HOSTS[host][2])


def unmerged(x, size):
    """Every token as often as it stands for others: [1, N, C] of an image's M tokens."""
    return x[0].repeat_interleave(size[0].long(), dim=0)[None]


def firsts(size):
    """Where the copies of each token begin."""
    return size[0].long().cumsum(0) - size[0].long()


def heads_of(y, count):
    return y.unflatten(2, (count, -1)).transpose(1, 2)


def by_hand(model, r, prefix, image):
    """The last block's tokens on the full grid, of one image.

    Attention is the host's own, over each token as often as it stands for others: no log sizes.
    """
    x = model.patch_embed(image)
    x = x + model.pos_embed if isinstance(model, Cait) else model.norm_pre(model._pos_embed(x))
    size, steps = torch.ones(x.shape[:2]), []
    for block in model.blocks:
        kind, whole, copies = type(block).__name__, unmerged(x, size), firsts(size)
        if "ParallelScaling" in kind:
            projected = block.in_proj(block.in_norm(x))[:, :, block.in_split[0] :]
            keys = [block.k_norm(heads_of(projected.chunk(3, dim=2)[1], 4 if "Diff" in kind else 2))]
            value = (block(whole) - whole)[:, copies]
        elif kind == "ParallelThingsBlock":
            keys = [heads_of(branch.attn.qkv(branch.norm(x)).chunk(3, dim=2)[1], 2) for branch in block.attns]
            value = sum(branch(whole) for branch in block.attns)[:, copies]
        else:
            y, big = (x, whole) if kind == "ResPostBlock" else (block.norm1(x), block.norm1(whole))
            keys = [heads_of(block.attn.qkv(y).chunk(3, dim=2)[1], 2 if kind == "LayerScaleBlock" else 4)]
            keys = [getattr(block.attn, "k_norm", nn.Identity())(keys[0])]
            value = block.attn(big)[:, copies]
            value = block.norm1(value) if kind == "ResPostBlock" else scaled(block, 1, value)
        x = x + value
        metric = torch.stack([key.mean(dim=1) for key in keys]).mean(dim=0)
        slot = tome_reference.match(metric, r, prefix)
        x, size = tome_reference.merge(x, slot, x.shape[1] - r, size)
        steps.append(slot)
        if kind == "ParallelThingsBlock":
            x = x + sum(branch(x) for branch in block.ffns)
        elif kind == "ResPostBlock":
            x = x + block.norm2(block.mlp(x))
        elif "ParallelScaling" not in kind:
            x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    return tome_reference.restore(x, None, steps)


def scaled(block, i, value):
    return getattr(block, f"ls{i}")(value) if hasattr(block, f"ls{i}") else getattr(block, f"gamma_{i}") * value


@every_host
def test_merging_is_what_the_hosts_own_modules_compute(host):
    model = made(host)
    expected = torch.cat([by_hand(model, 5, HOSTS[host][2], image[None]) for image in images()])
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = 5
    seen = []
    twin.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    logits = twin(images())
    torch.testing.assert_close(seen[0], expected, **CLOSE)
    model.blocks[-1].register_forward_hook(lambda module, args, out: expected)
    torch.testing.assert_close(logits, model(images()), **CLOSE)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    torch.testing.assert_close(twin(images()), logits, **CLOSE)


@every_host
def test_equal_patches_merge_exactly(host):
    model = made(host)
    model.pos_embed.zero_()
    flat = torch.full((2, 3, 48, 48), 0.7)
    expected = model(flat)
    tome.patch.timm(model).r = 9
    torch.testing.assert_close(model(flat), expected, **CLOSE)
    tome.patch.timm(model, prop_attn=False).r = 9
    if HOSTS[host][2] or host == "cait":
        assert (model(flat) - expected).abs().max() > 1e-4, "without sizes in attention the result must differ"


@every_host
def test_copies(host):
    laws.survives_copies(made(host))


@every_host
def test_training_and_checkpoints(host):
    laws.trains(made(host))


@pytest.mark.parametrize("host", ["parallel", "diff", "things", "cait"])
def test_compiles_in_one_graph(host):
    laws.compiles(made(host))


PARTS = {
    "parallel": {
        "in_norm": 1,
        "in_proj": 1,
        "attn_out_proj": 1,
        "mlp_out_proj": 1,
        "ls": 1,
        "mlp_act": 1,
        "mlp_drop": 1,
    },
    "parallel fused": {"out_proj": 1, "drop_path": 1, "k_norm": 1},
    "diff": {"attn": 1, "attn.qkv": 1, "attn.sub_norm": 1, "attn.proj": 1, "mlp": 1, "ls1": 1},
    "diff parallel": {"sub_norm": 1, "out_proj": 1, "q_norm": 1},
    "things": {"attns.0.attn": 1, "attns.1.attn.qkv": 1, "attns.0.ls": 1, "ffns.1": 1, "ffns.0.mlp.fc1": 1},
    "cait": {"attn.proj_l": 1, "attn.proj_w": 1, "attn.attn_drop": 1, "attn.qkv": 1, "drop_path": 2, "mlp.fc2": 1},
}


@pytest.mark.parametrize("host", PARTS)
def test_watched_parts_are_called(host):
    laws.calls_what_is_watched(made(host), PARTS[host])


@pytest.mark.parametrize("host", ["diff", "things"])
def test_unfused_dropout_that_is_watched_is_called(host):
    model = tome.patch.timm(made(host))
    model.r = 5
    expected, seen = model(images()), []
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    assert sorted(set(seen), reverse=True) == [37, 32, 27]


def watched(host, path, unfused=False):
    model = made(host)
    model.blocks[1].get_submodule(path).register_forward_hook(lambda *_: None)
    model.blocks[1].fused_attn = not unfused
    return model


@pytest.mark.parametrize(
    ("host", "path", "reason"),
    [
        ("parallel", "attn_drop", r"blocks\.1: attn_drop has hooks"),
        ("things", "attns.1", r"blocks\.1: attns\.1 has hooks"),
        ("cait", "attn", r"a TalkingHeadAttn has hooks"),
    ],
)
def test_what_cannot_be_watched_is_refused_by_name(host, path, reason):
    model = tome.patch.timm(watched(host, path, unfused=True))
    model(images())
    model.r = 5
    with pytest.raises(UnsupportedModelError, match=reason):
        model(images())


def change(host, path, part):
    model = made(host)
    parent, _, name = path.rpartition(".")
    setattr(model.blocks[1].get_submodule(parent), name, part)
    return model


@pytest.mark.parametrize(
    ("host", "path", "reason"),
    [
        ("parallel", "adapter", r"blocks\.1: ParallelScalingBlock has parts that are not understood: \['adapter'\]"),
        ("things", "attns.1.attn", r"blocks\.1\.attns\.1\.attn: Linear is not supported"),
        ("things", "attns.0.attn.lora", r"blocks\.1\.attns\.0\.attn: Attention has parts"),
        ("cait", "attn", r"blocks\.1\.attn: Linear is not supported"),
        ("cait", "attn.norm", r"blocks\.1\.attn: TalkingHeadAttn has parts"),
        ("diff", "attn.gate", r"blocks\.1\.attn: DiffAttention has parts"),
    ],
)
def test_what_is_not_understood_is_named(host, path, reason):
    model = change(host, path, nn.Linear(32, 32))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=reason):
        tome.patch.timm(model)
    assert [type(module) for module in model.modules()] == kinds


def test_masks_are_refused_where_tokens_merge():
    model = tome.patch.timm(made("things"))
    model.r = 4
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0: a patched block takes no attn_mask"):
        model(images(), attn_mask=torch.zeros(37, 37))


def test_blocks_of_several_kinds_in_one_model():
    model = made("things")
    model.blocks[1] = vit.Block(32, 2).eval()
    tome.patch.timm(model).r = 4
    assert tome.merged(model, images()).count() == 37 - 12


def test_a_cait_whose_head_was_pruned():
    model = tome.patch.timm(made("cait"))
    model.r = 4
    assert model._tome_info["class_token"] is False
    assert model.forward_intermediates(images())[1][0].shape == (2, 32, 6, 6)
    model.prune_intermediate_layers([1], prune_head=True)
    assert tome.merged(model, images()).count() == 36 - 8
    assert model.forward_features(images())[:, -36:].shape == (2, 36, 32)


@every_host
def test_the_mlp_is_one_call_where_its_parts_are_known(host, monkeypatch):
    model = tome.patch.timm(made(host))
    model.r = 4
    by_parts = model(images())
    halves = Halves()
    monkeypatch.setattr(ops, "one_call", halves.one_call)
    torch.testing.assert_close(model(images()), by_parts, **CLOSE)
    assert halves.counts() == (0, 3 if host in ("diff", "cait") else 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not supported: its attention looks at windows"),
        ("pit_ti_224", "PoolingVisionTransformer is not supported: its tokens are pooled between stages"),
        ("xcit_nano_12_p16_224", "Xcit is not supported: its attention is over channels"),
        ("crossvit_tiny_240", "CrossVit is not supported: it has several sequences"),
        ("resnet18", "ResNet is not supported: it is convolutional"),
    ],
)
def test_models_without_a_sequence_of_tokens_are_refused_with_the_reason(name, reason):
    model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        tome.patch.auto(model)


@NO_EXTENSION
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # a hint on speed, of torch 2.11
@every_host
def test_on_a_gpu_both_backends_give_the_same_logits(host):
    laws.agrees_on_a_gpu(made(host, **WIDE))


def test_biases_that_an_older_timm_adds_to_other_channels_are_refused():
    model = vit.VisionTransformer(**SMALL, block_fn=vit.ParallelScalingBlock, qkv_bias=False).eval()
    for block in model.blocks:
        block.qkv_bias = torch.zeros(96)
    with pytest.raises(UnsupportedModelError, match="ParallelScalingBlock: its biases are in the wrong order"):
        tome.patch.timm(model)
