"""transformers' models: what a user of them sees of a patch."""

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from backends import NO_EXTENSION
from PIL import Image
from stand_in import Halves
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers_models import (
    HOSTS,
    REFUSED,
    SUPPORTED,
    images,
    inputs_of,
    make,
    make_refused,
    run,
)  # fmt: skip

import tome
import tome_reference
from tome import ops, recording
from tome.patch.transformers_refused import REFUSED as REFUSED_LAYERS
from tome.patch.transformers_vit import LAYERS, TOWERS

NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
FEW = {"num_hidden_layers": 2}
every_host = pytest.mark.parametrize("host", HOSTS)
every_supported = pytest.mark.parametrize("host", SUPPORTED)


def tensors(output):
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(map(torch.equal, tensors(ours), tensors(theirs)))


def tower_of(model):
    return next(m for m in model.modules() if type(m).__name__ in {n.rpartition(".")[2] for n in TOWERS})


def layers_of(model):
    return list(tower_of(model)._tome_blocks().values())


@every_supported
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_outputs_of_the_unpatched_model(host, attn):
    model = make(host, attn)
    twin = tome.patch.transformers(copy.deepcopy(model))
    with torch.no_grad():
        assert same(run(twin), run(model))
        twin.r = NOTHING
        for ours, theirs in zip(tensors(run(twin)), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def linear_layers(layer):
    """The host's own modules: q, k, v, the layer behind the heads, and what the MLP adds."""
    if type(layer).__name__ == "VideoMAELayer":
        inner, out = layer.attention.attention, layer.attention.output.dense
        return inner.query, inner.key, inner.value, out, lambda y: layer.output.dense(layer.intermediate(y))
    attn = getattr(layer, layer._tome_row.attn)
    return attn.q_proj, attn.k_proj, attn.v_proj, getattr(attn, "o_proj", getattr(attn, "out_proj", None)), layer.mlp


def turned(x, positions, home, prefix):
    """Queries or keys by DINOv3's formula, each patch at the row of the token in whose place it stands."""
    if positions is None:
        return x
    cos, sin = (torch.stack([table[h[prefix:] - prefix] for h in home])[:, None] for table in positions)
    first, second = x[:, :, prefix:].chunk(2, dim=-1)
    patches = x[:, :, prefix:] * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([x[:, :, :prefix], patches], dim=2)


def by_hand(model, r):
    """The last layer's tokens on the full grid and which are no padding, by the host's modules and log sizes."""
    prefix, seen = tower_of(model)._tome_prefix()[0], {}
    first = layers_of(model)[0]
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True
    )
    model.r = 0
    run(model)
    handle.remove()
    x, positions, steps = seen["x"], seen.get("position_embeddings"), []
    size = inputs_of(model).get("pixel_attention_mask", torch.ones(x.shape[:2])).float()
    home = torch.arange(x.shape[1]).expand(x.shape[:2])
    valid = size > 0
    for layer in layers_of(model):
        row = layer._tome_row
        norm1, norm2 = getattr(layer, row.norm1), getattr(layer, row.norm2)
        query, key, value, out, mlp = linear_layers(layer)
        y = norm1(x)
        q, k, v = (part(y).unflatten(2, (2, 16)).transpose(1, 2) for part in (query, key, value))
        turned_q, turned_k = (turned(each, positions, home, prefix) for each in (q, k))
        seen_by = scaled_dot_product_attention(turned_q, turned_k, v, size.log()[:, None, None])
        attended = out(seen_by.transpose(1, 2).flatten(2))
        x = x + (attended if row.scale1 is None else getattr(layer, row.scale1)(attended))
        slot = tome_reference.match(k.masked_fill(size[:, None, :, None] == 0, torch.nan), r, prefix)
        # Padding merges with nothing here: there are real pairs enough.
        x, merged_size = tome_reference.merge(x, slot, x.shape[1] - r, size.clamp(min=1))
        size = merged_size * merged_size.new_zeros(merged_size.shape).scatter(1, slot.long(), size).sign()
        places = torch.zeros_like(home[:, : x.shape[1]])
        for image, token in itertools.product(range(2), reversed(range(home.shape[1]))):
            places[image, slot[image, token]] = home[image, token]
        home = places
        steps.append(slot)
        added = mlp(norm2(x))
        x = x + (added if row.scale2 is None else getattr(layer, row.scale2)(added))
    return tome_reference.restore(x, None, steps), valid


@every_host
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_merging_is_what_the_hosts_own_modules_compute(host, attn):
    model = tome.patch.transformers(make(host, attn))
    with torch.no_grad():
        expected, valid = by_hand(model, 4)
        model.r = 4
        seen = []
        handle = layers_of(model)[-1].register_forward_hook(lambda module, args, out: seen.append(out))
        run(model)
        handle.remove()
        tokens = tome.merged(model, **inputs_of(model))
    torch.testing.assert_close(seen[0][valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert model._tome_info["r"] == [4] * 4
    assert tower_of(model)._tome_prefix()[0] == HOSTS[host].prefix
    assert tokens.count() == expected.shape[1] - 16
    torch.testing.assert_close(tokens.size.sum(1), valid.sum(1).float(), rtol=0, atol=1e-5)


@every_host
def test_hidden_states_are_on_the_grid(host):
    model = make(host)
    twin = tome.patch.transformers(copy.deepcopy(model))
    with torch.no_grad():
        theirs = run(model, output_hidden_states=True).hidden_states
        for r in (0, 3):
            twin.r = r
            ours = run(twin, output_hidden_states=True).hidden_states
            assert [type(h) for h in ours] == [torch.Tensor] * len(theirs)
            assert [h.shape for h in ours] == [h.shape for h in theirs]
            assert r or all(map(torch.equal, ours, theirs))
        assert torch.equal(ours[0], theirs[0])
        before = tensors(run(twin))
        run(twin, output_hidden_states=True)
        assert all(map(torch.equal, tensors(run(twin)), before))


@every_host
def test_attentions_are_those_of_the_merged_tokens(host):
    model = tome.patch.transformers(make(host, "eager"))
    model.r = 4
    with torch.no_grad():
        expected = tensors(run(model))
        output = run(model, output_attentions=True)
    counts = [a.shape[-1] for a in output.attentions]
    assert counts == [counts[0] - 4 * i for i in range(4)]
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    for ours, theirs in zip(tensors(output)[: len(expected)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_host
def test_unpatched_and_copied_and_saved(host, tmp_path):
    model = make(host)
    with torch.no_grad():
        expected = run(model)
        twin = tome.patch.auto(copy.deepcopy(model))
        twin.r = 4
        merged = run(twin)
        for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert other.r == 4
            assert same(run(other), merged)
        twin.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert loaded.config.architectures == [type(model).__name__]
        assert same(run(loaded), expected)
        assert same(run(tome.unpatch(twin)), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert not [key for m in twin.modules() for key in vars(m) if key.startswith("_tome")]


@pytest.mark.parametrize("host", ["vit", "dinov2 registers", "clip gelu", "dinov3", "siglip2 mean", "videomae decoder"])
def test_training_and_checkpoints(host):
    model = tome.patch.transformers(make(host)).train()
    model.r = 4
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        tensors(run(model))[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 40
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_refused():
    model = tome.patch.transformers(make("vit")).train()
    model.r = 4
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(**{next(iter(inspect.signature(enable).parameters)): {"use_reentrant": True}})
    with pytest.raises(tome.UnsupportedModelError, match=r"layers.1: merged tokens cannot enter or leave a reentrant"):
        run(model)


@pytest.mark.parametrize("host", ["vit", "dinov3", "siglip2", "videomae"])
def test_compiles_in_one_graph(host):
    if host == "siglip2" and torch.__version__ < "2.12":
        pytest.skip(f"torch {torch.__version__} cannot compile SigLIP 2's embedding in one graph")
    model = tome.patch.transformers(make(host, **FEW))
    model.r = 4
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), tome.use_backend("reference"):
        for ours, theirs in zip(tensors(run(compiled)), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", ["vit", "clip", "dinov3"])
def test_exports(host):
    model = tome.patch.transformers(make(host, **FEW))
    model.r = 4
    with torch.no_grad(), tome.use_backend("reference"):
        program = torch.export.export(model, (), inputs_of(model))
        for ours, theirs in zip(tensors(program.module()(**inputs_of(model))), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize(
    ("host", "part"),
    [
        *(("vit", part) for part in ("attention", "attention.q_proj", "attention.o_proj", "mlp", "mlp.fc1", "dropout")),
        *(("dinov3", part) for part in ("attention", "attention.k_proj", "layer_scale1", "mlp", "mlp.up_proj")),
        *(("siglip2 mean", part) for part in ("self_attn", "self_attn.k_proj", "mlp")),
        *(("videomae", part) for part in ("attention", "attention.attention", "attention.attention.key")),
        *(("videomae", part) for part in ("attention.output", "attention.output.dropout", "intermediate")),
        *(("videomae", part) for part in ("intermediate.dense", "output.dense", "output.dropout")),
    ],
)
def test_watched_parts_are_called(host, part, how):
    model = tome.patch.transformers(make(host))
    model.r = 4
    with torch.no_grad():
        expected = run(model)[0]
        module, calls = layers_of(model)[1].get_submodule(part), []
        if how == "hook":
            module.register_forward_hook(lambda *_: calls.append(part))
        else:
            real = module.forward
            module.forward = lambda *args, **kwargs: calls.append(part) or real(*args, **kwargs)
        torch.testing.assert_close(run(model)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if part == "dropout" else 1)


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_part_that_adds_its_input_itself_cannot_be_watched(how):
    model = tome.patch.transformers(make("videomae"))
    output = layers_of(model)[1].output
    if how == "hook":
        output.register_forward_hook(lambda *_: None)
    else:
        output.forward = output.forward
    with torch.no_grad():
        run(model)
        model.r = 4
        with pytest.raises(tome.patch.UnsupportedModelError, match=r"layer\.1: output is watched, and adds its input"):
            run(model)


@every_host
def test_each_half_is_one_call_where_its_parts_are_known(host, monkeypatch):
    model = tome.patch.transformers(make(host, **({"drop_path_rate": 0.1} if host.startswith("dino") else {})))
    model.r = 4
    with torch.no_grad():
        by_parts = tensors(run(model))
        halves = Halves()
        monkeypatch.setattr(ops, "one_call", halves.one_call)
        for ours, theirs in zip(tensors(run(model)), by_parts, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert halves.counts() == (4, 0 if "swiglu" in host else 4)


@pytest.mark.parametrize(("host", "op"), [("clip", "quick_gelu"), ("dinov2 swiglu", "swiglu")])
def test_activations_of_several_passes_are_operations(host, op):
    model = tome.patch.transformers(make(host))
    model.r = 4
    called = tensors(run(model))
    with torch.no_grad(), recording.recorded() as calls:
        found = tensors(run(model))
    assert [call.op for call in calls].count(op) == 4
    assert all(map(torch.equal, found, called))
    mlp = layers_of(model)[1].mlp
    (mlp.activation_fn if host == "clip" else mlp.act_fn).register_forward_hook(lambda *_: None)
    with torch.no_grad(), recording.recorded() as calls:
        assert all(map(torch.equal, tensors(run(model)), called))
    assert [call.op for call in calls].count(op) == 3


@pytest.mark.parametrize("host", ["clip pair", "siglip pair", "siglip2 pair"])
def test_of_two_towers_the_vision_tower_is_patched(host):
    model = make(host)
    inputs = inputs_of(model)
    if host == "clip pair":
        inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        before, after = model(**inputs), twin(**inputs)
        assert torch.equal(after.logits_per_image, before.logits_per_image)
        twin.r = 4
        after = twin(**inputs)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.equal(after.image_embeds, before.image_embeds)
    assert twin.r == 4
    assert twin._tome_info["size"].shape == (2, tome.merged(twin, **inputs).count(), 1)


@pytest.mark.parametrize("host", ["timm", "timm classifier"])
def test_a_timm_model_in_transformers_clothes(host):
    model = make(host)
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        before, after = (run(each, output_hidden_states=True) for each in (model, twin))
        assert same(after, before)
        assert all(map(torch.equal, after.hidden_states, before.hidden_states))
        twin.r = 4
        after = run(twin, output_hidden_states=True)
    assert [h.shape for h in after.hidden_states] == [h.shape for h in before.hidden_states]
    assert not torch.equal(after[0], before[0])
    assert tome.merged(twin, **images()).count() == 37 - 16
    assert same(run(tome.unpatch(twin)), run(model))


@pytest.mark.parametrize("host", ["dinov2 grids", "dinov2 registers grids", "dinov3 grids"])
def test_a_backbone_gives_grids(host):
    model = make(host)
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        assert all(map(torch.equal, run(twin).feature_maps, run(model).feature_maps))
        twin.r = 4
        assert [m.shape for m in run(twin).feature_maps] == [(2, 32, 6, 6)] * 2


def test_a_language_model_gets_a_token_for_each_placeholder():
    model = make("llava")
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        expected = run(model).logits
        assert torch.equal(run(twin).logits, expected)
        twin.r = 4
        assert run(twin).logits.shape == expected.shape
        assert tome.merged(twin, **inputs_of(twin)).count() == 37 - 16


def test_padding_is_refused():
    model = tome.patch.transformers(make("vit"))
    model.r = 4
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, 20:] = False
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"layers\.0: a patched block takes no attn_mask"):
        run(model, attention_mask=mask)
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"layers\.1: a patched block takes no attn_mask"):
        layers_of(model)[1](torch.randn(2, 37, 32), object())  # what flex_attention takes for a mask
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"layers\.0: a patched block takes no position_ids"):
        run(model, position_ids=torch.arange(37))


def alone(inputs, image):
    """One image of a padded batch, without its padding."""
    count = int(inputs["pixel_attention_mask"][image].sum())
    return {
        "pixel_values": inputs["pixel_values"][image : image + 1, :count],
        "pixel_attention_mask": None,
        "spatial_shapes": inputs["spatial_shapes"][image : image + 1],
    }


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("host", ["siglip2", "siglip2 mean"])  # 32 padded tokens: real ones alternate as without them
@pytest.mark.parametrize("r", [0, NOTHING, [6, 0, 3, 2], 4, [0, 8, 0, 0]], ids=str)
def test_each_image_of_a_padded_batch_is_as_it_is_alone(host, attn, r):
    model = tome.patch.transformers(make(host, attn))
    inputs = inputs_of(model)
    model.r = r
    with torch.no_grad():
        batch = run(model)[-1]
        for image in range(2):
            torch.testing.assert_close(model(**alone(inputs, image))[-1][0], batch[image], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**inputs)[-1], batch)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [NOTHING, 4, 16])  # 16: more than there are real pairs, so that padding merges too
def test_what_stands_in_the_padding_is_not_seen(prop_attn, r):
    model = tome.patch.transformers(make("siglip2 mean"), prop_attn=prop_attn)
    model.r = r
    inputs = inputs_of(model)
    other = copy.deepcopy(inputs)
    other["pixel_values"][1, 32:] = 30 * torch.randn(32, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(**other).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
        other["pixel_values"][1, 31] += 1
        assert not torch.allclose(model(**other).logits, model(**inputs).logits, rtol=1e-3, atol=1e-4)


def test_a_mask_that_tells_queries_apart_is_refused():
    model = tome.patch.transformers(make("siglip2 mean"))
    inputs = inputs_of(model)
    inputs["pixel_attention_mask"] = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    model.r = 4
    for call in (lambda: tower_of(model)(**inputs), lambda: tower_of(model)(*inputs.values())):
        with pytest.raises(tome.patch.UnsupportedModelError, match=r"mask of padding \[B, N\] only"):
            call()
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"layers\.0: the Tensor is no mask \[B, 1, N, N\]"):
        layers_of(model)[0](torch.randn(2, 64, 32), torch.ones(2, 64))


def test_decoders_of_the_same_layers_stay_as_they_are():
    for host, decoder in (("videomae decoder", "decoder"), ("mae decoder", "decoder")):
        model = make(host)
        kinds = [type(m) for m in getattr(model, decoder).modules()]
        tome.patch.transformers(model)
        assert [type(m) for m in getattr(model, decoder).modules()] == kinds


@pytest.mark.parametrize("host", ["vit", "videomae", "dinov3", "clip gelu"])
def test_recorders_sleep_until_they_are_asked(host, monkeypatch):
    model, calls = tome.patch.transformers(make(host, "eager")), []
    model.r = 4

    def one_call(half, *args):
        compute = getattr(tome_reference, half)
        return lambda *args: calls.append(half) or compute(*args)

    def counts():
        counted = calls.count("attend_half"), calls.count("mlp_half")
        calls.clear()
        return counted

    monkeypatch.setattr(ops, "one_call", one_call)
    with torch.no_grad():
        expected = run(model)
        assert counts() == (4, 3)  # the last MLP is computed with its addition while the grid is restored
        run(model, output_hidden_states=True)  # watches the layers, which hand on no additions
        assert counts() == (4, 0)
        assert len(run(model, output_attentions=True).attentions) == 4
        assert counts() == (0, 3)
        assert same(run(model), expected)
        assert counts() == (4, 3)
        seen = []
        layers_of(model)[1].register_forward_hook(lambda *_: seen.append(1))
        run(model)
        assert counts() == (4, 2)
    assert len(seen) == 1


def neighbours(keys, r, prefix):
    """The first r tokens at odd places behind the prefix each go into the one before: the same on every backend."""
    order = torch.arange(keys.shape[-2], device=keys.device) - prefix
    merged = (order > 0) & (order % 2 == 1) & (order < 2 * r)
    return ((~merged).cumsum(0) - 1).int().expand(keys.shape[0], -1).contiguous()


@NO_EXTENSION
@pytest.mark.parametrize("host", ["vit", "clip", "dinov3", "siglip2 mean", "videomae"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_on_both_backends(host, autocast, dtype):
    model = tome.patch.transformers(make(host), matching=neighbours).cuda().to(torch.float32 if autocast else dtype)
    model.r = 4
    inputs = {name: value.cuda() for name, value in inputs_of(model).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    outputs = []
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=autocast):
        for backend in ("reference", "cuda"):
            with tome.use_backend(backend):
                outputs.append(tensors(model(**inputs))[-1].float())
    scale = outputs[0].abs().max().item()
    torch.testing.assert_close(*outputs, rtol=0, atol=(0.01 if dtype is torch.float16 else 0.06) * scale)


class Shapes(torch.utils.data.Dataset):
    """Images of one brightness for each label."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        noise = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + index % 2, "labels": index % 2}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_fine_tunes_and_saves_and_loads(checkpointing, tmp_path):
    model = tome.patch.auto(make("vit", num_labels=2))
    model.r = 4
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = [p.clone() for p in model.parameters()]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[],
        save_steps=2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Shapes(), eval_dataset=Shapes())
    trainer.train()
    assert all(entry["loss"] < 10 for entry in trainer.state.log_history if "loss" in entry)
    assert not any(map(torch.equal, before, model.parameters()))
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded) is transformers.ViTForImageClassification
    tome.patch.auto(loaded).r = 4
    with torch.no_grad():
        assert torch.equal(run(loaded).logits, run(model.eval()).logits)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_pipeline():
    model = make("vit", num_labels=3)
    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    tome.patch.auto(model).r = 4
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    result = classify(Image.new("RGB", (60, 50), (10, 200, 30)))
    assert len(result) == 3
    assert sum(each["score"] for each in result) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("host", ["clip pair", "siglip pair"])
def test_pipeline_without_training(host):
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "<unk>", "a", "photo", "cat", "dog", "</s>"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 7)])
    size = {"height": 48, "width": 48}
    model = make(host)
    classify = transformers.pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=8
        ),
        image_processor=transformers.SiglipImageProcessor(size=size),
        device="cpu",
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8))
    results = []
    with torch.no_grad():
        for r in (None, 0, 4):
            if r is not None:
                tome.patch.auto(model).r = r
            results.append(classify(image, candidate_labels=["cat", "dog"], hypothesis_template="a photo {}"))
    assert results[0] == results[1]
    assert results[2] != results[0]
    for before, after in zip(results[0], sorted(results[2], key=lambda result: -result["score"]), strict=True):
        assert after["score"] == pytest.approx(before["score"], abs=0.2)


class Renamed(nn.Module):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: setattr(m.vit.layers[1], "extra", nn.Linear(2, 2)),
            r"layers\.1: ViTLayer has the parts \['attention'",
        ),
        (lambda m: setattr(m.vit.layers[2], "attention", Renamed()), r"layers\.2\.attention: Renamed is not supported"),
        (
            lambda m: setattr(m.vit.layers[0].attention, "q_norm", nn.Identity()),
            r"layers\.0\.attention: ViTAttention has",
        ),
        (lambda m: m.vit.layers.__setitem__(3, nn.Identity()), r"layers\.3: Identity is not supported"),
        (lambda m: setattr(m.vit.layers[3], "forward", None), r"layers\.3: its forward was replaced"),
    ],
)
def test_what_is_not_understood_is_named(change, reason):
    model = make("vit")
    change(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(tome.patch.UnsupportedModelError, match=reason):
        tome.patch.auto(model)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("part", ["attention.attention", "attention.output", "intermediate", "output"])
def test_parts_of_parts_that_are_not_understood_are_named(part):
    model = make("videomae")
    parent, _, name = part.rpartition(".")
    setattr(tower_of(model).encoder.layer[2].get_submodule(parent), name, Renamed())
    with pytest.raises(tome.patch.UnsupportedModelError, match=rf"layer\.2\.{part}: Renamed is not supported"):
        tome.patch.auto(model)


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_known_tower_are_refused_for_a_reason(name):
    model, reason = make_refused(name)
    with pytest.raises(tome.patch.UnsupportedModelError, match=reason):
        tome.patch.auto(model)
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_tome")]


def test_models_of_no_known_library_are_refused():
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"Linear comes from none of timm, transformers"):
        tome.patch.auto(nn.Linear(2, 2))


def test_every_layer_and_tower_is_one_of_transformers():
    for name in (*LAYERS, *TOWERS, *REFUSED_LAYERS):
        module, _, kind = name.rpartition(".")
        assert hasattr(__import__(f"transformers.models.{module}", fromlist=[kind]), kind)
