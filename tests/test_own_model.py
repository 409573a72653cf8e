"""Models of no library; the code of docs/own-model.md runs, in its order, and does what the text says."""

import copy
import re
from pathlib import Path

import pytest
import torch
from backends import NO_EXTENSION
from stand_in import Halves
from torch import nn

import tome
import tome_reference
from tome import ops
from tome.patch import QkvAttention

PAGE = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NOTHING = 0.001


def run(*blocks):
    """What the blocks define."""
    names = {"__name__": __name__}  # where pickle looks for their classes
    for block in blocks:
        exec(compile(block, "docs/own-model.md", "exec"), names)
    return names


page = run(*BLOCKS)
globals().update({name: page[name] for name in ("Attention", "Block", "ViT", "Cosine")})
ROW = page["row"]


def vit(**changed):
    torch.manual_seed(0)
    return ViT(**{"width": 32, "depth": 3, "size": 48} | changed).eval()  # noqa: F821


def images(batch=2):
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_the_page():
    assert page["logits"].shape == (2, 10)
    assert page["tokens"].x.shape == (2, 65 - 6 * 8, 64)
    code = BLOCKS[1].splitlines()
    assert len([line for line in code[: code.index("model.r = 8")] if line]) <= 15


def by_hand(model, r):
    """The logits, with the model's own parts."""
    seen = {}
    handle = model.layers[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(images())
    handle.remove()
    x, size, steps = seen["x"], None, []
    for layer in model.layers:
        q, k, v = layer.attention.to_qkv(layer.norm_in(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (2, 16)).transpose(1, 2) for t in (q, k, v))
        mask = None if size is None else size.log()[:, None, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + layer.attention.to_out(out.transpose(1, 2).flatten(2))
        slot = tome_reference.match(k, r, 1)
        x, size = tome_reference.merge(x, slot, x.shape[1] - r, size)
        x = x + layer.mlp(layer.norm_out(x))
        steps.append(slot)
    return model.head(tome_reference.unmerge(x, tome_reference.follow(steps))[:, 0])


def test_the_logits_are_those_of_merging_by_hand():
    model = vit()
    twin = tome.patch.custom(copy.deepcopy(model), "layers", ROW)
    with torch.no_grad():
        plain = model(images())
        assert torch.equal(twin(images()), plain)
        twin.r = NOTHING
        torch.testing.assert_close(twin(images()), plain)
        twin.r = 7
        torch.testing.assert_close(twin(images()), by_hand(model, 7))
        assert tome.merged(twin, images()).x.shape == (2, 37 - 21, 32)


@pytest.fixture
def halves(monkeypatch):
    """As on a GPU, with the reference in the place of the kernels; to be switched on."""
    halves = Halves()
    halves.start = lambda: monkeypatch.setattr(ops, "one_call", halves.one_call)
    return halves


def test_the_halves_in_one_call_each(halves):
    model = tome.patch.custom(vit(), "layers", ROW)
    model.r = 7
    with torch.inference_mode():
        expected = model(images())
        halves.start()
        torch.testing.assert_close(model(images()), expected)
    assert halves.counts() == (3, 3)


class Separate(nn.Module):
    """Three layers, norms, a factor, dropouts and heads in another place."""

    def __init__(self, width, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.qn, self.kn = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.drop, self.drop_out = nn.Dropout(0.1), nn.Dropout(0.1)
        self.factor = 0.3

    def forward(self, x):
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = self.drop((self.qn(q) * self.factor @ self.kn(k).transpose(2, 3)).softmax(dim=-1))
        return self.drop_out(self.o((weights @ v).transpose(1, 2).flatten(2)))


SEPARATE = QkvAttention(
    ("q", "k", "v"), "o", 2, "factor", q_norm="qn", k_norm="kn", attn_drop="drop", proj_drop="drop_out"
)


class PostBlock(Block):  # noqa: F821
    """A block that normalises its branches, with scales that are parameters."""

    def __init__(self, width):
        super().__init__(width, 2)
        self.gamma, self.beta = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x):
        x = x + self.gamma * self.norm_in(self.attention(x))
        return x + self.beta * self.norm_out(self.mlp(x))


def with_attention(model, make):
    for layer in model.layers:
        layer.attention = make(layer.attention)
    return model.eval()


def cosine(attn):
    def forward(self, x):
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        scores = nn.functional.normalize(q, dim=-1) * self.temperature @ nn.functional.normalize(k, dim=-1).mT
        return self.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    attn.temperature = nn.Parameter(torch.tensor(5.0))
    attn.__class__ = type("CosineAttention", (type(attn),), {"forward": forward})
    return attn


KINDS = {
    "separate": (lambda: with_attention(vit(), lambda attn: Separate(32, 2)), ROW._replace(attention=SEPARATE)),
    "cosine": (
        lambda: with_attention(vit(), cosine),
        ROW._replace(attention=page["Cosine"]("to_qkv", "to_out", "heads")),
    ),
    "post": (
        lambda: setattr(model := vit(), "layers", nn.ModuleList(PostBlock(32) for _ in range(3))) or model.eval(),
        ROW._replace(is_post=True, scale1="gamma", scale2="beta"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_blocks(kind, halves, monkeypatch):
    make, row = KINDS[kind]
    model = make()
    twin = tome.patch.custom(copy.deepcopy(model), "layers", row)
    with torch.inference_mode():
        plain = model(images())
        assert torch.equal(twin(images()), plain)
        twin.r = NOTHING
        torch.testing.assert_close(twin(images()), plain)
        twin.r = 6
        merged = twin(images())
        assert (merged - plain).abs().max() > 1e-4
        halves.start()
        torch.testing.assert_close(twin(images()), merged)
        assert halves.counts() == ((0, 0) if row.is_post else (3, 3))
        monkeypatch.undo()
    twin.train()
    twin(images()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters())


def test_dropouts():
    make, row = KINDS["separate"]
    model = tome.patch.custom(make(), "layers", row).train()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.drop.p, layer.attention.drop_out.p = 0.0, 1.0
        expected = model(images())
        model.r = NOTHING
        torch.testing.assert_close(model(images()), expected)
        for layer in model.layers:
            layer.attention.drop.p, layer.attention.drop_out.p = 0.5, 0.0
        assert not torch.equal(model(images()), model(images()))
        assert torch.equal(model.eval()(images()), model(images()))


def test_state():
    model = tome.patch.custom(vit(), "layers", ROW)
    model.r = 5
    with torch.no_grad():
        expected = model(images())
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images()), expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images()), expected)
        tome.unpatch(twin)
        assert torch.equal(twin(images()), vit()(images()))
    assert {type(m) for m in twin.modules()} == {type(m) for m in vit().modules()}
    assert not any(name.startswith("_tome") for m in twin.modules() for name in vars(m))
    assert not hasattr(twin, "r")


def test_a_hook_on_attention():
    model, calls = tome.patch.custom(vit(), "layers", ROW), []
    model.r = 5
    with torch.no_grad():
        handle = model.layers[0].attention.register_forward_hook(lambda *args: calls.append(1))
        expected = model(images())
        assert calls == [1]
        handle.remove()
        torch.testing.assert_close(model(images()), expected)
        model.layers[1].attention.register_forward_hook(lambda *args: calls.append(2))
        with pytest.raises(tome.UnsupportedModelError, match="watched by a hook"):
            model(images())
        tome.patch.custom(model, "layers", ROW, prop_attn=False)
        model.r = 5
        model(images())
    assert calls == [1, 2]


@pytest.mark.parametrize(
    ("path", "row", "message"),
    [
        ("blocks", ROW, "'blocks' is no list of blocks of ViT"),
        ("patches", ROW, "'patches' is no list of blocks of ViT"),
        ("layers", ROW._replace(mlp="ffn"), r"layers\.0: Block has parts that are not understood: \['mlp'\]"),
        ("layers", ROW._replace(scale1="gamma"), r"layers\.0: Block has no gamma, which its row names"),
        (
            "layers",
            ROW._replace(attention=QkvAttention("to_qkv", "proj", "heads")),
            r"layers\.0\.attention: Attention has parts that are not understood: \['to_out'\]",
        ),
        (
            "layers",
            ROW._replace(attention=QkvAttention("to_qkv", "to_out", "heads", q_norm="norm")),
            r"layers\.0\.attention: Attention has no norm, which",
        ),
        (
            "layers",
            ROW._replace(attention=QkvAttention("to_qkv", "to_out")),
            r"layers\.0\.attention: Attention has no num_heads, which",
        ),
    ],
)
def test_what_does_not_fit_is_named(path, row, message):
    model = vit()
    with pytest.raises(tome.UnsupportedModelError, match=message):
        tome.patch.custom(model, path, row)
    assert type(model).__name__ == "ViT"
    assert not any(name.startswith("_tome") for m in model.modules() for name in vars(m))


def test_more_than_tokens_is_refused():
    model = tome.patch.custom(vit(), "layers", ROW)
    model.r = 3
    with pytest.raises(tome.UnsupportedModelError, match=r"layers\.0: a patched block takes no"):
        model.layers[0](torch.randn(2, 37, 32), torch.ones(2, 37))
    with pytest.raises(ValueError, match="prefix must be"):
        tome.patch.custom(vit(), "layers", ROW, prefix=-1)


@NO_EXTENSION
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["page", *KINDS])
def test_both_backends(kind, dtype, autocast):
    make, row = KINDS.get(kind, (lambda: vit(width=128), ROW))
    model = tome.patch.custom(make(), "layers", row).cuda()
    model.r = 6
    x, truth = images(32).cuda(), copy.deepcopy(model).double()
    with torch.inference_mode():
        exact, model = truth(x.double()), model.to(dtype)
        errors = []
        for name in ("cuda", "reference"):
            with tome.use_backend(name), torch.autocast("cuda", autocast, enabled=autocast is not None):
                out = model(x.to(dtype))
            errors.append(float((out.double() - exact).square().mean().sqrt()))
    assert errors[0] <= 1.25 * errors[1] + 0.02 * float(exact.square().mean().sqrt()), errors
