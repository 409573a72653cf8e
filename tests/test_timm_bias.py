"""timm's models whose attention has a bias for each pair of tokens: which one merged tokens get, and nothing else."""

import copy

import laws
import pytest
import timm
import torch
from backends import NO_EXTENSION
from laws import CLOSE, make
from models import WIDE, images
from stand_in import Halves
from torch import nn
from torch.nn.functional import linear

import tome
import tome_reference
from tome import UnsupportedModelError, ops, recording
from tome.patch.row import Place
from tome.patch.timm_bias import paired

BEIT, RELPOS = "beit_base_patch16_224", "vit_relpos_base_patch16_224"
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
# name -> (timm model, arguments, protected tokens)
HOSTS = {
    "beit": (BEIT, {}, 1),
    "beit shared": (BEIT, {**SHARED, "init_values": None}, 1),
    "beit both": (BEIT, {"use_shared_rel_pos_bias": True, "qkv_bias": False}, 1),
    "beit neither": (BEIT, {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "global_pool": "token"}, 1),
    "beit swiglu": (BEIT, {"swiglu_mlp": True, "scale_mlp": True}, 1),
    "beit v2": ("beitv2_large_patch16_224", {}, 1),
    "relpos": (RELPOS, {}, 0),
    "relpos shared": ("vit_srelpos_small_patch16_224", {}, 0),
    "relpos table": (RELPOS, {"rel_pos_type": "bias", "class_token": True, "qk_norm": True, "init_values": 0.3}, 1),
    "relpos swin": (RELPOS, {"rel_pos_type": "mlp-swin", "fc_norm": True}, 0),
    "relpos class": ("vit_relpos_base_patch16_cls_224", {}, 1),
    "relpos res-post-norm": ("vit_relpos_base_patch16_rpn_224", {}, 0),
}
every_host = pytest.mark.parametrize("host", HOSTS)


pytestmark = pytest.mark.usefixtures("reference_without_gradients")


def made(host, **kwargs):
    name, extra, _ = HOSTS[host]
    return make(name, **{**extra, **kwargs})


@every_host
def test_nothing_changes_where_nothing_merges(host):
    laws.keeps_the_model_where_nothing_merges(made(host))


@pytest.mark.parametrize("host", ["beit", "relpos", "relpos shared", "relpos res-post-norm"])
@pytest.mark.parametrize("rate", ["attn_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_training_drops_what_the_model_drops(host, rate):
    laws.drops_as_the_model(made(host, **{rate: 0.4}))


@every_host
def test_the_planned_tokens(host):
    laws.merges_as_planned(tome.patch.timm(made(host)), HOSTS[host][2])


def bias_of(model, block):
    """[H, N, N] of the pairs of original tokens, or None."""
    attn, found = block.attn, []
    if hasattr(model, "shared_rel_pos"):
        found = [m.get_bias()[0] for m in (attn.rel_pos or model.shared_rel_pos,)]
    else:
        found += [] if attn.relative_position_bias_table is None else [attn._get_rel_pos_bias()[0]]
        found += [] if model.rel_pos_bias is None else [model.rel_pos_bias()]
    return sum(found) if found else None


def embedded(model):
    x = model.patch_embed(images())
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    return x if getattr(model, "pos_embed", None) is None else x + model.pos_embed


def by_hand(model, r, prefix):
    """The last block's tokens on the full grid: one image and one head after another, by the definition."""
    x, steps = embedded(model), []
    size = torch.ones(x.shape[:2])
    places = [list(range(x.shape[1])) for _ in x]  # where each token stands
    for block in model.blocks:
        attn, is_post = block.attn, hasattr(block, "init_values") and not hasattr(block, "gamma_1")
        y = x if is_post else block.norm1(x)
        qkv_bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            qkv_bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = linear(y, attn.qkv.weight, qkv_bias).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if getattr(attn, "q_norm", None) is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        bias, seen = bias_of(model, block), torch.zeros_like(q)
        for image, stands in enumerate(places):
            for head in range(2):
                scores = q[image, head] @ k[image, head].T / 4 + size[image].log()
                if bias is not None:
                    scores = scores + bias[head][stands][:, stands]
                seen[image, head] = scores.softmax(dim=1) @ v[image, head]
        value = attn.proj(seen.transpose(1, 2).flatten(2))
        x = x + scaled(block, 1, block.norm1(value) if is_post else value)
        slot = tome_reference.match(k, r, prefix)
        x, size = tome_reference.merge(x, slot, x.shape[1] - r, size)
        first = [{int(s): i for i, s in reversed(list(enumerate(row)))} for row in slot]  # of each group
        places = [[old[new[m]] for m in range(x.shape[1])] for old, new in zip(places, first, strict=True)]
        steps.append(slot)
        x = x + scaled(block, 2, block.norm2(block.mlp(x)) if is_post else block.mlp(block.norm2(x)))
    return tome_reference.restore(x, None, steps)


def scaled(block, i, value):
    if hasattr(block, f"ls{i}"):
        return getattr(block, f"ls{i}")(value)
    gamma = getattr(block, f"gamma_{i}", None)
    return value if gamma is None else value * gamma


@every_host
def test_merging_is_what_the_hosts_own_modules_compute(host):
    model = made(host)
    expected = model.forward_head(model.norm(by_hand(model, 5, HOSTS[host][2])))
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = 5
    torch.testing.assert_close(twin(images()), expected, **CLOSE)
    assert (model(images()) - expected).abs().max() > 1e-3
    for block in twin.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(twin(images()), expected, **CLOSE)


def test_a_bias_of_q_k_v_that_is_added_apart():
    model = tome.patch.timm(made("beit"))
    model.r = 5
    expected = model(images())
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    torch.testing.assert_close(model(images()), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 9, 9), (3, 9, 9)])
def test_the_bias_of_places(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    bias, size = torch.randn(shape, generator=generator), torch.rand(2, 1, 1, 5, generator=generator)
    home = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(2)])
    whole = bias.reshape(3, 9, 9).to(dtype)
    for log_size in (None, size.log()):
        mask = paired(bias, Place(home=home), log_size, dtype)
        assert mask.shape == (2, 3, 5, 5)
        assert mask.dtype == dtype
        assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
        for b in range(2):
            expected = whole[:, home[b]][:, :, home[b]]
            if log_size is not None:
                expected = (expected + log_size[b]).to(dtype)
            assert torch.equal(mask[b], expected)
    assert paired(bias, Place(), None, dtype).equal(whole[None])
    assert paired(bias, Place(), torch.zeros(2, 1, 1, 9), dtype).equal(whole.expand(2, 3, 9, 9))


def test_equal_patches_without_positions_merge_exactly():
    model = made("beit neither")
    model.pos_embed.zero_()
    flat = torch.full((2, 3, 48, 48), 0.7)
    expected = model(flat)
    tome.patch.timm(model).r = 9
    torch.testing.assert_close(model(flat), expected, **CLOSE)


@every_host
def test_copies(host):
    laws.survives_copies(made(host))


@pytest.mark.parametrize("host", ["beit", "beit both", "relpos shared", "relpos table", "relpos res-post-norm"])
def test_training_and_checkpoints(host):
    gradients = laws.trains(made(host, **({} if "beit" in host else {"rel_pos_dim": 8})))
    biases = [name for name in gradients if "rel" in name and "norm" not in name]
    assert biases
    assert all(gradients[name].abs().sum() > 0 for name in biases if "bias" not in name.rpartition(".")[2])


@pytest.mark.parametrize("host", ["beit both", "relpos"])
def test_compiles_in_one_graph(host):
    laws.compiles(made(host))


@pytest.mark.parametrize("host", ["beit", "beit shared", "relpos", "relpos shared"])
def test_watched_parts_are_called(host):
    parts = {"attn.proj": 1, "mlp": 1, "mlp.fc1": 1, "norm1": 1, "drop_path1": 1}
    parts |= {"attn.qkv": 1, "attn.q_norm": 1} if "relpos" in host else {}
    laws.calls_what_is_watched(made(host), parts)


@pytest.mark.parametrize("host", ["beit", "beit shared", "beit neither", "relpos", "relpos shared"])
@pytest.mark.parametrize("part", ["attn", "attn.attn_drop"])
def test_attention_that_is_watched_is_called_with_the_bias_of_places(host, part):
    model = tome.patch.timm(made(host))
    model.r = 5
    expected, seen = model(images()), []
    for block in model.blocks:
        block.attn.fused_attn = False  # only so attn_drop is called
        block.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    n = 36 + HOSTS[host][2]
    assert [shape[-2] for shape in seen] == [n, n - 5, n - 10]


def test_what_cannot_be_told_the_places_is_refused():
    model = tome.patch.timm(made("beit"))
    model.r = 5
    attn = model.blocks[1].attn
    attn.forward = attn.forward
    with pytest.raises(UnsupportedModelError, match="the forward of Attention was replaced"):
        model(images())
    model = tome.patch.timm(made("relpos"))
    model.r = 5
    model.blocks[1].attn.rel_pos.register_forward_hook(lambda *_: None)
    model(images())  # fused attention calls it not either
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(UnsupportedModelError, match=r"attn\.rel_pos: RelPosMlp is not called, but has hooks"):
        model(images())


def test_biases_that_differ_between_images_are_refused():
    model = tome.patch.timm(made("beit shared"))
    model.r = 5
    x = embedded(model)
    for bias in (torch.zeros(2, 2, 37, 37), torch.zeros(37, 37)):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.0: a bias of pairs must be \[H, N, N\]"):
            model.blocks[0](x, bias)
    first = model.blocks[0](x, shared_rel_pos_bias=torch.ones(2, 37, 37))
    assert torch.equal(first, model.blocks[0](x, torch.ones(1, 2, 37, 37)))


@pytest.mark.parametrize("host", ["beit", "relpos"])
def test_what_is_not_understood_is_named(host):
    model = made(host)
    model.blocks[1].attn = nn.MultiheadAttention(32, 2)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn: MultiheadAttention is not supported"):
        tome.patch.timm(model)
    model = made(host)
    model.blocks[2].attn.lora = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.attn: .*not understood: \['lora'\]"):
        tome.patch.timm(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm, which resizes the table
@pytest.mark.parametrize("host", ["beit", "relpos table"])
def test_other_image_sizes(host):
    model = tome.patch.timm(made(host))
    model.r = 4
    if not hasattr(tome.patch.swap.base_of(model), "set_input_size"):
        pytest.skip(f"in timm {timm.__version__} its size is fixed")
    model.set_input_size((64, 64))
    assert tome.merged(model, images(size=64)).count() == 64 + 1 - 12
    assert model.forward_intermediates(images(size=64))[1][0].shape == (2, 32, 8, 8)


@every_host
def test_the_mlp_is_one_call_where_its_parts_are_known(host, monkeypatch):
    model = tome.patch.timm(made(host))
    model.r = 4
    with recording.recorded() as calls:
        by_parts = model(images())
    assert ("each pair of tokens has a bias of its own" in {call.reason for call in calls}) == (host != "beit neither")
    halves = Halves()
    monkeypatch.setattr(ops, "one_call", halves.one_call)
    torch.testing.assert_close(model(images()), by_parts, **CLOSE)
    assert halves.counts() == (0, 0 if host in ("beit swiglu", "relpos res-post-norm") else 3)


@NO_EXTENSION
@pytest.mark.parametrize("host", ["beit", "beit shared", "relpos", "relpos class", "relpos res-post-norm"])
def test_on_a_gpu_both_backends_give_the_same_logits(host):
    laws.agrees_on_a_gpu(made(host, **WIDE))
