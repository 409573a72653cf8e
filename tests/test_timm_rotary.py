"""timm's models with rotary positions: merged tokens stand where one of them stood, and nothing else changes."""

import copy
import pickle

import laws
import pytest
import timm
import torch
from backends import NO_EXTENSION
from models import images
from rotary_cases import HOSTS, SMALL, behind, by_hand, make, may_fail_in_older_timm, shaken, trunk
from stand_in import Halves
from timm.models.eva import Eva
from torch import nn

import tome
from tome import Tokens, UnsupportedModelError, ops
from tome.patch.rotary import rows
from tome.patch.row import Place
from tome_reference import follow

every_host = pytest.mark.parametrize("host", HOSTS)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
RMS = ("deepseek", "gemma4", "sapiens2")  # whose norms are RMSNorms
NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
R = [4, 0, 5]


pytestmark = pytest.mark.usefixtures("reference_without_gradients")


@every_host
def test_nothing_changes_where_nothing_merges(host):
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    assert torch.equal(twin(images()), model(images()))
    assert torch.equal(twin.forward_features(images()), model.forward_features(images()))
    twin.r = NOTHING
    torch.testing.assert_close(twin(images()), model(images()), **CLOSE)


@every_host
def test_merging_is_what_the_hosts_own_modules_compute(host):
    model = make(host)
    twin = tome.patch.auto(copy.deepcopy(model))
    grid, count, steps = by_hand(model, R, images())
    twin.r = R
    torch.testing.assert_close(twin(images()), behind(model, grid, images()), **CLOSE)
    tokens = tome.merged(twin, images())
    assert torch.equal(tokens.size, count)
    assert torch.equal(tokens.slot, follow(steps))
    assert twin._tome_info["size"].shape == (2, tokens.count(), 1)


@pytest.mark.parametrize("host", ["eva02", "mixed", "sapiens2", "gemma4"])
def test_unfused_attention_gives_the_same(host):
    model = tome.patch.timm(make(host))
    model.r = R
    expected = model(images())
    for block in trunk(model).blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images()), expected, **CLOSE)


def test_a_bias_that_is_added_apart():
    model = make("dinov3 swiglu")
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = R
    torch.testing.assert_close(twin(images()), behind(model, by_hand(model, R, images())[0], images()), **CLOSE)


def test_images_that_differ_in_where_their_tokens_stand_are_computed_as_if_alone():
    model = tome.patch.timm(make("mixed"))
    model.r = R
    torch.testing.assert_close(model(images(2)), torch.cat([model(x[None]) for x in images(2)]), **CLOSE)


@pytest.mark.parametrize("shape", [(9, 8), (2, 9, 8), (3, 1, 9, 8), (3, 2, 9, 8)])
def test_rows_of_tables(shape):
    table = torch.randn(shape)
    home = torch.stack([torch.randperm(11)[:7] for _ in range(3)])
    home = home.where(home >= 2, torch.tensor(5))
    home[:, :2] = torch.arange(2)
    found = rows(table, Place(None, home), 2).expand(3, 2, 5, 8)
    full = table.expand(3, 2, 9, 8)
    for image in range(3):
        for head in range(2):
            for i in range(5):
                assert torch.equal(found[image, head, i], full[image, head, home[image, i + 2] - 2])
    assert rows(table, Place(), 2) is table


def test_padding_gives_no_place_to_others():
    slot = torch.tensor([[0, 1, 1, 1, 2, 2]], dtype=torch.int32)
    valid = torch.tensor([[True, True, True, False, False, False]])
    assert ops.homes(slot, 3).tolist() == [[0, 1, 4]]
    assert ops.homes(slot, 3, None, ~valid).tolist() == [[0, 3, 4]]


@every_host
def test_each_half_is_one_call_where_its_parts_are_known(host, monkeypatch):
    model = tome.patch.timm(make(host))
    model.r = 4
    by_parts = model(images())
    halves = Halves()
    monkeypatch.setattr(ops, "one_call", halves.one_call)
    torch.testing.assert_close(model(images()), by_parts, **CLOSE)
    has_norms = "post-norm" not in host and not host.startswith(RMS)
    attends = has_norms and host not in ("eva02 clip", "q/k norm")  # with a norm behind attention
    has_gelu = has_norms and host not in ("eva02", "eva02 clip", "dinov3 swiglu")
    assert halves.counts() == (3 * attends, 3 * has_gelu)


@every_host
def test_unpatched_and_copied(host):
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model), trace_source=True)
    twin.r = R
    merged = twin(images())
    assert not torch.equal(merged, model(images()))
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert other.r == R
        assert torch.equal(other(images()), merged)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(tome.unpatch(twin)(images()), model(images()))
    assert snapshot(twin) == snapshot(model)


def snapshot(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("host", ["eva02", "mixed", "dinov3", "sapiens2", "qwen3", "gemma4"])
def test_training_and_checkpoints(host):
    model = tome.patch.timm(make(host)).train()
    model.r = R
    grads = laws.gradients(model, images())
    assert host != "mixed" or grads[0]["rope.freqs"].abs().sum() > 0
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 30
    for name, grad in grads[0].items():
        assert grad.isfinite().all()
        torch.testing.assert_close(grads[1][name], grad, msg=name, **CLOSE)


@pytest.mark.parametrize("host", ["eva02", "mixed"])
def test_dropped_patches_keep_their_places(host):
    """Patch dropout makes a table for each image."""
    model = make(host, patch_drop_rate=0.5).train()
    twin = tome.patch.timm(copy.deepcopy(model))
    for r in (0, R):
        twin.r = r
        torch.manual_seed(0)
        expected = model(images()) if r == 0 else behind_dropped(model)
        torch.manual_seed(0)
        torch.testing.assert_close(twin(images()), expected, **CLOSE)


def behind_dropped(model):
    grid, count, _ = by_hand(model, R, images())
    assert count.shape == (2, 1 + 18 - sum(R))
    return behind(model, grid, images())


@pytest.mark.parametrize("host", ["eva02", "mixed"])
def test_compiles_in_one_graph(host):
    model = tome.patch.timm(make(host, depth=2))
    model.r = [4, 5]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), **CLOSE)


@pytest.mark.parametrize("host", ["dinov3", "gemma4"])
def test_exports(host):
    if host == "gemma4" and torch.__version__ < "2.12":
        pytest.skip(f"torch {torch.__version__} cannot export timm's Gemma 4, patched or not")
    model = tome.patch.timm(make(host, depth=2))
    model.r = [4, 5]
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()), **CLOSE)


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize(
    ("host", "part"),
    [
        ("sapiens2", "attn"),
        ("sapiens2", "attn.k_proj"),
        ("mixed", "attn"),
        ("q/k norm", "attn.k_norm"),
        ("eva02", "attn.proj"),
        ("eva02", "attn.attn_drop"),
        ("eva02", "mlp"),
        ("gemma4", "attn"),
        ("gemma4", "norm2"),
        ("gemma4", "norm4"),
        ("deepseek", "norm2"),
    ],
)
def test_watched_parts_are_called(host, part, how):
    model = tome.patch.timm(make(host))
    model.r = R
    expected = model(images())
    module, calls = trunk(model).blocks[2].get_submodule(part), []
    if how == "hook":
        module.register_forward_hook(lambda *_: calls.append(part))
    else:
        real = module.forward
        module.forward = lambda *args, **kwargs: calls.append(part) or real(*args, **kwargs)
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    assert len(calls) == (0 if part == "attn.attn_drop" else 1)  # fused attention only reads its rate


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(v) for key, v in value.items()}
    return [shapes(v) for v in value]


@pytest.mark.parametrize("host", ["mixed", "dinov3", "pe lang", "qwen3", "qwen3 merge", "deepseek", "gemma4 soft"])
def test_intermediates_are_on_the_grid(host):
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    options = [{"indices": [0, 2]}, {"output_fmt": "NLC", "norm": True, "indices": [0, 1], "stop_early": True}]
    for option in options:
        expected = model.forward_intermediates(images(), **option)
        for r in (0, R):
            twin.r = r
            final, taken = twin.forward_intermediates(images(), **option)
            assert all(type(each) is torch.Tensor for each in (final, *taken))
            assert shapes([final, taken]) == shapes(expected)
            assert r or all(map(torch.equal, (final, *taken), (expected[0], *expected[1])))
    twin.prune_intermediate_layers([0, 1], prune_head=True)
    assert twin.r == R[:2]
    assert type(twin.forward_features(images())) is torch.Tensor


@pytest.mark.parametrize("host", ["eva02", "qwen3"])
def test_features_only(host):
    make(host)  # or skip
    name, kwargs, _ = HOSTS[host]
    model = shaken(timm.create_model(name, **kwargs, features_only=True, out_indices=(0, 2)))
    expected = model(images())
    tome.patch.timm(model)
    assert all(map(torch.equal, model(images()), expected))
    model.r = R
    assert model.r == model.model.r == R
    assert shapes(model(images())) == shapes(expected)
    assert not torch.equal(model(images())[1], expected[1])


def test_a_wrapper_passes_r_on_to_the_tower_of_a_classifier():
    model = tome.patch.timm(make("qwen3"))
    wrapper = nn.DataParallel(model)
    wrapper.r = R
    assert wrapper.r == model.r == model.encoder.r == R
    assert "r" not in vars(wrapper)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)


@pytest.mark.parametrize("host", ["dinov3", "mixed"])
def test_other_image_sizes(host):
    model = tome.patch.timm(make(host, dynamic_img_size=True))
    model.r = 4
    for size in (48, 80):
        patches = (size // 8) ** 2
        assert tome.merged(model, images(size=size)).count() == model.num_prefix_tokens + patches - 12
        assert model.forward_intermediates(images(size=size))[1][-1].shape == (2, 32, size // 8, size // 8)
    fixed = tome.patch.timm(make(host, dynamic_img_size=False))
    fixed.r = 4
    with may_fail_in_older_timm(AttributeError):
        fixed.set_input_size((64, 64))
    assert tome.merged(fixed, images(size=64)).count() == fixed.num_prefix_tokens + 64 - 12


@pytest.mark.parametrize("host", ["qwen3", "deepseek", "gemma4"])
def test_towers_take_any_size(host):
    model, x = make(host), images(size=96)[:, :, :72]
    expected = behind(model, by_hand(model, R, x)[0], x)
    tome.patch.timm(model).r = R
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_block_takes_a_tensor_and_gives_tokens():
    model = tome.patch.timm(make("dinov3"))
    x, rope = model._pos_embed(model.patch_embed(images()))
    assert torch.equal(model.blocks[0](x, rope=rope), model.blocks[0](x, rope))
    model.r = 6
    tokens = model.blocks[0](x, rope=rope, attn_mask=None, is_causal=False)
    assert isinstance(tokens, Tokens)
    assert tokens.home.shape == (2, 41 - 6)
    assert torch.equal(tokens.home[:, :5], torch.arange(5).expand(2, 5))
    assert torch.equal(model.blocks[2](tokens, rope), model.blocks[2](tokens, rope=rope))


def test_masks_are_refused_where_tokens_merge():
    for host in ("eva02", "mixed"):
        model = tome.patch.timm(make(host))
        mask = torch.zeros(37, 37)
        with may_fail_in_older_timm(TypeError):
            model(images(), attn_mask=mask)
        model.r = 4
        for kwargs in ({"attn_mask": mask}, {"is_causal": True}):
            with pytest.raises(UnsupportedModelError, match=r"blocks\.0: a patched block takes no attn_mask"):
                model(images(), **kwargs)


def replaced(change):
    model = shaken(Eva(**SMALL, use_rot_pos_emb=True))
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.blocks[1], "attn", nn.MultiheadAttention(32, 2)), r"blocks\.1\.attn: MultiheadAttention"),
        (lambda m: setattr(m.blocks[1], "adapter", nn.Linear(32, 32)), r"blocks\.1: EvaBlock has parts .*adapter"),
        (lambda m: setattr(m.blocks[2].attn, "lora", nn.Linear(2, 2)), r"blocks\.2\.attn: EvaAttention has parts"),
        (lambda m: m.blocks.__setitem__(0, nn.Identity()), r"blocks\.0: Identity is not supported"),
        (lambda m: setattr(m.blocks[0], "forward", None), r"blocks\.0: its forward was replaced"),
    ],
)
def test_what_is_not_understood_is_refused_and_left_alone(change, reason):
    model = replaced(change)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        tome.patch.timm(model)
    assert snapshot(model) == before


def test_tokens_without_a_position_must_be_protected():
    model = replaced(lambda m: setattr(m, "num_prefix_tokens", 0))
    tome.patch.timm(model).r = 4
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0: its attention leaves 1 tokens without a position"):
        model(images())


def test_the_table_is_read_at_every_place():
    """Were places not followed, or the table not read, the result would be another."""
    for host in ("rope", "mixed", "mrope", "gemma4"):
        model = tome.patch.timm(make(host))
        model.r = R
        expected = model(images())
        wrong = copy.deepcopy(model)
        for block in trunk(wrong).blocks[1:]:
            block.forward = at_home(block.forward)
        assert not torch.allclose(wrong(images()), expected, **CLOSE), host


def at_home(forward):
    def moved(x, *args, **kwargs):
        x.home = torch.arange(x.count()).expand(len(x.home), -1)
        return forward(x, *args, **kwargs)

    return moved


@NO_EXTENSION
@pytest.mark.parametrize("host", ["eva02", "dinov3", "pe core", "q/k norm", "eva02 post-norm"])
def test_on_a_gpu_the_kernels_give_the_same_logits(host):
    from test_cuda_models import compare

    wide = {"embed_dim": 128, "num_heads": 2, "num_classes": 7}
    for dtype, autocast in (
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ):
        compare(tome.patch.timm(make(host, **wide)).cuda(), images(32).cuda(), dtype, autocast, 4)
