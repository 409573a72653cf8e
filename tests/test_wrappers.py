"""What others do to a model goes on working on a patched one, or is refused by name: hooks, wrappers, transforms."""

import copy
import types

import pytest
import torch
from models import images, make
from timm.utils import AttentionExtract
from torch import nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import tome
from tome import UnsupportedModelError


@pytest.fixture(autouse=True)
def reference_backend():
    with tome.use_backend("reference"):
        yield


def patched(host="plain", r=4, **kwargs):
    model = tome.patch.timm(make(host, **kwargs))
    model.r = r
    return model


def test_hooks_on_attention_see_every_call():
    model, seen = patched(), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[1], out.shape[1])))
    expected = tome.unpatch(copy.deepcopy(model))
    with torch.no_grad():
        model(images())
        assert seen == [(n, n) for n in (37, 33, 29, 25)]
        seen.clear()
        model.r = 0
        assert torch.equal(model(images()), expected(images()))


def test_what_a_hook_on_attention_returns_counts():
    model = patched(r=[1])
    twin = with_replaced_forward(copy.deepcopy(model))
    before = model(images())
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: out * 0)
    after = model(images())
    assert not torch.equal(before, after)
    assert torch.equal(after, twin(images()))


def with_replaced_forward(model):
    attn = model.blocks[0].attn
    attn.forward = types.MethodType(lambda self, x, **kwargs: x * 0, attn)
    return model


def test_sizes_weigh_attention_that_is_called_as_it_is():
    model = patched("deit3 layer scale", 6)
    expected = model(images())
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    unweighted = tome.patch.timm(make("deit3 layer scale"), prop_attn=False)
    unweighted.r = 6
    assert (unweighted(images()) - expected).abs().max() > 1e-4


def test_attention_maps_can_be_extracted():
    model = patched()
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(model, method="hook")(images())
    assert [tuple(each.shape) for each in maps.values()] == [(2, 2, n, n) for n in (37, 33, 29, 25)]


def test_backward_hooks_between_blocks_are_refused():
    model = patched()
    model.blocks[1].register_full_backward_hook(lambda module, grads, out: None)
    with pytest.raises(UnsupportedModelError, match=r"blocks.1 has backward hooks, which need a tensor between blocks"):
        model(images())
    model.r = 0
    model(images()).sum().backward()


def gradients(model, *groups):
    """Of a pass in which each group of blocks up to the first number is in a reentrant checkpoint, or is not."""
    model.zero_grad()
    x, start = model._pos_embed(model.patch_embed(images())), 0
    for stop, is_checkpointed in groups:
        part = model.blocks[start:stop]
        x, start = checkpoint(part, x, use_reentrant=True) if is_checkpointed else part(x), stop
    model.forward_head(model.norm(x)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


EACH = tuple((stop, True) for stop in (1, 2, 3, 4))


@pytest.mark.parametrize(("r", "groups"), [(4, ((4, True),)), (0, EACH), ([0, 0, 0, 4], EACH)])
def test_reentrant_checkpoints_that_tensors_enter_and_leave(r, groups):
    model = patched(r=r)
    expected = gradients(model, (4, False))
    assert None not in expected
    torch.testing.assert_close(gradients(model, *groups), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # which it says before
@pytest.mark.parametrize(
    ("r", "groups", "block"),
    [
        (4, ((2, True), (4, True)), 2),
        (4, ((1, True), (4, False)), 1),
        (4, ((2, False), (4, True)), 2),
        ([0, 4, 4, 4], EACH, 2),
    ],
)
def test_reentrant_checkpoints_that_would_lose_gradients_are_refused(r, groups, block):
    message = rf"blocks\.{block}: merged tokens cannot enter or leave a reentrant checkpoint, which would lose"
    with pytest.raises(UnsupportedModelError, match=message):
        gradients(patched(r=r), *groups)


def test_tokens_that_require_gradients_which_nobody_computes():
    model = patched()
    x = model._pos_embed(model.patch_embed(images()))
    with torch.no_grad():
        found = model.blocks(x)
    torch.testing.assert_close(found, model.blocks(x).detach())


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("plain")
    for block in model.blocks:
        hooks.add_hook_to_module(block, hooks.ModelHook())
    with pytest.raises(UnsupportedModelError, match=r"blocks.0: its forward was replaced \(as accelerate's hooks"):
        tome.patch.timm(model)
    model = patched()
    expected = model(images())
    for block in model.blocks:
        hooks.add_hook_to_module(block, hooks.AlignDevicesHook("cpu"))
    assert torch.equal(model(images()), expected)
    assert tome.merged(model, images()).count() == 37 - 16


def cast(module, args):
    """What FSDP2's mixed precision does to the arguments of a block."""
    return _pytree.tree_map(
        lambda t: t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, args
    )


def test_sizes_survive_wrappers_that_cast_floating_tensors():
    model = patched("mae avg", 8).bfloat16()
    assert _pytree.tree_map(lambda leaf: leaf, model.blocks[0](torch.zeros(2, 37, 32).bfloat16())).steps
    expected = model(images().bfloat16())
    for block in model.blocks:
        block.register_forward_pre_hook(cast)
    assert torch.equal(model(images().bfloat16()), expected)
    merged = tome.merged(model, images().bfloat16())
    assert merged.size.dtype == torch.float32
    assert torch.equal(merged.size.sum(1), torch.full((2,), 37.0))


def test_sharding_with_mixed_precision(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model = patched("mae avg", 4)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.r = 5
        model(images()).float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert tome.merged(model, images()).count() == 37 - 20
        for again in (tome.unpatch, tome.patch.timm):
            with pytest.raises(UnsupportedModelError, match="its class was changed after it was patched"):
                again(model)
        model(images())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_r_set_on_a_wrapper_reaches_the_model(wrap):
    model = patched(r=0)
    wrapper = wrap(model)
    wrapper.r = 3
    assert model.r == wrapper.r == 3
    assert wrapper._tome_info["r"] == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="r must not be negative"):
        wrapper.r = -1


def test_an_attribute_of_other_wrapped_models_stays_what_it_was():
    wrapper = nn.DataParallel(nn.Linear(2, 2))
    assert not hasattr(wrapper, "r")
    wrapper.r = 3
    assert wrapper.r == vars(wrapper)["r"] == 3


def test_compiling_and_exporting_the_halves_of_a_model():
    model = patched("mae avg")

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.forward_head(self.model.forward_features(x))

    with torch.no_grad():
        expected = Halves()(images())
        assert torch.equal(torch.compile(Halves(), fullgraph=True, backend="eager")(images()), expected)
        program = torch.export.export(Halves(), (images(),))
        torch.testing.assert_close(program.module()(images()), expected)


@pytest.mark.filterwarnings("ignore")  # tracing itself is deprecated, and warns of every shape
def test_tracing_is_refused_where_tokens_merge():
    model = patched()
    with pytest.raises(UnsupportedModelError, match=r"torch.jit.trace and onnx.export\(dynamo=False\) cannot follow"):
        torch.jit.trace(model, images())
    model.r = 0
    traced = torch.jit.trace(model.eval(), images())
    torch.testing.assert_close(traced(images()), model(images()))


@pytest.mark.parametrize("r", [0, 4])
def test_tensors_without_values(r):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = patched(r=r)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(images())).shape == (2, 7)
    assert model.to("meta")(images().to("meta")).shape == (2, 7)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_image():
    model = patched()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images())
    for i, image in enumerate(images()):
        expected = torch.func.grad(loss)(parameters, image)
        for name in parameters:
            torch.testing.assert_close(each[name][i], expected[name], rtol=1e-3, atol=1e-4)


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = patched("mae avg")
        assert model(images().double()).dtype == torch.float64
        assert tome.merged(model, images().double()).size.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_schedule_that_merges_more_than_it_can_warns_once_with_the_cap():
    model = patched(r=0)
    with pytest.warns(UserWarning, match=r"r = 200 is clipped: .*18") as caught:
        model.r = 200
    assert len(caught) == 1
    assert caught[0].filename == __file__
