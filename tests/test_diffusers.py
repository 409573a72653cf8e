"""diffusers' denoisers: what a user of them sees of a patch."""

import copy
import inspect
import logging
import pickle
import re
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
from backends import NO_EXTENSION

pytest.importorskip("diffusers", minversion="0.42")

import accelerate
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from gpu import assert_replays
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize, scaled_dot_product_attention

import tome
from tome import ops
from tome.patch import grid
from tome.patch.diffusers_unet import MergingAttention

TEXT = 24
UNET = {"layers_per_block": 1, "sample_size": 16, "cross_attention_dim": TEXT, "norm_num_groups": 8}
FINE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
COARSE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 12, "norm_num_groups": 4}
PIXART = DIT | {"caption_channels": TEXT, "cross_attention_dim": 16, "use_additional_conditions": False}
XL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
}

# name -> (class, arguments, the finest downsampling with attention, how many self-attentions it has there)
HOSTS = {
    "sd1": (UNet2DConditionModel, UNET | FINE | {"attention_head_dim": 2}, 1, 3),
    "sd2": (
        UNet2DConditionModel,
        UNET | FINE | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
        1,
        3,
    ),
    "xl": (UNet2DConditionModel, UNET | COARSE | XL, 2, 2 * (1 + 1 + 2)),
    "dit": (DiTTransformer2DModel, DIT, 1, 2),
    "pixart": (PixArtTransformer2DModel, PIXART, 1, 2),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def make(host, **changed):
    kind, arguments, _, _ = HOSTS[host]
    torch.manual_seed(0)
    model = kind(**(arguments | changed))
    with torch.no_grad():
        for parameter in model.parameters():  # larger, so that attention tells its tokens apart
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def inputs(host, height=12, width=12, batch=2, twins=False, timestep=10):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, height, width, generator=generator)
    if twins:
        latent = latent[: batch // 2].repeat(2, 1, 1, 1)
    text = torch.randn(batch, 5, TEXT, generator=generator)
    timesteps = torch.full((batch,), timestep)
    if host == "dit":
        return {"hidden_states": latent, "timestep": timesteps, "class_labels": torch.arange(batch)}
    if host == "pixart":
        return {"hidden_states": latent, "timestep": timesteps, "encoder_hidden_states": text}
    given = {"sample": latent, "timestep": timesteps[0], "encoder_hidden_states": text}
    if host == "xl":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, TEXT, generator=generator),
            "time_ids": torch.ones(batch, 6),
        }
    return given


def run(model, given):
    with torch.no_grad():
        return model(**given).sample


def merging(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MergingAttention) and m._tome_level}


class Seen:
    """An attention processor that notes what it is given, and lets another one work."""

    def __init__(self):
        self.tokens, self.inner = [], AttnProcessor2_0()

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        extra=None,
        *args,
        **kwargs,
    ):
        self.tokens.append(hidden_states)
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def watched(model):
    """A processor in all self-attentions that merge."""
    seen = Seen()
    for attn in merging(model).values():
        attn.set_processor(seen)
    return seen


def targets_by_hand(height, width, sx, sy):
    """The top left token of each cell."""
    return [y * width + x for y in range(0, height, sy) for x in range(0, width, sx)]


def slot_by_hand(metric, targets, r):
    """One image's map by loops: metric [N, D]."""
    n = metric.shape[0]
    sources = [i for i in range(n) if i not in set(targets)]
    unit = normalize(metric.double(), dim=-1)
    best = [max((float(unit[i] @ unit[j]), -k) for k, j in enumerate(targets)) for i in sources]
    chosen = sorted(range(len(sources)), key=lambda i: (-best[i][0], i))[:r]
    slot, free = [None] * n, 0
    for i, source in enumerate(sources):
        if i in chosen:
            slot[source] = len(sources) - r - best[i][1]
        else:
            slot[source], free = free, free + 1
    for k, target in enumerate(targets):
        slot[target] = len(sources) - r + k
    return torch.tensor(slot)


class ByHand:
    """A processor that merges around attention with plain torch, for a model that is not patched."""

    def __init__(self, height, width, ratio, sx, sy, twins=False):
        self.height, self.width, self.ratio, self.sx, self.sy, self.twins = height, width, ratio, sx, sy, twins
        self.tokens = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x, n = hidden_states, hidden_states.shape[1]
        assert n == self.height * self.width
        metric = attn.to_k(x).unflatten(2, (attn.heads, -1)).mean(2)
        if self.twins:
            metric = metric.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)
        targets = targets_by_hand(self.height, self.width, self.sx, self.sy)
        r = min(int(n * self.ratio), n - len(targets))
        slots = torch.stack([slot_by_hand(m, targets, r) for m in metric])
        one_hot = torch.nn.functional.one_hot(slots, n - r).to(x.dtype)
        merged = (one_hot.transpose(1, 2) @ x) / one_hot.sum(1)[:, :, None]
        self.tokens.append(merged)
        q, k, v = (
            part(merged).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out.gather(1, slots[:, :, None].expand_as(x))


def by_hand(model, given, names, grid_size, ratio, sx=2, sy=2, twins=False):
    processor = ByHand(*grid_size, ratio, sx, sy, twins)
    for name in names:
        model.get_submodule(name).set_processor(processor)
    return run(model, given), processor.tokens


def grid_of(host, height, width):
    side = 2 if host in ("xl", "dit", "pixart") else 1
    return -(-height // side), -(-width // side)


@every_host
def test_ratio_0_gives_the_bits_of_the_unpatched_model(host):
    model = make(host)
    twin = tome.patch.diffusers(copy.deepcopy(model), ratio=0)
    given = inputs(host)
    assert torch.equal(run(twin, given), run(model, given))


@every_host
def test_the_output_is_that_of_merging_by_hand(host):
    model, given = make(host), inputs(host)
    twin = tome.patch.diffusers(copy.deepcopy(model), use_rand=False)
    assert len(merging(twin)) == HOSTS[host][3]
    seen = watched(twin)
    ours = run(twin, given)
    theirs, tokens = by_hand(model, given, merging(twin), grid_of(host, 12, 12), 0.5)
    n = 144 if host.startswith("sd") else 36
    assert {t.shape[1] for t in seen.tokens} == {n - n // 2}
    assert [t.shape for t in seen.tokens] == [t.shape for t in tokens]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - run(make(host), given)).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(7, 5), (10, 6), (3, 1)])
@pytest.mark.parametrize(("sx", "sy", "ratio"), [(2, 2, 0.75), (2, 1, 0.5), (3, 2, 0.4)])
def test_any_image_and_any_cells(height, width, sx, sy, ratio):
    model, given = make("sd1"), inputs("sd1", height, width)
    twin = tome.patch.diffusers(copy.deepcopy(model), ratio, sx=sx, sy=sy, use_rand=False)
    theirs, _ = by_hand(model, given, merging(twin), (height, width), ratio, sx, sy)
    torch.testing.assert_close(run(twin, given), theirs, rtol=1e-4, atol=1e-5)


def test_images_of_pixart_that_are_not_square():
    model, given = make("pixart"), inputs("pixart", 8, 14)
    twin = tome.patch.diffusers(copy.deepcopy(model), use_rand=False)
    theirs, _ = by_hand(model, given, merging(twin), (4, 7), 0.5)
    torch.testing.assert_close(run(twin, given), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [1, 5, None])
@pytest.mark.parametrize("shape", [(4, 6, 2, 2), (5, 3, 2, 1), (5, 7, 3, 2), (1, 9, 2, 2), (2, 3, 2, 2)], ids=str)
def test_matching_on_a_grid(device, shape, r):
    height, width, sx, sy = shape
    metric = torch.randn(3, height * width, 6, generator=torch.Generator().manual_seed(4)).to(device)
    sources, targets = (each.expand(3, -1) for each in grid.sets(height, width, sx, sy, None, device))
    r = sources.shape[1] if r is None else min(r, sources.shape[1])
    slot = ops.set_match(metric, sources, targets, r)
    assert slot.dtype == torch.int32
    expected = [slot_by_hand(m, targets_by_hand(height, width, sx, sy), r) for m in metric.cpu()]
    assert slot.tolist() == torch.stack(expected).tolist()


def test_numbers_that_are_none_leave_a_map():
    metric = torch.randn(2, 35, 4)
    metric[0] = torch.nan
    metric[1, ::2] = torch.inf
    sources, targets = (each.expand(2, -1) for each in grid.sets(5, 7, 2, 2, None, metric.device))
    slot = ops.set_match(metric, sources, targets, 20)
    assert all(sorted(set(row)) == list(range(15)) for row in slot.tolist())


@pytest.mark.parametrize(("height", "width", "sx", "sy"), [(8, 8, 2, 2), (7, 5, 2, 3), (4, 9, 4, 1)])
def test_one_target_in_each_cell(device, height, width, sx, sy):
    rows, columns = grid.cells(height, width, sx, sy)
    drawn = grid.draws(3, torch.tensor(981), rows * columns, device)
    sources, targets = (each.tolist() for each in grid.sets(height, width, sx, sy, drawn, device))
    assert targets == sorted(targets)
    assert sources == sorted(sources)
    assert {(t // width // sy, t % width // sx) for t in targets} == {
        (y, x) for y in range(rows) for x in range(columns)
    }
    assert sorted([*targets, *sources]) == list(range(height * width))


def mixed_by_hand(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x ^ (x >> 16)


def test_draws_are_the_same_on_every_device_and_for_every_kind_of_timestep(device):
    now = int.from_bytes(struct.pack("f", 512.0), sys.byteorder)
    first = mixed_by_hand((now + 3 * 0x9E3779B1 + 0x7F4A7C15) % 2**32)
    expected = [mixed_by_hand((first + i) % 2**32) for i in range(64)]
    for timestep in (512, 512.0, torch.tensor(512), torch.tensor([512.0, 4.0]), torch.tensor(512, dtype=torch.float16)):
        given = timestep.to(device) if isinstance(timestep, torch.Tensor) else timestep
        assert grid.draws(3, given, 64, device).tolist() == expected
    assert len(set(expected)) == 64


def test_draws_are_spread_evenly_and_differ():
    many = grid.draws(0, 1, 40_000, torch.device("cpu"))
    assert int(many.min()) >= 0
    for cell in (2, 3, 4, 6):
        counts = torch.bincount(many % cell, minlength=cell)
        assert float((counts - 40_000 / cell).abs().max()) < 4 * (40_000 / cell) ** 0.5
    others = [grid.draws(seed, step, 400, torch.device("cpu")) % 4 for seed in (0, 1, -5) for step in (1, 2, 999)]
    for i, one in enumerate(others):
        for other in others[:i]:
            assert 0.15 < float((one == other).float().mean()) < 0.35
    shifted = many[1:] % 4 == many[:-1] % 4
    assert 0.24 < float(shifted.float().mean()) < 0.26


def test_targets_change_with_timestep_and_seed_alone():
    model, given = make("sd1"), inputs("sd1")
    tome.patch.diffusers(model)
    state = torch.get_rng_state()
    first = run(model, given)
    torch.manual_seed(9)
    assert torch.equal(run(model, given), first)
    torch.set_rng_state(state)
    tome.patch.diffusers(model, seed=1)
    assert not torch.equal(run(model, given), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_levels_up_to_max_downsample_merge():
    model, given = make("sd1"), inputs("sd1", 8, 12)
    for limit, expected in ((1, [48] * 3), (2, [48, 12, 12, 12, 12, 48, 48])):
        tome.patch.diffusers(model, max_downsample=limit)
        tome.patch.diffusers(model, max_downsample=limit)  # twice is once
        seen = watched(model)
        run(model, given)
        assert [t.shape[1] for t in seen.tokens] == expected
    with pytest.raises(ValueError, match="begins at a downsampling of 2"):
        tome.patch.diffusers(make("xl"), max_downsample=1)


def test_what_attends_to_the_text_alone_does_not_merge():
    model = tome.patch.diffusers(make("sd1", only_cross_attention=(True, False)))
    assert {name.partition(".attentions")[0] for name in merging(model)} == {
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
    }
    assert torch.isfinite(run(model, inputs("sd1"))).all()


def slots_of(model, given, monkeypatch):
    slots, match = [], ops.set_match

    def noted(*args):
        slots.append(match(*args))
        return slots[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ops, "set_match", noted)
        run(model, given)
    return slots


def test_blocks_of_a_level_share_a_map_when_asked(monkeypatch):
    model, given = make("sd1"), inputs("sd1")
    tome.patch.diffusers(model, max_downsample=2)
    assert [slot.shape[1] for slot in slots_of(model, given, monkeypatch)] == [144, 36, 36, 36, 36, 144, 144]
    tome.patch.diffusers(model, max_downsample=2, share_map=True)
    first = slots_of(model, given, monkeypatch)
    assert [slot.shape[1] for slot in first] == [144, 36]
    other = slots_of(model, given | {"sample": given["sample"].flip(2)}, monkeypatch)
    assert len(other) == 2  # made anew
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("host", ["sd1", "dit"])
def test_samples_of_one_latent_share_a_map(host, monkeypatch):
    model, given = make(host), inputs(host, batch=4, twins=True)
    latent = next(name for name in ("sample", "hidden_states") if name in given)
    given[latent][3] += 0.01  # so that the second pair are no twins
    tome.patch.diffusers(model, use_rand=False)
    slots = slots_of(model, given, monkeypatch)[-1]
    assert torch.equal(slots[0], slots[2])
    assert not torch.equal(slots[1], slots[3])
    tome.patch.diffusers(model, use_rand=False, share_guidance=False)
    slots = slots_of(model, given, monkeypatch)[-1]
    assert not torch.equal(slots[0], slots[2])


def test_the_shared_map_is_that_of_the_mean_keys():
    model, given = make("sd1"), inputs("sd1", batch=4, twins=True)
    twin = tome.patch.diffusers(copy.deepcopy(model), use_rand=False)
    theirs, _ = by_hand(model, given, merging(twin), (12, 12), 0.5, twins=True)
    torch.testing.assert_close(run(twin, given), theirs, rtol=1e-4, atol=1e-5)


def test_arguments_by_position():
    model, given = tome.patch.diffusers(make("sd1")), inputs("sd1")
    expected = run(model, given)
    sample, timestep, text = given.values()
    for kwargs in (None, {}, {"scale": 1.0}):
        with torch.no_grad():
            assert torch.equal(model(sample, timestep, text, None, None, None, kwargs).sample, expected)
            assert torch.equal(
                model(sample, timestep, text, cross_attention_kwargs=kwargs, return_dict=False)[0], expected
            )
    assert kwargs == {"scale": 1.0}


def pipeline():
    words = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in "acdgot" for end in ("", "</w>"))]
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=make("sd1"),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    generator = torch.Generator().manual_seed(5)
    return pipe("a cat", num_inference_steps=2, output_type="latent", generator=generator, **kwargs).images


def test_a_pipeline(tmp_path, monkeypatch):
    pipe = pipeline()
    plain, types = draw(pipe), [type(m) for m in pipe.unet.modules()]
    attributes = [set(vars(m)) for m in pipe.unet.modules()]
    processors, keys = pipe.unet.attn_processors, list(pipe.unet.state_dict())
    assert tome.patch.diffusers(pipe) is pipe
    slots = []
    match = ops.set_match
    monkeypatch.setattr(ops, "set_match", lambda *args: slots.append(match(*args)) or slots[-1])
    merged = draw(pipe)
    assert torch.equal(draw(pipe), merged)
    assert not torch.equal(merged, plain)
    assert len(slots) == 2 * 2 * 3
    assert all(torch.equal(slot[0], slot[1]) for slot in slots)  # with guidance
    draw(pipe, guidance_scale=1.0)
    assert pipe.unet.attn_processors == processors
    assert list(pipe.unet.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), plain)
    assert torch.equal(draw(tome.patch.diffusers(again.unet) and again), merged)
    assert torch.equal(draw(tome.patch.diffusers(pipe, ratio=0)), plain)
    assert tome.unpatch(pipe) is pipe
    assert [type(m) for m in pipe.unet.modules()] == types
    assert [set(vars(m)) for m in pipe.unet.modules()] == attributes
    assert torch.equal(draw(pipe), plain)


def test_the_page(monkeypatch):
    """The code of docs/diffusers.md runs, in its order, on a small pipeline in the place of a downloaded one."""
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    pipe = pipeline()
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr(pipe, "to", lambda device: pipe, raising=True)
    kinds = []
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *args, **kwargs: call(self, *args, num_inference_steps=2, **kwargs)
    )
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/diffusers.md", "exec"), names)
        kinds.append(len(merging(pipe.unet)))
    assert kinds == [0, 3, 0]
    assert names["before"][0].size == names["after"][0].size == (32, 32)
    assert names["before"][0].tobytes() != names["after"][0].tobytes()
    for argument in inspect.signature(tome.patch.diffusers).parameters:
        assert f"`{argument}" in page or argument in ("model", "merge_attn")


def test_nobody_is_told_of_what_the_attentions_share():
    model, given, records = tome.patch.diffusers(make("sd1")), inputs("sd1"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("diffusers.models.attention_processor")
    logger.addHandler(handler)
    try:
        run(model, given)
        assert not records
        run(model, given | {"cross_attention_kwargs": {"unknown": 1}})
        assert records
        assert all("['unknown']" in record.getMessage() for record in records)
    finally:
        logger.removeHandler(handler)


def test_processors_set_before_and_afterwards():
    model, given = make("sd1"), inputs("sd1")
    model.set_attn_processor(AttnProcessor())
    tome.patch.diffusers(model)
    expected = run(model, given)
    seen = Seen()
    model.set_attn_processor(seen)
    torch.testing.assert_close(run(model, given | {"cross_attention_kwargs": {"extra": 3}}), expected)
    assert {72, 144, 36} == {t.shape[1] for t in seen.tokens}
    model.set_attention_slice(1)
    assert isinstance(next(iter(merging(model).values())).processor, SlicedAttnProcessor)
    torch.testing.assert_close(run(model, given), expected)
    model.set_default_attn_processor()
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, given), expected)
    model.unfuse_qkv_projections()
    tome.unpatch(model)
    assert not any(isinstance(p, Seen) for p in model.attn_processors.values())


def ip_adapter(model):
    """Weights of an IP-Adapter with random numbers."""
    weights, number = {}, 1
    for name, processor in model.attn_processors.items():
        if name.endswith("attn2.processor"):
            width = model.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{part}.weight"] = torch.randn(width, TEXT) * 0.2
            number += 2
        assert processor is not None
    project = {
        "proj.weight": torch.randn(4 * TEXT, 10), "proj.bias": torch.zeros(4 * TEXT),
        "norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT),
    }  # fmt: skip
    return {"image_proj": project, "ip_adapter": weights}


@pytest.mark.parametrize("is_patched_first", [False, True])
def test_ip_adapter(is_patched_first):
    plain, given = make("sd1"), inputs("sd1")
    twin = tome.patch.diffusers(copy.deepcopy(plain), use_rand=False) if is_patched_first else copy.deepcopy(plain)
    torch.manual_seed(6)
    weights = ip_adapter(plain)
    for model in (plain, twin):
        model._load_ip_adapter_weights([copy.deepcopy(weights)])
    tome.patch.diffusers(twin, use_rand=False)
    given["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 10)]}
    before = run(plain, given)
    theirs, _ = by_hand(plain, given, merging(twin), (12, 12), 0.5)
    ours = run(twin, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(run(tome.unpatch(twin), given), before)


LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def test_lora():
    plain, given = make("sd1"), inputs("sd1")
    first, later = (copy.deepcopy(plain) for _ in range(2))
    tome.patch.diffusers(first, use_rand=False)
    for model in (plain, first, later):
        torch.manual_seed(7)
        model.add_adapter(LORA)
    tome.patch.diffusers(later, use_rand=False)
    ours = run(first, given)
    assert torch.equal(ours, run(later, given))
    scaled = run(first, given | {"cross_attention_kwargs": {"scale": 0.5}})
    assert not torch.equal(scaled, ours)
    first.disable_adapters()
    assert not torch.equal(run(first, given), ours)
    theirs, _ = by_hand(plain, given, merging(later), (12, 12), 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_in_pefts_wrapper():
    given = inputs("sd1")
    torch.manual_seed(8)
    wrapped = get_peft_model(make("sd1"), LORA).eval()
    plain = run(wrapped, given)
    tome.patch.diffusers(wrapped)
    assert not torch.equal(run(wrapped, given), plain)
    assert torch.equal(run(tome.unpatch(wrapped), given), plain)


OFFLOADS = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device="cpu"),
    "sequential": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("is_patched_first", [False, True])
def test_offloading(offload, is_patched_first):
    model, given = make("sd1"), inputs("sd1")
    plain = run(model, given)
    expected = run(tome.patch.diffusers(copy.deepcopy(model)), given)
    steps = [tome.patch.diffusers, OFFLOADS[offload]]
    for step in steps if is_patched_first else steps[::-1]:
        step(model)
    assert torch.equal(run(model, given), expected)
    assert torch.equal(run(tome.unpatch(model), given), plain)


def test_state():
    given = inputs("sd1")
    model = tome.patch.diffusers(make("sd1"))
    expected = run(model, given)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, given), expected)
        assert type(twin) is type(model)
        assert type(tome.unpatch(twin)) is UNet2DConditionModel
        assert not any(name.startswith("_tome") for m in twin.modules() for name in vars(m))
    assert type(model).__name__ == "UNet2DConditionModel"
    assert {type(m).__name__ for m in merging(model).values()} == {"Attention"}


def test_two_threads():
    model = tome.patch.diffusers(make("sd1"), share_map=True)
    given = [inputs("sd1", 12, 12), inputs("sd1", 8, 10, timestep=500)]
    expected = [run(model, each) for each in given]
    wrong = []

    def work(i):
        for _ in range(4):
            if not torch.equal(run(model, given[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("share_map", [False, True])
def test_gradients_and_checkpointing(share_map):
    given, grads = inputs("sd1"), []
    for checkpointed in (False, True):
        model = tome.patch.diffusers(make("sd1"), share_map=share_map).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(**given).sample.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.isfinite(g).all() for g in grads[0])
    assert sum(float(g.abs().sum()) > 0 for g in grads[0]) > 0.9 * len(grads[0])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    model, given = tome.patch.diffusers(make("pixart"), share_map=True), inputs("pixart", twins=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, given), run(model, given))
    given["timestep"] = given["timestep"] + 7
    torch.testing.assert_close(run(compiled, given), run(model, given))


def test_compiled_blocks():
    torch._dynamo.reset()
    model, given = tome.patch.diffusers(make("sd1"), share_map=True), inputs("sd1")
    expected = run(model, given)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, given), expected)


def test_hooks_see_the_full_grid():
    model, given = tome.patch.diffusers(make("sd1")), inputs("sd1")
    seen = []
    for attn in merging(model).values():
        attn.register_forward_hook(lambda module, args, output: seen.append((args[0].shape[1], output.shape[1])))
    run(model, given)
    assert seen == [(144, 144)] * 3


def test_what_is_refused():
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(tome.UnsupportedModelError, match="FluxTransformer2DModel: image and text tokens share one"):
        tome.patch.diffusers(flux)
    with pytest.raises(tome.UnsupportedModelError, match=r"must hold one of UNet2DConditionModel, .*found 0"):
        tome.patch.diffusers(AutoencoderKL())
    with pytest.raises(tome.UnsupportedModelError, match="found 0"):
        tome.patch.diffusers(torch.nn.Linear(2, 2))
    with pytest.raises(tome.UnsupportedModelError, match="found 2"):
        tome.patch.diffusers(torch.nn.ModuleList([make("sd1"), make("dit")]))
    with pytest.raises(tome.UnsupportedModelError, match=r"patch before torch\.compile"):
        tome.patch.diffusers(torch.compile(make("sd1")))
    model = make("sd1")
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.residual_connection = True
    with pytest.raises(
        tome.UnsupportedModelError, match=r"down_blocks\.0\..*attn1: self-attention with a residual_conn"
    ):
        tome.patch.diffusers(model)
    attn.residual_connection = False
    attn.forward = attn.forward
    with pytest.raises(tome.UnsupportedModelError, match=r"down_blocks\.0\..*attn1: its forward was replaced"):
        tome.patch.diffusers(model)
    assert not any(isinstance(m, MergingAttention) for m in model.modules())
    del attn.forward
    tome.patch.diffusers(model)
    given = inputs("sd1")
    with pytest.raises(tome.UnsupportedModelError, match="call the model, not its forward"):
        model.forward(**given)
    with pytest.raises(tome.UnsupportedModelError, match="takes no attention_mask"):
        run(model, given | {"attention_mask": torch.ones(2, 144)})
    attn._tome_level = 2
    with pytest.raises(tome.UnsupportedModelError, match=r"got tokens \(2, 144, 16\) for a grid of 6 x 6"):
        run(model, given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.76}, r"\[0, 0.75\] for cells of 2 x 2, got 0.76"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": 0.5, "sx": 1, "sy": 1}, r"\[0, 0\] for cells of 1 x 1"),
        ({"sx": 0}, "sx must be an integer"),
        ({"sy": 1.5}, "sy must be an integer"),
        ({"max_downsample": 0}, "max_downsample must be"),
        ({"merge_attn": False}, "merge_attn must be True"),
        ({"merge_crossattn": True}, "merge_crossattn must be False"),
        ({"merge_mlp": True}, "merge_mlp must be False"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        tome.patch.diffusers(make("dit"), **arguments)


def test_a_level_of_one_cell_merges_nothing():
    model, given = make("sd1"), inputs("sd1", 1, 1)
    assert torch.equal(run(tome.patch.diffusers(copy.deepcopy(model)), given), run(model, given))


@NO_EXTENSION
@pytest.mark.parametrize("share_map", [False, True])
def test_in_a_cuda_graph(share_map):
    """Which no step may leave: nothing waits for a value."""
    unet = tome.patch.diffusers(make("sd1"), share_map=share_map).cuda()
    given, others = (
        {name: value.cuda() for name, value in inputs("sd1", 32, 32, twins=True, timestep=timestep).items()}
        for timestep in (10, 700)
    )
    others["sample"] = others["sample"].flip(2)
    with torch.no_grad():
        assert_replays(lambda: unet(**given).sample, list(given.values()), list(others.values()))


@NO_EXTENSION
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_both_backends(dtype, autocast):
    model = make("sd1", block_out_channels=(64, 128), attention_head_dim=2).cuda()
    given = {name: value.cuda() for name, value in inputs("sd1", 32, 32, batch=8).items()}
    truth = copy.deepcopy(tome.patch.diffusers(model)).double()
    exact = run(truth, {name: v.double() if v.is_floating_point() else v for name, v in given.items()})
    model = model.to(dtype)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    errors = []
    for name in ("cuda", "reference"):
        with tome.use_backend(name), torch.autocast("cuda", autocast, enabled=autocast is not None):
            out = run(model, given)
        assert out.dtype == (autocast or dtype)
        errors.append(float((out.double() - exact).square().mean().sqrt()))
    scale = float(exact.square().mean().sqrt())
    assert errors[0] <= 1.25 * errors[1] + 0.01 * scale, errors
