"""Where a model's head reads the class token alone, the last MLP runs on no other, and nobody can tell."""

import functools
import inspect

import mha_hosts
import pytest
import torch
from backends import NO_EXTENSION
from models import HOSTS, SMALL, WIDE, images, make
from test_block import every_host, twins
from test_mha import tensors
from test_one_call import OTHER_MLP
from timm.models import VisionTransformer, checkpoint_seq, vision_transformer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import tome
import tome_reference
from tome import ops, recording, tokens
from tome.patch.swap import base_of

CLOSE = {"rtol": 2e-2, "atol": 2e-2}
PATCHES = 36
TOKENS = PATCHES + 1  # of "plain"


@pytest.fixture
def rows(kernels, monkeypatch):
    """Of how many tokens each MLP was computed, where the last block's waits for its reader, as on a GPU."""
    seen = []

    def one_call(half, *args):
        call = getattr(tome_reference, half)

        @functools.wraps(call)
        def noted(x, y, *others):
            seen.append(y.shape[1])
            return call(x, y, *others)

        return noted if half == "mlp_half" else call

    def linear_gelu(y, *others):
        seen.append(y.shape[1])
        return tome_reference.linear_gelu(y, *others)

    monkeypatch.setattr(ops, "one_call", one_call)
    monkeypatch.setattr(ops, "linear_gelu", linear_gelu)
    return seen


def in_half(host, r):
    """A model, a patched copy, and images."""
    model, twin = twins(host, r)
    return model.bfloat16(), twin.bfloat16(), images().bfloat16()


def reads_class_token(model):
    return base_of(model) is VisionTransformer and model.global_pool == "token"


@every_host
@pytest.mark.parametrize("r", [0, 3, [0, 0, 0, 5]], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_logits_are_those_of_the_grid(host, r, autocast, rows):
    model, twin, x = (*twins(host, r), images()) if autocast else in_half(host, r)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, of_logits = twin(x), rows[-1:]
        grid, of_grid = twin.forward_features(x), rows[-1:]
        torch.testing.assert_close(logits, twin.forward_head(grid), **CLOSE)
        assert grid.shape == model.forward_features(x).shape
    is_one_call = of_grid and host not in OTHER_MLP
    assert of_logits == ([HOSTS[host][2]] if is_one_call and reads_class_token(model) else of_grid)


READ_IN_PART = {"torchvision", "torchvision stem", "torchvision dropout"}
READ_IN_PART |= {"open_clip", "open_clip quick", "open_clip float32 norms"}


@pytest.mark.parametrize("host", mha_hosts.HOSTS)
@pytest.mark.parametrize("r", [0, 3])
def test_other_hosts(host, r, rows):
    model = tome.patch.auto(mha_hosts.make(host))
    model.r = r
    x = mha_hosts.images(model)
    norm = model.encoder.ln if hasattr(model, "encoder") else model.ln_post
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, of_found = model(x), rows[-1:]
        handle = norm.register_forward_hook(lambda *args: None)
        watched, of_watched = model(x), rows[-1:]
        handle.remove()
        for one, other in zip(tensors(found), tensors(watched), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        assert of_found == ([1] if host in READ_IN_PART else of_watched)
        assert not of_watched or of_watched[0] > 20
        if host == "open_clip":
            model.output_tokens = True
            assert model(x)[1].shape == (2, PATCHES, 32)
        if host == "torchvision":
            model.encoder.register_forward_hook(lambda encoder, args, out: rows.append(tuple(out.shape)))
            model(x)
            assert rows.pop() == (2, TOKENS, 32)


def test_compiled_too(rows):
    _, twin, x = in_half("plain", 3)
    with torch.no_grad():
        expected = twin(x)
        rows.clear()
        torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="eager")(x), expected, **CLOSE)
    assert rows[-1:] == [1]


@NO_EXTENSION
@every_host
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float16, False), (torch.float32, True)])
def test_on_a_gpu(host, r, dtype, autocast):
    model = tome.patch.timm(make(host, **WIDE)).to(dtype).cuda()
    model.r = r
    x = images(3).to(dtype).cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=autocast):
        with recording.recorded() as calls:
            logits = model(x)
        tolerance = 1e-4 if dtype is torch.float32 and not autocast else 2e-2
        expected = model.forward_head(model.forward_features(x))
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    is_the_hosts = r == 0 and dtype is torch.float32 and not autocast
    skipped = [call[:2] for call in calls].count(("restore", None))
    assert skipped == (reads_class_token(model) and not is_the_hosts)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_checkpoints_compile_without_gradients(library, kernels):
    if library == "timm":
        _, model, x = in_half("plain", 3)
    else:
        model = tome.patch.auto(mha_hosts.make("open_clip")).bfloat16()
        model.r, x = 3, mha_hosts.images(model).bfloat16()
    model.set_grad_checkpointing()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def test_merged_tokens_are_all_of_them(rows):
    _, twin, x = in_half("plain", 3)
    with torch.no_grad():
        merged = tome.merged(twin, x)
        assert merged.x.shape == (2, TOKENS - 12, 32)
        assert rows[-2:] == [1, TOKENS - 12]  # of the logits, and of what was asked for
        torch.testing.assert_close(twin.norm(merged.restored()), twin.forward_features(x), **CLOSE)


def test_who_sees_more_than_the_class_token_gets_the_grid(rows):
    shapes = []

    def note(module, args, out):
        shapes.append(tuple(out.shape))

    class Own(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            note(self, (), x)
            return super().forward_head(x, pre_logits)

    _, twin, x = in_half("plain", 3)
    own = Own(**SMALL).bfloat16().eval()
    tome.patch.timm(own).r = 3
    with torch.no_grad():
        twin(x)
        assert rows.pop() == 1
        for watch in (
            *(module.register_forward_hook for module in (twin.norm, twin.blocks, twin.blocks[-1])),
            lambda hook: register_module_forward_hook(lambda *seen: hook(*seen) if seen[0] is twin.norm else None),
        ):
            handle = watch(note)
            twin(x)
            handle.remove()
            assert shapes.pop() == (2, TOKENS, 32)
        handle = twin.blocks[-1].mlp.register_forward_hook(note)
        twin(x)
        handle.remove()
        assert shapes.pop() == (2, TOKENS - 12, 32)
        own(x)
        assert shapes.pop() == (2, TOKENS, 32)
        twin.forward_head = lambda features: features
        assert twin(x).shape == (2, TOKENS, 32)
        del twin.forward_head
        rows.clear()
        with tome.use_backend("reference"):
            twin(x)
        twin.global_pool = "avg"
        twin(x)
        assert 1 not in rows
        twin.global_pool = "token"
        twin(x)
        assert rows.pop() == 1
        headless = in_half("class-free avg", 3)[1]
        headless.global_pool = "token"  # it has none, and reads what comes first
        torch.testing.assert_close(headless(x), headless.forward_head(headless.forward_features(x)), **CLOSE)
    twin(x).sum().backward()
    assert 1 not in rows
    assert not shapes


class Noting(nn.Sequential):
    """A list of blocks, or a block around one, that sees what comes out of it."""

    def forward(self, x, *args, **kwargs):
        x = super().forward(x)
        self.seen = tuple(x.shape)
        return x


class Mixing(nn.Module):
    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


def around_the_blocks(model):
    model.blocks = Noting(*model.blocks)


def around_the_last(model):
    model.blocks[-1] = Noting(model.blocks[-1])


def behind_the_last(model):
    model.blocks.append(Mixing())


def class_on_top(model):
    model.__class__ = type("Own", (type(model),), {"forward_head": lambda self, x, pre_logits=False: x.sum(dim=1)})


@pytest.mark.parametrize("change", [around_the_blocks, around_the_last, behind_the_last, class_on_top])
def test_what_is_put_around_the_blocks_gets_the_grid(change, rows):
    _, twin, x = in_half("plain", 3)
    change(twin)
    with torch.no_grad():
        found = twin(x)
        assert 1 not in rows
        with tome.use_backend("reference"):
            torch.testing.assert_close(found, twin(x), **CLOSE)
    assert {module.seen for module in twin.modules() if isinstance(module, Noting)} <= {(2, TOKENS, 32)}


def test_a_head_of_the_class_gets_the_grid(rows, monkeypatch):
    monkeypatch.setattr(VisionTransformer, "forward_head", lambda self, x, pre_logits=False: x)
    _, twin, x = in_half("plain", 3)
    with torch.no_grad():
        assert twin(x).shape == (2, TOKENS, 32)


def test_a_pass_that_a_hook_makes_has_a_reader_of_its_own(rows):
    _, twin, x = in_half("plain", 3)
    shapes = []
    twin.head.register_forward_pre_hook(lambda head, args: shapes.append(tuple(twin.forward_features(x).shape)))
    with torch.no_grad():
        twin(x)
    assert shapes == [(2, TOKENS, 32)]
    assert tokens.reader() is None


@pytest.mark.parametrize("part", ["patch_embed", "patch_embed.proj", "pos_drop", "blocks.0", "blocks.2.attn.qkv"])
@pytest.mark.parametrize("again", ["forward_features", "forward_intermediates", "blocks"])
def test_so_has_one_that_a_hook_makes_on_the_way(part, again, rows):
    _, twin, x = in_half("plain", 3)
    shapes = []

    def look(*seen):
        handle.remove()
        out = getattr(twin, again)(torch.zeros(2, TOKENS, 32).bfloat16() if again == "blocks" else x)
        shapes.append(tuple((out[0] if isinstance(out, tuple) else out).shape))

    handle = twin.get_submodule(part).register_forward_hook(look)
    with torch.no_grad():
        twin(x)
    assert shapes == [(2, TOKENS, 32)]


def test_methods_that_only_look_like_the_hosts_are_not(rows):
    class Wrapped(VisionTransformer):
        @functools.wraps(VisionTransformer.forward_head)
        def forward_head(self, x, pre_logits=False):
            return x.sum(dim=1)

    class Called(VisionTransformer):
        pool = functools.partial(torch.sum, dim=1)

    for kind in (Wrapped, Called):
        own = kind(**SMALL).bfloat16().eval()
        tome.patch.timm(own).r = 3
        with torch.no_grad():
            own(images().bfloat16())
        assert 1 not in rows


def test_a_forward_that_is_replaced_later_is_called(rows, monkeypatch):
    _, twin, x = in_half("plain", 3)
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: self.forward_features(x))
    with torch.no_grad():
        assert twin(x).shape == (2, TOKENS, 32)


def test_a_reentrant_checkpoint_computes_the_same_again(kernels, monkeypatch):
    """It turns gradients off for the first of its two passes."""
    _, twin = twins("plain", [0, 0, 0, 5])
    twin.set_grad_checkpointing()
    reentrant = functools.partial(checkpoint_seq, use_reentrant=True)
    monkeypatch.setattr(vision_transformer, "checkpoint_seq", reentrant)
    x = images().requires_grad_()
    twin(x).sum().backward()
    assert x.grad is not None


def test_forward_keeps_its_signature():
    model, twin = twins("plain", 3)
    assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    with torch.no_grad():
        exported = torch.export.export(twin, (images(),), dynamic_shapes=batch).module()
        torch.testing.assert_close(exported(images(5)), twin(images(5)))


def test_a_model_within_another_ones_forward_is_asked_for_itself(rows):
    _, twin, x = in_half("plain", 3)
    _, other, _ = in_half("plain", 3)
    shapes = []
    twin.patch_embed.register_forward_hook(lambda *seen: shapes.append(tuple(other.forward_features(x).shape)))
    with torch.no_grad():
        twin(x)
    assert shapes == [(2, TOKENS, 32)]
