"""transformers' models: what a user of them sees of a patch."""

import copy
import pickle

import pytest
import torch
import transformers
from PIL import Image
from stand_in import Halves
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tome
import tome_reference
from tome import ops, recording
from tome.patch.transformers_vit import LAYERS, TOWERS

SMALL = {"image_size": 48, "patch_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32}
WIDE = SMALL | {"intermediate_size": 64}
TEXT = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
REGISTERS = SMALL | {"num_register_tokens": 3, "layerscale_value": 0.5}
NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge

# name -> (class, configuration, protected tokens)
HOSTS = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**WIDE), 1),
    "deit": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig(**WIDE), 2),
    "ijepa": (transformers.IJepaForImageClassification, transformers.IJepaConfig(**WIDE), 0),
    "dinov2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config(**SMALL, layerscale_value=0.5), 1),
    "dinov2 swiglu": (transformers.Dinov2Model, transformers.Dinov2Config(**SMALL, use_swiglu_ffn=True), 1),
    "dinov2 registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig(**REGISTERS),
        4,
    ),
    "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**WIDE, projection_dim=16), 1),
    "clip gelu": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**WIDE, hidden_act="gelu"), 1),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**WIDE), 0),
    "mae": (transformers.ViTMAEModel, transformers.ViTMAEConfig(**WIDE, mask_ratio=0.25), 1),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def make(host, attn="sdpa", **changed):
    kind, config, _ = HOSTS[host]
    config = copy.deepcopy(config)
    config.update(changed)
    config._attn_implementation = attn
    return shaken(kind(config))


def shaken(model):
    """In eval mode, with weights that make its tokens differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def run(model, **kwargs):
    if isinstance(model, transformers.ViTMAEModel):  # which patches are hidden is drawn
        kwargs["noise"] = torch.rand(2, 36, generator=torch.Generator().manual_seed(3))
    return model(pixel_values=images(), **kwargs)


def tensors(output):
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(map(torch.equal, tensors(ours), tensors(theirs)))


def tower_of(model):
    return next(m for m in model.modules() if type(m).__name__ in {n.rpartition(".")[2] for n in TOWERS})


def layers_of(model):
    return list(tower_of(model)._tome_blocks().values())


@every_host
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_outputs_of_the_unpatched_model(host, attn):
    model = make(host, attn)
    twin = tome.patch.transformers(copy.deepcopy(model))
    with torch.no_grad():
        assert same(run(twin), run(model))
        twin.r = NOTHING
        for ours, theirs in zip(tensors(run(twin)), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def by_hand(model, r):
    """The last layer's tokens on the full grid, by the host's own modules and a mask of log sizes."""
    prefix, seen = tower_of(model)._tome_prefix()[0], {}
    first = layers_of(model)[0]
    handle = first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model.r = 0
    run(model)
    handle.remove()
    x, size, steps = seen["x"], None, []
    for layer in layers_of(model):
        row = layer._tome_row
        attn, norm1, norm2 = (getattr(layer, name) for name in (row.attn, row.norm1, row.norm2))
        y = norm1(x)
        q, k, v = (part(y).unflatten(2, (2, 16)).transpose(1, 2) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        mask = None if size is None else size.log()[:, None, None]
        out = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        out = (attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj)(out)
        x = x + (out if row.scale1 is None else getattr(layer, row.scale1)(out))
        slot = tome_reference.match(k, r, prefix)
        x, size = tome_reference.merge(x, slot, x.shape[1] - r, size)
        steps.append(slot)
        out = layer.mlp(norm2(x))
        x = x + (out if row.scale2 is None else getattr(layer, row.scale2)(out))
    return tome_reference.restore(x, None, steps)


@every_host
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_merging_is_what_the_hosts_own_modules_compute(host, attn):
    model = tome.patch.transformers(make(host, attn))
    with torch.no_grad():
        expected = by_hand(model, 4)
        model.r = 4
        seen = []
        handle = layers_of(model)[-1].register_forward_hook(lambda module, args, out: seen.append(out))
        run(model)
        handle.remove()
        tokens = tome.merged(model, pixel_values=images())
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert model._tome_info["r"] == [4] * 4
    assert tower_of(model)._tome_prefix()[0] == HOSTS[host][2]
    if host != "mae":
        assert tokens.count() == 36 + HOSTS[host][2] - 16
    assert torch.equal(tokens.size.sum(1), torch.full((2,), float(seen[0].shape[1])))


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


@pytest.mark.parametrize("host", ["vit", "dinov2 registers", "clip gelu"])
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


@pytest.mark.parametrize("host", ["vit", "dinov2", "siglip"])
def test_compiles_in_one_graph(host):
    model = tome.patch.transformers(make(host))
    model.r = 4
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), tome.use_backend("reference"):
        for ours, theirs in zip(tensors(run(compiled)), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", ["vit", "dinov2", "clip"])
def test_exports(host):
    model = tome.patch.transformers(make(host))
    model.r = 4
    with torch.no_grad(), tome.use_backend("reference"):
        program = torch.export.export(model, (), {"pixel_values": images()})
        for ours, theirs in zip(tensors(program.module()(pixel_values=images())), tensors(run(model)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("part", ["attention", "attention.q_proj", "attention.o_proj", "mlp", "mlp.fc1", "dropout"])
def test_watched_parts_are_called(part, how):
    model = tome.patch.transformers(make("vit"))
    model.r = 4
    with torch.no_grad():
        expected = run(model).logits
        module, calls = layers_of(model)[1].get_submodule(part), []
        if how == "hook":
            module.register_forward_hook(lambda *_: calls.append(part))
        else:
            real = module.forward
            module.forward = lambda *args, **kwargs: calls.append(part) or real(*args, **kwargs)
        torch.testing.assert_close(run(model).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if part == "dropout" else 1)


@every_host
def test_each_half_is_one_call_where_its_parts_are_known(host, monkeypatch):
    model = tome.patch.transformers(make(host, drop_path_rate=0.1))
    model.r = 4
    with torch.no_grad():
        by_parts = tensors(run(model))
        halves = Halves()
        monkeypatch.setattr(ops, "one_call", halves.one_call)
        for ours, theirs in zip(tensors(run(model)), by_parts, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert halves.counts() == (4, 0 if host == "dinov2 swiglu" else 4)


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


def pair(kind, config, text, vision):
    return shaken(kind(config(text_config=TEXT | text, vision_config=WIDE | vision)))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.CLIPModel, transformers.CLIPConfig),
        (transformers.SiglipModel, transformers.SiglipConfig),
    ],
)
def test_of_two_towers_the_vision_tower_is_patched(kind, config):
    model = pair(kind, config, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, {})
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 2], [1, 7, 2, 0]]), "pixel_values": images()}
    if kind is transformers.CLIPModel:
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


@pytest.mark.parametrize("kind", [transformers.TimmWrapperModel, transformers.TimmWrapperForImageClassification])
def test_a_timm_model_in_transformers_clothes(kind):
    args = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=args)
    model = shaken(kind(config))
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        before, after = (each(images(), output_hidden_states=True) for each in (model, twin))
        assert same(after, before)
        assert all(map(torch.equal, after.hidden_states, before.hidden_states))
        twin.r = 4
        after = twin(images(), output_hidden_states=True)
    assert [h.shape for h in after.hidden_states] == [h.shape for h in before.hidden_states]
    assert not torch.equal(after[0], before[0])
    assert tome.merged(twin, images()).count() == 37 - 16
    assert same(tome.unpatch(twin)(images()), model(images()))


def test_a_backbone_gives_grids():
    config = transformers.Dinov2Config(**SMALL, out_indices=[2, 4])
    model = shaken(transformers.Dinov2Backbone(config))
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        assert all(map(torch.equal, twin(images()).feature_maps, model(images()).feature_maps))
        twin.r = 4
        assert [m.shape for m in twin(images()).feature_maps] == [(2, 32, 6, 6)] * 2


def test_a_language_model_gets_a_token_for_each_placeholder():
    text = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64} | TEXT
    vision = {"model_type": "clip_vision_model"} | WIDE
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=49, image_seq_length=36, vision_feature_layer=-2
    )
    model = shaken(transformers.LlavaForConditionalGeneration(config))
    ids = torch.tensor([[1, *[49] * 36, 5, 6]] * 2)
    twin = tome.patch.auto(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images()).logits
        assert torch.equal(twin(input_ids=ids, pixel_values=images()).logits, expected)
        twin.r = 4
        assert twin(input_ids=ids, pixel_values=images()).logits.shape == expected.shape


def test_padding_is_refused():
    model = tome.patch.transformers(make("vit"))
    model.r = 4
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, 20:] = False
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"layers\.0: a patched block takes no attn_mask"):
        run(model, attention_mask=mask)


def test_pipeline():
    model = make("vit", num_labels=3)
    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    tome.patch.auto(model).r = 4
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    result = classify(Image.new("RGB", (60, 50), (10, 200, 30)))
    assert len(result) == 3
    assert sum(each["score"] for each in result) == pytest.approx(1, abs=1e-3)


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


def test_models_without_a_known_tower_are_refused():
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1])
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"SwinModel must hold one of CLIPVisionModel.*found 0"):
        tome.patch.auto(transformers.SwinModel(config))
    with pytest.raises(tome.patch.UnsupportedModelError, match=r"Linear comes from none of timm, transformers"):
        tome.patch.auto(nn.Linear(2, 2))


def test_every_layer_and_tower_is_one_of_transformers():
    for name in (*LAYERS, *TOWERS):
        module, _, kind = name.rpartition(".")
        assert hasattr(__import__(f"transformers.models.{module}", fromlist=[kind]), kind)
