"""The halves of a block as one call each give the bits of their parts, and are taken only where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from backends import NO_EXTENSION
from models import HOSTS, WIDE, images, make
from stand_in import Halves
from timm.layers import GluMlp, SwiGLU
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import tome
from tome import ops, recording, report
from tome.patch import block

# Which halves of which hosts have other parts than one call knows.
OTHER_ATTENTION = {"scale norm", "res-post-norm"}
OTHER_MLP = {"scale norm", "res-post-norm", "swiglu"}
every_host = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture
def remembered(monkeypatch):
    """Let the CPU take the one calls."""
    halves = Halves()
    monkeypatch.setattr(ops, "one_call", halves.one_call)
    return halves


@pytest.fixture
def stand_in(remembered, monkeypatch):
    """The same, asked for in every pass."""
    monkeypatch.setattr(block, "is_recording", lambda: True)
    return remembered


def patched(host, r=4, **kwargs):
    model = tome.patch.timm(make(host, **kwargs))
    model.r = r
    return model


def expected(host, r, on_a_gpu=False):
    """How many of the four blocks take each half as one call: on a CPU not those before the first merge."""
    blocks = 4 - (isinstance(r, list) and not on_a_gpu)
    return blocks * (host not in OTHER_ATTENTION), blocks * (host not in OTHER_MLP)


def by_parts(model, x):
    """The result of calling the parts one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "one_call", lambda half, *args: None)
        patch.setattr(block, "is_recording", lambda: True)  # nothing is remembered
        return model(x)


@pytest.mark.parametrize("r", [4, (8, -1.0), [0, 3, 0, 5], 0.2], ids=str)
@every_host
def test_the_bits_of_its_parts(host, r, stand_in):
    model = patched(host, r)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(images()), by_parts(model, images()))
        assert stand_in.counts() == expected(host, r)


@pytest.mark.parametrize("host", ["plain", "deit3 layer scale", "siglip gap", "q/k norm"])
def test_the_bits_of_its_parts_under_autocast(host, stand_in):
    model = patched(host)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images()), by_parts(model, images()))
    assert stand_in.counts() == (4, 4)


def test_sizes_that_do_not_weigh_attention_are_summed(stand_in):
    model = tome.patch.timm(make("mae avg"), prop_attn=False)
    model.r = 4
    with torch.no_grad():
        assert torch.equal(model(images()), by_parts(model, images()))
    assert stand_in.counts() == (4, 4)


def test_what_is_known_of_a_kind_of_tokens_is_not_asked_again(remembered):
    model = patched("plain")
    with torch.no_grad():
        first = model(images())
        assert remembered.counts() == (4, 4)
        assert torch.equal(model(images()), first)
        assert remembered.counts() == (0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            model(images())
        assert remembered.counts() == (4, 4)
        with tome.use_backend("reference"):
            model(images())
        assert remembered.counts() == (4, 4)
        with recording.recorded():  # the report is told
            model(images())
        assert remembered.counts() == (4, 4)
        model.blocks[1].mlp.fc1.bias = nn.Parameter(model.blocks[1].mlp.fc1.bias + 1)
        changed = model(images())
        assert remembered.counts() == (1, 1)
        assert torch.equal(changed, by_parts(model, images()))
        assert not torch.equal(changed, first)


def neighbours(keys, r, prefix):
    """Merge the first r pairs of neighbours behind the prefix."""
    batch, _, n, _ = keys.shape
    position = torch.arange(n, device=keys.device)
    pairs = (position - prefix).clamp(0, 2 * r)
    return (position - (pairs + 1) // 2).to(torch.int32).expand(batch, n).contiguous()


@pytest.mark.parametrize("matching", ["bipartite", "kth", "random", neighbours])
def test_every_matching_takes_the_one_calls(matching, stand_in):
    model = tome.patch.timm(make("plain"), matching=matching)
    model.r = [2, 0, 3]
    results = []
    for run in (model, lambda x: by_parts(model, x)):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(run(images()))
    assert torch.equal(*results)
    assert stand_in.counts() == (4, 4)
    left = tome.merged(model, images()).count()
    assert left == {"kth": 1 + 36 // 2 // 3}.get(matching, 37 - 5)


def kth(keys, r, prefix):
    return neighbours(keys, r, prefix)


def bipartite(keys, r, prefix):
    return neighbours(keys, r, prefix)


@pytest.mark.parametrize("matching", [kth, bipartite])
def test_the_name_of_a_function_means_nothing(matching, stand_in):
    model = tome.patch.timm(make("plain"), matching=matching)
    model.r = 3
    with torch.no_grad():
        assert torch.equal(model(images()), by_parts(model, images()))
        slot = tome.merged(model, images()).slot
    steps = [neighbours(torch.empty(2, 1, 37 - 3 * i, 1), 3, 1) for i in range(4)]
    assert torch.equal(slot, ops.follow(steps))


def test_a_matching_that_is_none_is_refused():
    with pytest.raises(ValueError, match="unknown matching 'nearest'; choose one of bipartite, kth, random, or pass"):
        tome.patch.timm(make("plain"), matching="nearest")
    with pytest.raises(TypeError, match=r"a function \(keys, r, prefix\) -> slot, got 3"):
        tome.patch.timm(make("plain"), matching=3)
    model = tome.patch.timm(make("plain"), matching=lambda keys, r, prefix: keys)
    model.r = 2
    with pytest.raises(ValueError, match="slot must be"):
        model(images())


PARTS = [name for name, _ in make("deit3 layer scale").blocks[1].named_modules() if name]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_watched_part_is_called(part, how, stand_in):
    model, seen = patched("deit3 layer scale"), []
    with torch.no_grad():
        unwatched = model(images())
    stand_in.taken.clear()
    module = model.blocks[1].get_submodule(part)
    if how == "hook":
        module.register_forward_hook(lambda module, args, out: seen.append(part))
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: seen.append(part))
    else:
        real = module.forward
        module.forward = lambda *args, **kwargs: seen.append(part) or real(*args, **kwargs)
    with torch.no_grad():
        watched = model(images())
    torch.testing.assert_close(watched, unwatched, rtol=1e-5, atol=1e-5)
    called = seen.count(part)
    # attn_drop is no part of fused attention; a forward of one's own gives the keys too where attention is called.
    assert called == (0 if part == "attn.attn_drop" else 1), called
    # What stands before attention is called by itself; the rest is still one call.
    before = part in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm")
    assert min(stand_in.counts()) == (4 if before else 3)


def replace_linear(block):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block.attn.qkv.__class__ = Adapted


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.mlp.fc2)


def train_one(block):
    block.drop_path1 = nn.Dropout(0.5).train()


def replace_activation(block):
    block.mlp.act = nn.SiLU()


def drop_weights(block):
    block.attn.attn_drop.p = 0.5
    block.attn.training = True


def change_eps(block):
    block.norm2.eps = 0.5


def make_sparse(block):
    weight = block.mlp.fc2.weight
    block.mlp.fc2.weight = nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False)


def change_gelu(block):
    block.mlp.act.approximate = "tanh"


READ = (replace_linear, change_eps, change_gelu)  # what is called instead of read, if at all, stands before attention


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")  # torch's own
@pytest.mark.parametrize("change", [*READ, parametrize, make_sparse, replace_activation, train_one, drop_weights])
def test_a_part_that_has_changed_is_read_again_or_called(change, stand_in):
    model = patched("plain")
    with torch.no_grad():
        before = model(images())
        stand_in.taken.clear()
        change(model.blocks[1])
        torch.manual_seed(0)
        whole = model(images())
        torch.manual_seed(0)
        assert torch.equal(whole, by_parts(model, images()))
        assert change in (parametrize, make_sparse) or not torch.equal(whole, before)
    assert min(stand_in.counts()) == (4 if change in READ else 3)


def replica(model):
    """A copy as DataParallel makes it: its parameters are plain tensors, and attributes only."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter.detach())
    return copies[model]


@pytest.mark.parametrize("host", ["plain", "deit3 layer scale"])
def test_a_replica_goes_part_by_part(host, stand_in):
    model = patched(host)
    with torch.no_grad():
        expected = model(images())  # reads what the blocks compute with
        assert stand_in.counts() == (4, 4)
        assert torch.equal(replica(model)(images()), expected)
    assert stand_in.counts() == (0, 0)


def test_nobody_who_looks_at_operations_misses_one(stand_in):
    model, x = patched("plain"), images()
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            model(x)
        with FlopCounterMode(display=False) as expected:
            by_parts(model, x)
        assert flops.get_total_flops() == expected.get_total_flops() > 0
        with torch.device("cpu"):  # which sees every function
            model(x)
        seen = []
        handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
        model(x)
        handle.remove()
        assert nn.GELU in seen
    assert stand_in.counts() == (0, 0)
    assert torch.func.grad(lambda x: model(x).sum())(x).shape == x.shape
    assert stand_in.counts() == (0, 0)


def test_the_report_says_what_is_one_call_or_why_not():
    model = patched("deit3 layer scale")
    model.blocks[1].norm2.register_forward_hook(lambda *args: None)
    model.blocks[2].mlp.fc1.register_forward_hook(lambda *args: None)
    model.blocks[3].attn.register_forward_hook(lambda *args: None)
    parts = {part.name: part.calls for part in report.parts(model, images())}

    def reasons(i, op):
        return [call.reason for call in parts[f"blocks.{i}"] if call.op == op and call.backend in (None, "torch")]

    assert reasons(0, "attend_half") == reasons(0, "mlp_half") == ["the tokens are not on a GPU"]
    assert reasons(1, "attend_half") == ["the norm behind it is not plain"]
    assert reasons(1, "merge_add_norm") == ["norm2 has hooks or a forward of its own"]
    assert reasons(2, "mlp_half") == ["fc1 has hooks or a forward of its own"]
    assert reasons(3, "attend_half") == ["attn has hooks or a forward of its own"]
    assert reasons(3, "attention") == ["attn is watched: it is called, and its keys are computed twice"]
    for layer in model.blocks:
        layer.attn.attn_drop.p = 0.5
    with recording.recorded() as calls:
        model.train()(images())
    assert recording.Call("attend_half", None, "attn_drop drops in training") in calls


def gated(kind, **kwargs):
    """A model of gated MLPs, whatever the block asks for."""
    return make("plain", mlp_layer=lambda *args, **asked: kind(*args, **(asked | {"act_layer": nn.SiLU} | kwargs)))


GATED = {
    "packed": lambda: make("swiglu"),
    "gate last": lambda: gated(GluMlp),
    "apart": lambda: gated(SwiGLU),
    "normed": lambda: gated(SwiGLU, norm_layer=nn.LayerNorm),
    "no bias": lambda: gated(SwiGLU, bias=False),
}


def swiglus(model, x):
    """The result, and how often the operation was asked for."""
    with recording.recorded() as calls:
        result = model(x)
    return result, sum(call.op in ("swiglu", "swiglu_norm") for call in calls)


@pytest.mark.parametrize("kind", GATED)
def test_a_gated_mlp_is_computed_by_the_operation_where_nobody_watches(kind):
    model = tome.patch.timm(GATED[kind]())
    model.r = 4
    found, asked = swiglus(model, images())
    assert asked == 4
    with torch.no_grad():
        plain, asked = swiglus(model, images())
        assert asked == 4
        assert torch.equal(plain, found)
        mlp, seen = model.blocks[1].mlp, []
        for part in mlp.children():
            handle = part.register_forward_hook(lambda *args: seen.append(args[0]))
            watched, asked = swiglus(model, images())
            handle.remove()
            assert (asked, seen.pop()) == (3, part)
            assert torch.equal(watched, plain)
        mlp.drop1 = nn.Dropout(0.5).train()
        assert swiglus(model, images())[1] == 3


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.GELU])
def test_a_gate_of_another_activation_is_called(activation):
    model = tome.patch.timm(gated(GluMlp, act_layer=activation))
    model.r = 4
    found = model(images())
    with torch.no_grad():
        plain, asked = swiglus(model, images())
    assert asked == 0
    assert torch.equal(plain, found)


@pytest.mark.parametrize("kind", GATED)
def test_a_gated_mlp_under_autocast(kind):
    model = tome.patch.timm(GATED[kind]())
    model.r = 4
    with torch.autocast("cpu", torch.bfloat16):
        called = model(images())
        with torch.no_grad():
            torch.testing.assert_close(model(images()), called, rtol=0.05, atol=0.05)


@NO_EXTENSION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", GATED)
def test_a_gated_mlp_on_a_gpu(kind, dtype):
    model = tome.patch.timm(GATED[kind]()).cuda()
    model.r = 4
    x = images().cuda()
    autocast = torch.autocast("cuda", dtype, enabled=dtype is not torch.float32)
    with torch.no_grad(), tome.use_backend("cuda"), autocast:
        found, asked = swiglus(model, x)
        model.blocks[1].mlp.act.register_forward_hook(lambda *args: None)
        watched, fewer = swiglus(model, x)
    assert (asked, fewer) == (4, 3)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(found, watched, rtol=tolerance, atol=tolerance)


def of_all_tokens(model, x):
    """The logits, where the last MLP is one of as many rows in one call as by parts."""
    return model.forward_head(model.forward_features(x))


@NO_EXTENSION
@pytest.mark.parametrize("r", [4, (8, -1.0), [0, 3, 0, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@every_host
def test_it_is_its_parts_on_a_gpu(host, autocast, dtype, r):
    model = patched(host, r, **WIDE).cuda()
    x = images(3).cuda()
    model, x = (model, x) if autocast else (model.to(dtype), x.to(dtype))
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=autocast):
        with recording.recorded() as calls:
            whole = of_all_tokens(model, x)
        parts = by_parts(lambda x: of_all_tokens(model, x), x)
    # In one call a quick GELU is part of a product, which rounds once less. Other GELUs are there in both, but under
    # autocast, which leaves fc1 of few rows to its cache, and without products.
    if host == "clip quickgelu" or autocast or torch.cuda.get_device_capability() != (9, 0):
        torch.testing.assert_close(whole, parts, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(whole, parts)
    taken = [call.op for call in calls if call.backend == "cuda" and (call.reason or "").startswith("one call")]
    assert (taken.count("attend_half"), taken.count("mlp_half")) == expected(host, r, on_a_gpu=True)


@NO_EXTENSION
@pytest.mark.parametrize("matching", ["kth", "random", neighbours])
def test_every_matching_takes_the_one_calls_on_a_gpu(matching):
    model = tome.patch.timm(make("plain", **WIDE), matching=matching).half().cuda()
    model.r = [2, 0, 3]
    results = []
    for run in (lambda x: of_all_tokens(model, x), lambda x: by_parts(lambda x: of_all_tokens(model, x), x)):
        torch.manual_seed(0)
        with torch.inference_mode(), recording.recorded() as calls:
            results.append(run(images().half().cuda()))
        results.append([call.op for call in calls if (call.reason or "").startswith("one call")].count("attend_half"))
    assert torch.equal(results[0], results[2])
    assert results[1::2] == [4, 0]


@NO_EXTENSION
def test_a_captured_block_replays():
    """Where nothing merges the halves are one call each in a capture too."""
    model = patched("plain", [4, 0, 4, 0], **WIDE).half().cuda()
    x = images().half().cuda()
    with torch.inference_mode():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), recording.recorded() as calls:
            out = model(x)
        assert [call.reason for call in calls if call.op == "attend_half"].count("one call") == 2
        x.normal_()
        graph.replay()
        assert torch.equal(out, model(x))
