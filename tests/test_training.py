"""Patched models that train by the kernels: one node of autograd for each half of a block, and the same gradients."""

from __future__ import annotations

import copy

import pytest
import stand_in
import torch
from functorch.compile import make_boxed_func
from models import images, make
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import tome
from tome import recording
from tome_cuda import predicates

DEPTH = {"depth": 3, "drop_path_rate": 0.4}
HOSTS = ["plain", "dinov2 registers", "deit3 layer scale", "stochastic depth", "siglip map"]
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture
def kernels(monkeypatch):
    """The library's operators computed by the reference, in whatever dtype, so that nothing is lost in rounding."""
    stand_in.choose(monkeypatch)
    monkeypatch.setattr(predicates, "_lacks_heads", lambda *args: None)
    monkeypatch.setattr(predicates, "_lacks_attention", lambda *args: None)


def gradients(model: nn.Module, checkpoints: bool = False) -> dict[str, torch.Tensor]:
    model.set_grad_checkpointing(checkpoints)
    model.zero_grad()
    torch.manual_seed(0)
    with torch.enable_grad():
        model(images()).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def names(model: nn.Module) -> list[str]:
    with recording.recorded() as calls:
        model(images())
    return [call.op for call in calls if (call.reason or "").startswith("one call")]


def made(host: str) -> nn.Module:
    return make("plain", **DEPTH) if host == "stochastic depth" else make(host, depth=3)


def trained(host: str, r: object = 4) -> nn.Module:
    model = tome.patch.timm(made(host)).train()
    model.r = r
    return model


@pytest.mark.parametrize("r", [4, [0, 5, 3], (6, -1.0)], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_gradients_are_those_of_the_parts(host, r, kernels):
    model = trained(host, r)
    with tome.use_backend("reference"):
        expected = gradients(model)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **CLOSE, msg=name)
    halves = names(model)
    assert halves.count("attend_half") >= 2
    assert halves.count("mlp_half") >= 2


@pytest.mark.parametrize("host", HOSTS)
def test_checkpoints(host, kernels):
    model = trained(host)
    found, again = gradients(model), gradients(model, checkpoints=True)
    for name, grad in found.items():
        torch.testing.assert_close(again[name], grad, **CLOSE, msg=name)


def test_frozen_parts_get_no_gradient_and_the_others_the_same(kernels):
    model = trained("deit3 layer scale")
    whole = gradients(model)
    frozen = {"blocks.1.attn.qkv.weight", "blocks.1.attn.proj.bias", "blocks.2.mlp.fc1.weight", "blocks.2.norm2.bias"}
    frozen |= {"blocks.2.ls1.gamma", "blocks.0.norm1.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found = gradients(model)
    assert found.keys() == whole.keys() - frozen
    for name, grad in found.items():
        torch.testing.assert_close(grad, whole[name], **CLOSE, msg=name)


def test_only_the_images_want_a_gradient(kernels):
    model = trained("plain").requires_grad_(False)
    x = images().requires_grad_()
    (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    with tome.use_backend("reference"):
        (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_what_drops_weights_or_channels_goes_part_by_part(kernels):
    model = trained("plain")
    model.blocks[1].attn.attn_drop.p = 0.5
    model.blocks[2].mlp.drop1.p = 0.5
    expected = trained("plain")
    halves, all_halves = names(model), names(expected)
    assert halves.count("attend_half") == all_halves.count("attend_half") - 1
    assert halves.count("mlp_half") == all_halves.count("mlp_half") - 1
    model.eval()
    assert names(model).count("attend_half") == all_halves.count("attend_half")


def test_a_rate_that_changes_is_noticed(kernels):
    model = trained("stochastic depth")
    paths = [module for module in model.modules() if type(module).__name__ == "DropPath"]
    rates = [path.drop_prob for path in paths]
    for path in paths:
        path.drop_prob = 0.0
    found = model(images())
    assert torch.equal(model(images()), found)
    for path, rate in zip(paths, rates, strict=True):
        path.drop_prob = rate
    assert not torch.equal(model(images()), found)
    for path in paths:
        path.drop_prob = 0.0
    assert torch.equal(model(images()), found)


def test_stochastic_depth_draws_the_numbers_of_the_host(kernels):
    model = made("stochastic depth").train()
    twin = tome.patch.timm(copy.deepcopy(model))
    twin.r = 0.001
    outcomes = []
    for each in (model, twin):
        torch.manual_seed(0)
        outcomes.append(each(images()))
    torch.testing.assert_close(outcomes[1], outcomes[0], **CLOSE)
    assert "attend_half" in names(twin)


@pytest.mark.parametrize("host", HOSTS)
def test_a_compiled_step_is_one_operator_a_half_each_way(host, kernels):
    """And has the gradients of an eager one."""
    graphs: list[list[str]] = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if stand_in.NAMESPACE in str(node.target)])
        return make_boxed_func(graph)

    model = trained(host)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # which a compiled model draws otherwise
    expected = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    model.zero_grad()
    with torch.enable_grad():
        compiled(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE, msg=name)
    forward, backward = ([name.split(".")[1] for name in graph] for graph in graphs)
    assert forward.count("attend_half_training") == backward.count("attend_half_backward") == 3
    assert forward.count("mlp_half_training") == backward.count("mlp_half_backward") == 2
    assert not {"attention_training", "attention_backward"} & {*forward, *backward}
