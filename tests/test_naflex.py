"""timm's NaFlexVit and Gemma 4: images of different sizes in one batch, with padding that nobody notices."""

import copy
import pickle

import laws
import pytest
import timm
import torch
from backends import NO_EXTENSION
from models import images
from rotary_cases import GEMMA, behind, by_hand, may_fail_in_older_timm, shaken, trunk
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import nn

import tome
from tome import Tokens, UnsupportedModelError, ops
from tome_reference import follow

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7, "pos_embed_grid_size": (6, 6)}
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
NOTHING = 0.001
R = [5, 0, 4]
GRIDS = [(6, 5), (4, 4), (5, 4)]  # patches of each image: rows and columns

# name -> arguments
HOSTS = {
    "map": {"global_pool": "map", "reg_tokens": 1},
    "avg": {"global_pool": "avg", "reg_tokens": 4, "init_values": 0.3},
    "max": {"global_pool": "max", "pos_embed": "factorized"},
    "token": {"global_pool": "token", "class_token": True, "reg_tokens": 2, "qk_norm": True},
    "key-only mask": {"global_pool": "map", "use_key_only_attn_mask": True, "class_token": True},
    "grid sample": {"global_pool": "avgmax", "pos_embed_use_grid_sample": True, "pool_include_prefix": True},
    "axial": {"global_pool": "avg", "rope_type": "axial", "class_token": True},
    "mixed": {"global_pool": "map", "rope_type": "mixed", "reg_tokens": 2, "init_values": 0.3},
    "dinov3": {"global_pool": "token", "rope_type": "dinov3", "rope_rotate_half": True, "class_token": True},
    "mrope gated": {
        **{"global_pool": "avg", "rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
        **{"attn_gated": True, "swiglu_mlp": True},
    },
    "grouped": {"global_pool": "avg", "rope_type": "axial", "qkv_fused": False, "num_kv_heads": 1},
    "eva": {"global_pool": "avg", "attn_type": "eva", "rope_type": "axial", "class_token": True},
}
every_host = pytest.mark.parametrize("host", [*HOSTS, "gemma4", "gemma4 soft"])
naflex_host = pytest.mark.parametrize("host", HOSTS)


pytestmark = pytest.mark.usefixtures("reference_without_gradients")


def make(host, **changed):
    if host.startswith("gemma4"):
        if not timm.is_model("gemma4_vit_167m"):
            pytest.skip(f"timm {timm.__version__} has no Gemma 4")
        pool = {"encoder_pool": "soft" if host == "gemma4 soft" else "", "pooling_kernel_size": 2}
        return shaken(timm.create_model("gemma4_vit_167m", **GEMMA | pool | changed))
    kwargs = SMALL | HOSTS[host] | changed
    with may_fail_in_older_timm(TypeError, ValueError):
        NaFlexVitCfg(**{key: value for key, value in kwargs.items() if key != "num_classes"})
        model = shaken(NaFlexVit(**kwargs))
        if host == "mixed":  # whose table timm 1.0.29 cannot pad
            with torch.no_grad():
                model(patches())
        return model


def patches(grids=GRIDS, length=None, filling=0.0, even=False):
    """Patches of images of these grids, padded to as many; ``even`` makes the sides even, as pooling by twos wants."""
    if even:
        grids = [(h + h % 2, w + w % 2) for h, w in grids]
    most = length or max(h * w for h, w in grids) + 4
    generator = torch.Generator().manual_seed(3)
    batch = {
        "patches": torch.full((len(grids), most, 8 * 8 * 3), filling),
        "patch_coord": torch.zeros(len(grids), most, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), most, dtype=torch.bool),
    }
    for i, (h, w) in enumerate(grids):
        batch["patches"][i, : h * w] = torch.randn(h * w, 192, generator=generator)
        batch["patch_coord"][i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][i, : h * w] = True
    return batch


def inputs(host, **kwargs):
    return patches(even=host == "gemma4 soft", **kwargs)


def alone(batch, i):
    """One image of the batch without its padding."""
    valid = batch["patch_valid"][i]
    return {key: value[i : i + 1, valid] for key, value in batch.items()}


def valid_tokens(model, batch):
    prefix = batch["patch_valid"].new_ones(len(batch["patches"]), trunk(model).num_prefix_tokens)
    return torch.cat([prefix, batch["patch_valid"]], dim=1)


@every_host
def test_nothing_changes_where_nothing_merges(host):
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    for x in (images(), inputs(host)):
        assert torch.equal(twin(x), model(x))
    twin.r = NOTHING
    for x in (images(), inputs(host)):
        torch.testing.assert_close(twin(x), model(x), **CLOSE)


@every_host
def test_images_merge_as_the_hosts_own_modules_would(host):
    model, x = make(host), images()
    twin = tome.patch.auto(copy.deepcopy(model))
    twin.r = R
    torch.testing.assert_close(twin(x), behind(model, by_hand(model, R, x)[0], x), **CLOSE)


@every_host
@pytest.mark.parametrize("r", [R, [12, 6, 3]], ids=["plenty", "run out"])
def test_padded_batches_merge_as_the_hosts_own_modules_would(host, r):
    model, x = make(host), inputs(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    valid = valid_tokens(model, x)
    grid, count, steps = by_hand(model, r, x, valid=valid)
    twin.r = r
    torch.testing.assert_close(twin(x), behind(model, grid, x), **CLOSE)
    tokens = tome.merged(twin, x)
    torch.testing.assert_close(tokens.size, count)
    assert torch.equal(tokens.slot, follow(steps))
    torch.testing.assert_close(tokens.size.sum(1), valid.sum(1).float())


@every_host
@pytest.mark.parametrize("r", [[6, 0, 0], [0, 6, 0], [0, 0, 6]], ids=str)
def test_an_image_in_a_padded_batch_is_what_it_is_alone(host, r):
    model, batch = make(host), inputs(host)
    model = tome.patch.timm(model)
    model.r = r
    together = model(batch)
    single = torch.cat([model(alone(batch, i)) for i in range(3)]) if host != "gemma4 soft" else None
    if host == "gemma4 soft":  # which pools to as many cells as the longest has
        model.encoder.global_pool = ""
        features = model.encoder(batch)
        for i in range(3):
            valid = batch["patch_valid"][i]
            torch.testing.assert_close(features[i : i + 1, valid], model.encoder(alone(batch, i)), **CLOSE)
    else:
        torch.testing.assert_close(together, single, **CLOSE)


@every_host
@pytest.mark.parametrize("r", [R, 12, (4, -1.0)], ids=str)
@pytest.mark.filterwarnings("ignore:r = :UserWarning")
def test_what_stands_in_the_padding_changes_nothing(host, r):
    """Not even where an image runs out of tokens to merge, and others with it: 16 patches, 12 a layer."""
    model = tome.patch.timm(make(host))
    model.r = r
    expected = model(inputs(host))
    assert expected.isfinite().all()
    assert torch.equal(model(inputs(host, filling=7.0)), expected)
    features = model.forward_features(inputs(host)) if host == "gemma4" else None
    assert features is None or features.isfinite().all()


@every_host
def test_without_sizes_in_attention_padding_still_weighs_nothing(host):
    model = tome.patch.timm(make(host), prop_attn=False)
    model.r = R
    expected = model(inputs(host))
    assert torch.equal(model(inputs(host, filling=7.0)), expected)
    weighed = tome.patch.timm(make(host))
    weighed.r = R
    assert not torch.allclose(weighed(inputs(host)), expected, **CLOSE)


@pytest.mark.parametrize("matching", ["random", "kth"])
@pytest.mark.parametrize("host", ["avg", "mixed", "gemma4"])
def test_other_rules_of_matching(host, matching):
    model = tome.patch.timm(make(host), matching=matching)
    model.r = 2 if matching == "kth" else R
    out = []
    for filling in (0.0, 7.0):
        torch.manual_seed(0)
        out.append(model(inputs(host, filling=filling)))
    assert out[0].isfinite().all()
    torch.testing.assert_close(out[1], out[0], **CLOSE)


@pytest.mark.parametrize("host", ["avg", "mixed", "gemma4"])
def test_watched_attention_is_called(host):
    model = tome.patch.timm(make(host))
    model.r = R
    expected, calls = model(inputs(host)), []
    for block in trunk(model).blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(inputs(host)), expected, **CLOSE)
    assert len(calls) == 3


@every_host
def test_unpatched_and_copied(host):
    model, x = make(host), inputs(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = R
    merged = twin(x)
    assert not torch.equal(merged, model(x))
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(x), merged)
    assert torch.equal(tome.unpatch(twin)(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("host", ["avg", "mixed", "axial", "gemma4"])
def test_training_and_checkpoints(host):
    model = tome.patch.timm(make(host)).train()
    model.r = R
    grads = laws.gradients(model, inputs(host))
    assert len(grads[0]) > 30
    for name, grad in grads[0].items():
        assert grad.isfinite().all()
        torch.testing.assert_close(grads[1][name], grad, msg=name, **CLOSE)


@pytest.mark.parametrize("host", ["avg", "axial"])
def test_dropped_patches(host):
    model = tome.patch.timm(make(host, patch_drop_rate=0.5)).train()
    model.r = R
    out = []
    for filling in (0.0, 7.0):
        torch.manual_seed(0)
        out.append(model(patches(filling=filling)))
    assert torch.equal(out[0], out[1])


@naflex_host
def test_intermediates_are_on_the_grid(host):
    model = make(host)
    twin = tome.patch.timm(copy.deepcopy(model))
    for option in ({"output_fmt": "NLC", "output_dict": True, "norm": True, "indices": [0, 2]},):
        with may_fail_in_older_timm(AssertionError):
            expected = model.forward_intermediates(patches(), **option)
        for r in (0, R):
            twin.r = r
            found = twin.forward_intermediates(patches(), **option)
            assert found.keys() == expected.keys()
            for ours, theirs in zip(found["image_intermediates"], expected["image_intermediates"], strict=True):
                assert type(ours) is torch.Tensor
                assert ours.shape == theirs.shape
                assert r or torch.equal(ours, theirs)
    final, taken = twin.forward_intermediates(images(), indices=[0, 1])
    assert type(final) is torch.Tensor
    assert [tuple(each.shape) for each in taken] == [(2, 32, 6, 6)] * 2
    if hasattr(tome.unpatch(copy.deepcopy(twin)), "prune_intermediate_layers"):  # not in timm 1.0.29
        twin.prune_intermediate_layers([0, 1])
        assert twin.r == R[:2]


@pytest.mark.parametrize("host", ["avg", "axial"])
def test_compiles_in_one_graph(host):
    """Images; timm asks padded batches for their sizes while it runs."""
    model = tome.patch.timm(make(host, depth=2))
    model.r = [4, 5]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), **CLOSE)


def test_compiles_padded_batches():
    model = tome.patch.timm(make("max", depth=2, pos_embed="none"))
    model.r = [4, 5]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(patches()), model(patches()), **CLOSE)


def test_classic_models_as_naflex():
    for name in ("vit_small_patch16_dinov3", "vit_tiny_patch16_224"):
        kwargs = {key: value for key, value in SMALL.items() if key != "pos_embed_grid_size"}
        with may_fail_in_older_timm(ValueError):
            model = shaken(timm.create_model(name, use_naflex=True, img_size=48, **kwargs))
        assert isinstance(model, NaFlexVit)
        batch = patches()
        expected = behind(model, by_hand(model, R, batch, valid=valid_tokens(model, batch))[0], batch)
        tome.patch.timm(model).r = R
        torch.testing.assert_close(model(batch), expected, **CLOSE)


def test_masks_of_the_users_own_are_refused_where_tokens_merge():
    model = tome.patch.timm(make("avg"))
    mask = torch.zeros(3, 1, 38, 38)
    batch = patches() | {"attn_mask": mask}
    model(batch)
    with may_fail_in_older_timm(AssertionError):
        model.forward_intermediates(batch, output_fmt="NLC")
    model.r = 4
    for call in (model, lambda x: model.forward_intermediates(x, output_fmt="NLC")):
        with pytest.raises(UnsupportedModelError, match="NaFlexVit takes no attn_mask where tokens merge"):
            call(batch)
    x = torch.randn(2, 12, 32)
    for mask in (torch.zeros(12, 12), torch.zeros(2, 2, 12, 12), torch.zeros(2, 1, 5, 12)):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.0: a mask of padding is \[B, 1, 1, N\]"):
            model.blocks[0](x, attn_mask=mask)
    tokens = model.blocks[0](x, attn_mask=torch.ones(2, 1, 1, 12, dtype=torch.bool))
    assert isinstance(tokens, Tokens)
    assert tokens.is_padded


def test_blocks_of_other_kinds_are_refused():
    model = make("avg")
    model.blocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1: Identity is not supported"):
        tome.patch.timm(model)


@NO_EXTENSION
@pytest.mark.parametrize("host", ["avg", "axial", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_padding_weighs_nothing_either(host, dtype, autocast):
    model = tome.patch.timm(make(host, embed_dim=128), matching=steady).cuda()
    model.r = R
    truth = model.double()(moved(patches(), torch.float64))
    model.to(torch.float32 if autocast else dtype)
    out = {}
    for backend in ("reference", "cuda"):
        with tome.use_backend(backend), torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
            batch = moved(patches(), torch.float32 if autocast else dtype)
            out[backend] = model(batch)
            assert torch.equal(model(moved(patches(filling=7.0), batch["patches"].dtype)), out[backend])
    errors = {name: float((each.double() - truth).abs().max()) for name, each in out.items()}
    floor = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype] * float(truth.abs().max())
    assert errors["cuda"] <= 2 * errors["reference"] + floor


def steady(keys, r, prefix):
    """Whatever rounding makes of the keys, the same match, of padding nothing."""
    drawn = torch.randn(keys.shape, generator=torch.Generator().manual_seed(keys.shape[2])).to(keys.device)
    return ops.match(drawn.masked_fill(keys.isnan(), torch.nan), r, prefix)


@NO_EXTENSION
@pytest.mark.parametrize("host", ["avg", "axial", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_padding_matches_nothing(host, dtype):
    model = tome.patch.timm(make(host, embed_dim=128)).cuda().to(dtype)
    model.r = R
    with tome.use_backend("cuda"):
        found = [model(moved(patches(**filled), dtype)) for filled in ({}, {"filling": 7.0})]
    assert bool(found[0].isfinite().all())
    assert torch.equal(*found)


def moved(batch, dtype):
    return {key: value.cuda().to(dtype) if key == "patches" else value.cuda() for key, value in batch.items()}
