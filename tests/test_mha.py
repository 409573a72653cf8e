"""Models built on nn.MultiheadAttention: torchvision's, open_clip's, SWAG's."""

import copy
import pickle

import pytest
import torch
from backends import NO_EXTENSION
from mha_hosts import HOSTS, Swag, attention_of, blocks_of, by_hand, images, make
from stand_in import Halves
from torch import nn

import tome
from tome import backend, cost, ops

NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
every_host = pytest.mark.parametrize("host", HOSTS)
PLAIN = [host for host in HOSTS if host != "open_clip layer scale" and "custom" not in host]


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


def assert_close(ours, theirs, **tolerance):
    for mine, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(mine, other, **tolerance or {"rtol": 1e-4, "atol": 1e-5})


def assert_equal(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=0)


def patched(host, r=4, **kwargs):
    model = tome.patch.auto(make(host, **kwargs))
    model.r = r
    return model


@every_host
def test_the_outputs_of_the_unpatched_model(host):
    model = make(host)
    twin = tome.patch.auto(copy.deepcopy(model))
    x = images(model)
    with torch.no_grad():
        assert_equal(twin(x), model(x))
        twin.r = NOTHING
        assert_close(twin(x), model(x))
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(x)
            assert_close(twin(x), theirs, rtol=0.04, atol=0.04)
            assert [t.dtype for t in tensors(twin(x))] == [t.dtype for t in tensors(theirs)]
            assert tome.merged(twin, x).x.dtype is dtype_behind(model, x)


def dtype_behind(model, x):
    seen = []
    handle = blocks_of(model)[-1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model(x)
    handle.remove()
    return seen[0]


@every_host
def test_merging_is_what_the_hosts_own_modules_compute(host):
    model = tome.patch.auto(make(host))
    x, prefix = images(model), HOSTS[host][1]
    with torch.no_grad():
        expected = by_hand(model, x, 4, prefix)
        model.r = 4
        seen = []
        handle = blocks_of(model)[-1].register_forward_hook(lambda module, args, out: seen.append(out))
        if isinstance(model, Swag):
            with pytest.raises(tome.UnsupportedModelError, match=r"encoder.layers.3: it has hooks, which would see"):
                model(x)
            handle.remove()
            handle = model.encoder.ln.register_forward_pre_hook(lambda m, args: seen.append(args[0].transpose(0, 1)))
        model(x)
        handle.remove()
        tokens = tome.merged(model, x)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert model._tome_prefix()[0] == prefix
    assert cost.tokens(model) == model._tome_length() == 36 + prefix
    assert tokens.count() == 36 + prefix - 16
    assert torch.equal(tokens.size.sum(1), torch.full((2,), 36.0 + prefix))
    assert cost.flops(model, 4) < cost.flops(model)


@every_host
def test_unpatched_and_copied_and_saved(host):
    model = make(host)
    x = images(model)
    with torch.no_grad():
        twin = tome.patch.auto(copy.deepcopy(model), trace_source=True)
        twin.r = 4
        merged = twin(x)
        assert not torch.equal(tensors(merged)[0], tensors(model(x))[0])
        assert twin._tome_info["source"].sum() == 2 * (36 + HOSTS[host][1])
        others = [copy.deepcopy(twin)]
        if not isinstance(model, Swag):  # whose name was changed
            others.append(pickle.loads(pickle.dumps(twin)))
        for other in others:
            assert other.r == 4
            assert_equal(other(x), merged)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert_equal(tome.unpatch(twin)(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert not [key for m in twin.modules() for key in vars(m) if key.startswith("_tome")]


@every_host
def test_training(host):
    model = patched(host).train()
    checkpointed = copy.deepcopy(model)
    if hasattr(checkpointed, "set_grad_checkpointing"):
        checkpointed.set_grad_checkpointing()
    x = images(model)
    for each in (model, checkpointed):
        torch.manual_seed(3)
        sum(out.square().sum() for out in tensors(each(x))).backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), model.parameters(), strict=True):
        assert torch.isfinite(theirs.grad).all(), name
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_dropout_is_that_of_the_unpatched_model():
    """Which entries are dropped depends on how tensors lie, so all are."""
    model = make("torchvision", dropout=1.0).train()
    twin = tome.patch.torchvision(copy.deepcopy(model))
    twin.r = NOTHING
    x = images(model)
    assert_close(twin(x), model(x))
    assert not torch.allclose(twin.eval()(x), twin.train()(x), atol=1e-3)


def test_weights_of_attention_are_dropped_in_training():
    model = patched("torchvision", attention_dropout=0.5)
    x = images(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x), atol=1e-4)


@pytest.mark.parametrize("host", ["torchvision", "open_clip coca", "open_clip custom", "swag"])
def test_compiles_in_one_graph(host):
    model = patched(host)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), tome.use_backend("reference"):
        assert_close(compiled(images(model)), model(images(model)))


@every_host
@pytest.mark.parametrize("autocast", [False, True])
def test_each_half_is_one_call_where_its_parts_are_known(host, autocast, monkeypatch):
    model = patched(host)
    x = images(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        by_parts, slot = model(x), tome.merged(model, x).slot
        halves = Halves()
        monkeypatch.setattr(ops, "one_call", halves.one_call)
        tokens = tome.merged(model, x)
        assert halves.counts() == ((4, 4) if host in PLAIN else (0, 0))
        assert tokens.x.dtype is dtype_behind(tome.unpatch(copy.deepcopy(model)), x)
        assert torch.equal(tokens.slot, slot)
        assert_close(model(x), by_parts, **({"rtol": 0.02, "atol": 0.02} if autocast else {}))


@pytest.mark.parametrize("host", ["torchvision", "open_clip coca", "open_clip float32 norms"])
def test_norms_outside_of_their_modules_return_the_dtype_of_the_module(host, monkeypatch):
    """As on a GPU, where the norms before the first block's attention and behind the last one are kernels."""
    model = make(host)
    twin = tome.patch.auto(copy.deepcopy(model))
    twin.r = NOTHING
    x, norms = images(model), {name for name, m in model.named_modules() if "Norm" in type(m).__name__}
    kinds = []
    for each in (model, twin):
        seen = {}
        for name in norms - {n for n in norms if "encoder_layer" in n or "resblocks" in n}:
            each.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name, seen=seen: _see(seen, name, out)
            )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            each(x)
        kinds.append(seen)
        monkeypatch.setattr(backend, "takes_kernels", lambda tokens: True)
    assert kinds[0] == kinds[1]
    assert kinds[0]


def _see(seen, name, out):
    seen[name] = out.dtype


def test_a_longer_mlp_is_noticed(monkeypatch):
    model = patched("torchvision")
    x = images(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)
        expected.encoder.layers[2].mlp.append(nn.ReLU())
        expected = expected(x)
        monkeypatch.setattr(ops, "one_call", Halves().one_call)
        model(x)
        model.encoder.layers[2].mlp.append(nn.ReLU())
        assert_close(model(x), expected)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("part", ["attention", "ln_1", "mlp", "mlp.0", "ln_2"])
@pytest.mark.parametrize("host", ["torchvision", "swag gap", "open_clip", "open_clip custom"])
def test_watched_parts_are_called(host, part, how, prop_attn):
    model = tome.patch.auto(make(host), prop_attn=prop_attn)
    model.r = 4
    x, calls, block = images(model), [], blocks_of(model)[2]
    module = attention_of(block) if part == "attention" else block
    for step in () if part == "attention" else part.split("."):
        module = module[int(step)] if step.isdecimal() else getattr(module, step)
    with torch.no_grad():
        expected = model(x)
        if how == "hook":
            module.register_forward_hook(lambda *_: calls.append(part))
        else:
            real = module.forward
            module.forward = lambda *args, **kwargs: calls.append(part) or real(*args, **kwargs)
        assert_close(model(x), expected)
    assert len(calls) == 1


def test_a_mask_is_refused():
    model = patched("open_clip")
    with pytest.raises(tome.UnsupportedModelError, match=r"resblocks\.0: a patched block takes no attn_mask"):
        blocks_of(model)[0](torch.zeros(2, 37, 32), attn_mask=torch.zeros(37, 37))
    with pytest.raises(tome.UnsupportedModelError, match=r"resblocks\.0: a patched block takes no attn_mask"):
        blocks_of(model)[0](torch.zeros(2, 37, 32), torch.zeros(2, 37, 32))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 16, "vdim": 8}, "queries, keys and values of different widths"),
        ({"batch_first": False}, "batch_first=False"),
    ],
)
@pytest.mark.parametrize("host", ["torchvision", "open_clip"])
def test_other_kinds_of_attention_are_refused(host, kwargs, reason):
    model = make(host)
    name = "self_attention" if host == "torchvision" else "attn"
    setattr(blocks_of(model)[1], name, nn.MultiheadAttention(32, 2, **{"batch_first": True} | kwargs))
    refuse(model, rf"(resblocks\.|encoder_layer_)1\.{name}: nn.MultiheadAttention with {reason}.* is not supported")


class Renamed(nn.MultiheadAttention):
    pass


class MultiheadAttention(nn.MultiheadAttention):  # as peft's
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "extra", nn.Linear(2, 2)), r"has parts that are not understood: \['extra'\]"),
        (lambda block: setattr(block, "attn", Renamed(32, 2)), r"1\.attn: Renamed is not supported"),
        (
            lambda block: setattr(block, "attn", MultiheadAttention(32, 2)),
            r"1\.attn: test_mha\.Multi.* not torch's own",
        ),
        (lambda block: setattr(block.attn, "extra", nn.Linear(2, 2)), r"1\.attn: .* not understood: \['extra'\]"),
        (lambda block: setattr(block, "forward", None), r"1: its forward was replaced"),
    ],
)
def test_what_is_not_understood_is_named(change, reason):
    model = make("open_clip")
    change(blocks_of(model)[1])
    refuse(model, reason)


def refuse(model, reason):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(tome.UnsupportedModelError, match=reason):
        tome.patch.auto(model)
    assert [type(m) for m in model.modules()] == kinds


WIDE = {
    "torchvision": {"hidden_dim": 128},
    "open_clip": {"width": 128},
    "open_clip float32 norms": {"width": 128},
    "open_clip coca": {"width": 128},
    "open_clip custom": {"width": 128},
    "open_clip layer scale": {"width": 128},
    "swag": {"width": 128},
}


@NO_EXTENSION
@pytest.mark.parametrize("host", WIDE)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_the_kernels_give_what_the_reference_gives(host, dtype, autocast):
    """By the rounding of the dtype, where both choose the same pairs."""
    model = patched(host, 4, **WIDE[host]).cuda().to(dtype)
    if "float32 norms" in host:  # half weights there would fail in open_clip itself
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
    x = images(model, 16).cuda().to(dtype)
    out, slots = [], []
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        for name in ("cuda", "reference"):
            with tome.use_backend(name):
                slots.append(tome.merged(model, x).slot)
                out.append(model(x))
    same = (slots[0] == slots[1]).all(dim=1)
    assert same.float().mean() >= 0.5
    floor = 2.0 ** (-11 if torch.float16 in (dtype, autocast) else -8)
    for ours, theirs in zip(*map(tensors, out), strict=True):
        assert ours.dtype is theirs.dtype
        error = (ours - theirs)[same].float().square().mean().sqrt()
        assert error <= 8 * floor * theirs.float().abs().max()
