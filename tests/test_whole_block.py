"""A block as one call of the extension gives the bits of its parts, and is taken only where nobody can tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import NO_EXTENSION
from models import HOSTS, WIDE, images, make
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import tome
import tome_cuda
from tome import backend, ops, recording
from tome.patch import timm_whole

# Which hosts have other parts than the one call knows, and the rest.
OTHERS = {"clip quickgelu", "q/k norm", "scale norm", "res-post-norm", "swiglu"}
UNNORMED = {"mae avg", "avgmax", "max", "prefix pooled"}  # pooled before their norm, so no norm follows the last block
every_host = pytest.mark.parametrize("host", HOSTS)


class Operators:
    """What stands in for the extension on a CPU: the operator, by the reference, and how often it was called."""

    def __init__(self):
        self.calls = 0

    def operators(self):
        return self

    @staticmethod
    def takes_block(dtype, head_dim, scale):
        return dtype is not torch.float64

    # The arguments of the schema in csrc/binding.cpp.
    def block(
        self, x, normed, size, r, prefix, is_weighted, heads, scale, qkv_weight, qkv_bias, proj_weight, proj_bias,
        gamma1, norm_weight, norm_bias, norm_eps, norm_dtype, fc1_weight, fc1_bias, is_tanh, fc2_weight, fc2_bias,
        gamma2, next_weight, next_bias, next_eps, next_dtype,
    ):  # fmt: skip
        self.calls += 1
        batch, n, _ = x.shape
        q, k, v = F.linear(normed, qkv_weight, qkv_bias).reshape(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        slot = ops.match(k, r, prefix) if r > 0 else None
        seen = ops.attention(q, k, v, size if is_weighted else None, scale).transpose(1, 2).flatten(2)
        first = F.linear(seen, proj_weight, proj_bias)
        norm = (norm_weight, norm_bias, norm_eps, gamma1, norm_dtype)
        x, normed, total = ops.merge_add_norm(x, first, slot, n - r, size, *norm)
        hidden = F.gelu(F.linear(normed, fc1_weight, fc1_bias), approximate="tanh" if is_tanh else "none")
        second = F.linear(hidden, fc2_weight, fc2_bias)
        following = (next_weight, next_bias, next_eps, gamma2, next_dtype)
        x, normed, _ = ops.merge_add_norm(x, second, None, n - r, None, *following)
        return x, normed, total if r > 0 else x.new_empty(0)


@pytest.fixture
def stand_in(monkeypatch):
    """Let the CPU take the one call; the operations themselves stay on the reference."""
    kernels = Operators()
    monkeypatch.setattr(backend, "implementation", lambda op, *args: kernels)
    return kernels


def patched(host, r=4, **kwargs):
    model = tome.patch.timm(make(host, **kwargs))
    model.r = r
    return model


def taken(host, r):
    """How many of the four blocks are one call: not those before the first merge, nor one that no norm follows."""
    return 0 if host in OTHERS else 4 - isinstance(r, list) - (host in UNNORMED)


def by_parts(model, x):
    """The result of calling the parts one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tome.patch.timm_block.run_whole", lambda *args: None)
        return model(x)


@pytest.mark.parametrize("r", [4, (8, -1.0), [0, 3, 0, 5], 0.2], ids=str)
@every_host
def test_the_bits_of_its_parts(host, r, stand_in):
    model = patched(host, r)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(images()), by_parts(model, images()))
    assert stand_in.calls == 2 * taken(host, r)


@pytest.mark.parametrize("host", ["plain", "deit3 layer scale", "siglip gap"])
def test_the_bits_of_its_parts_under_autocast(host, stand_in):
    model = patched(host)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images()), by_parts(model, images()))
    assert stand_in.calls == 4


def test_sizes_that_do_not_weigh_attention_are_summed(stand_in):
    model = tome.patch.timm(make("mae avg"), prop_attn=False)
    model.r = 4
    with torch.no_grad():
        assert torch.equal(model(images()), by_parts(model, images()))
    assert stand_in.calls == 3


PARTS = [name for name, _ in make("deit3 layer scale").blocks[1].named_modules() if name]


@pytest.mark.parametrize("part", [part for part in PARTS if part != "attn.attn_drop"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_watched_part_is_called(part, how, stand_in):
    """attn_drop is no part of fused attention: nothing ever calls it."""
    model, seen = patched("deit3 layer scale"), []
    module = model.blocks[1].get_submodule(part)
    if how == "hook":
        module.register_forward_hook(lambda module, args, out: seen.append(part))
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: seen.append(part))
    else:
        real = module.forward
        module.forward = lambda *args: seen.append(part) or real(*args)
    with torch.no_grad():
        assert torch.equal(model(images()), by_parts(model, images()))
    if part != "attn":  # its parts are called instead
        assert seen == [part, part]
    assert stand_in.calls == 3


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


@pytest.mark.parametrize("change", [replace_linear, parametrize, replace_activation, train_one, drop_weights])
def test_a_part_of_another_type_is_called(change, stand_in):
    model = patched("plain")
    with torch.no_grad():
        before = model(images())
        stand_in.calls = 0
        change(model.blocks[1])
        torch.manual_seed(0)
        whole = model(images())
        torch.manual_seed(0)
        assert torch.equal(whole, by_parts(model, images()))
        assert change is parametrize or not torch.equal(whole, before)
    assert stand_in.calls == 3


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
        assert torch.equal(replica(model)(images()), by_parts(model, images()))
    assert stand_in.calls == 0


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
        with recording.recorded() as calls, tome.use_backend("reference"):
            model(x)
        assert [call.op for call in calls].count("merge_add_norm") == 8
        model.forward_tokens(x, trace=True)
        with tome.use_backend("reference"):
            model(x)
    assert model(x).requires_grad
    assert stand_in.calls == 0


@NO_EXTENSION
@pytest.mark.parametrize("r", [4, (8, -1.0), [0, 3, 0, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@every_host
def test_the_bits_of_its_parts_on_a_gpu(host, autocast, dtype, r, monkeypatch):
    model = patched(host, r, **WIDE).cuda()
    x = images(3).cuda()
    model, x = (model, x) if autocast else (model.to(dtype), x.to(dtype))
    results = []
    run = timm_whole.run_whole
    monkeypatch.setattr("tome.patch.timm_block.run_whole", lambda *args: results.append(run(*args)) or results[-1])
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=autocast):
        assert torch.equal(model(x), by_parts(model, x))
    assert len([tokens for tokens in results if tokens is not None]) == taken(host, r)


@NO_EXTENSION
@pytest.mark.parametrize("r", [0, 4])
def test_the_operator(r):
    block = patched("deit3 layer scale", r, **WIDE).blocks[0].half().cuda().requires_grad_(False)
    parts = timm_whole.parameters(block)
    x = torch.randn(2, 37, 128, device="cuda").half()
    size = torch.randint(1, 9, (2, 37), device="cuda").float()
    norm = (block.norm2.weight, block.norm2.bias, 1e-6, torch.float16)
    arguments = (
        *(x, x, size, r, 1, True, 2, 0.125, *parts.qkv, *parts.proj, parts.gamma1, *norm),
        *(*parts.fc1, parts.is_tanh, *parts.fc2, parts.gamma2, *norm),
    )
    operator = tome_cuda.operators().block.default
    torch.library.opcheck(operator, arguments)
    first = operator(*arguments)
    for _ in range(20):
        assert all(map(torch.equal, first, operator(*arguments)))
    for position, value in ((0, x[0]), (1, x[:, :36]), (3, 19), (3, -1), (6, 5), (2, size[:1]), (8, parts.fc2[0])):
        with pytest.raises(RuntimeError):
            operator(*arguments[:position], value, *arguments[position + 1 :])


@NO_EXTENSION
def test_a_captured_block_replays():
    """Without a merge a block is one call in a capture too."""
    model = patched("plain", [4, 0, 4, 0], **WIDE).half().cuda()
    x = images().half().cuda()
    with torch.inference_mode():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.normal_()
        graph.replay()
        assert torch.equal(out, model(x))
