"""torch.compile without a graph break, torch.export and ONNX, for the operations and for whole models."""

import copy

import emulated
import numpy as np
import pytest
import torch
from backends import NO_EMULATOR
from functorch.compile import make_boxed_func
from models import images, make
from torch._dynamo.backends.common import aot_autograd

import tome
import tome_reference
from tome import ops

SOME = ["plain", "dinov2 registers", "siglip map", "mae avg", "deit distilled", "res-post-norm"]


@pytest.fixture(autouse=True)
def reference_backend():
    torch.compiler.reset()
    with tome.use_backend("reference"):
        yield
    torch.compiler.reset()


class Layer(torch.nn.Module):
    """Every operation once."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x, keys):
        slot = ops.match(keys, 5)
        x, size = ops.merge(x, slot, 28)
        restored = ops.unmerge(x, slot)
        keys = keys[:, :, :28]
        x = x + ops.attention(keys, keys, keys, size).transpose(1, 2).reshape(x.shape)
        slot = ops.kth_match(keys, 3)
        x, y, size = ops.merge_add_norm(x, x, slot, 10, size, self.weight, None, 1e-5)
        slot = ops.random_match(x, 2, 1)
        return ops.merge(x, slot, 8, size)[1].sum(), y, restored


def layer_inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 33, 16, generator=generator), torch.randn(2, 2, 33, 8, generator=generator)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_operations_compile_in_one_graph(backend):
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*layer_inputs()), layer(*layer_inputs()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_through_compiled_operations():
    layer = Layer()
    grads = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x, keys = (t.requires_grad_() for t in layer_inputs())
        _, y, restored = module(x, keys)
        (y.square().sum() + restored.sum()).backward()
        grads.append((x.grad, keys.grad))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("strict", [True, False])
def test_operations_export(strict):
    program = torch.export.export(Layer(), layer_inputs(), strict=strict)
    reduces = [n for n in program.graph.nodes if "scatter_reduce" in str(n.target) or "scatter_add" in str(n.target)]
    assert not reduces
    for got, want in zip(program.module()(*layer_inputs())[1:], Layer()(*layer_inputs())[1:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("host", SOME)
def test_models_compile_in_one_graph(host):
    model = tome.patch.timm(make(host))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for r in ((5, -1.0), 0.2, 0.01):  # the last merges nothing of so few tokens
        compiled.r = r
        assert model.r == r
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_model_compiles_with_inductor_and_trains():
    model = tome.patch.timm(make("mae avg"), trace_source=True)
    model.r = 5
    compiled = torch.compile(model, fullgraph=True)
    outcomes = []
    for module in (model, compiled):
        model.zero_grad()
        loss = module(images()).square().sum()
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        assert model._tome_info["source"].shape == (2, 17, 37)
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-3, atol=1e-4)


def test_calls_of_a_compiled_model_do_not_recompile():
    model = tome.patch.timm(make("plain"))
    model.r = 4
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(images())
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(images() + 1)


def test_switching_the_backend_reaches_a_compiled_function():
    compiled = torch.compile(lambda x: ops.match(x, 2), fullgraph=True, backend="eager")
    x = torch.randn(1, 9, 4)
    assert torch.equal(compiled(x), tome_reference.match(x, 2))
    with pytest.raises(Exception, match="the CUDA backend cannot run match"), tome.use_backend("cuda"):
        compiled(x)
    with tome.use_backend("auto"):
        assert torch.equal(compiled(x), tome_reference.match(x, 2))


@pytest.mark.parametrize("host", SOME)
def test_models_export_and_the_eager_model_survives(host):
    model = tome.patch.timm(make(host))
    model.r = (5, -1.0)
    with torch.no_grad():
        expected = model(images())
        program = torch.export.export(copy.deepcopy(model), (images(),))
        torch.testing.assert_close(program.module()(images()), expected)
        assert torch.equal(model(images()), expected)


@pytest.mark.filterwarnings("default")  # the exporter itself uses what is deprecated
@pytest.mark.parametrize("host", ["plain", "siglip map"])
def test_models_run_in_onnx_runtime(host, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tome.patch.timm(make(host))
    model.r = 5
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    np.testing.assert_allclose(got, model(images()).detach().numpy(), rtol=1e-3, atol=1e-4)


@NO_EMULATOR
@pytest.mark.parametrize("training", [False, True])
def test_the_grid_is_restored_by_what_inductor_fuses(training):
    """An operator that only the last block has takes inductor of torch 2.11 minutes to write out."""
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph)

    model = tome.patch.timm(make("mae avg"))
    model.r = 5
    outcomes = []
    with torch.set_grad_enabled(training), emulated.chosen():
        for module in (model, torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))):
            model.zero_grad()
            outcomes.append([module(images())])
            if training:
                outcomes[-1][0].square().sum().backward()
                outcomes[-1] += [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-3, atol=1e-4)
    names = {name.split(".")[1] for name in graphs[0] if name.startswith(emulated.NAMESPACE)}
    assert "merge_add_norm" in names
    assert not names & {"restore", "follow", "unmerge"}
    assert training == any(f"{emulated.NAMESPACE}.unmerge_backward.default" in graph for graph in graphs)
