"""What holds for every family of timm's models, beside what its own tests compute by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from models import SMALL, images
from torch import Tensor, nn

import tome
from tome import schedule, tokens

NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
DTYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


def make(name: str, **kwargs: Any) -> nn.Module:
    """A small model of timm in eval mode, with weights that make its tokens differ."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, "depth": 3, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def keeps_the_model_where_nothing_merges(model: nn.Module) -> None:
    """The bits with r = 0, the numbers on the path of merging; and nothing is left behind."""
    twin = tome.patch.auto(copy.deepcopy(model))
    expected, before = model(images()), snapshot(model)
    assert torch.equal(twin(images()), expected)
    twin.r = NOTHING
    torch.testing.assert_close(twin(images()), expected, **CLOSE)
    assert torch.equal(tome.unpatch(twin)(images()), expected)
    assert snapshot(twin) == before


def drops_as_the_model(model: nn.Module) -> None:
    """In training, of the same random numbers; the model must have rates."""
    whole = model(images())
    twin = tome.patch.timm(copy.deepcopy(model.train()))
    twin.r = NOTHING
    outcomes = []
    for each in (model, twin):
        torch.manual_seed(0)
        outcomes.append(each(images()))
    torch.testing.assert_close(outcomes[1], outcomes[0], **CLOSE)
    assert not torch.allclose(whole, outcomes[0], **CLOSE)


def snapshot(model: nn.Module) -> list[Any]:
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def merges_as_planned(model: nn.Module, prefix: int) -> None:
    """The tokens of each block, and the grid behind the last."""
    grid = model.forward_features(images()).shape
    for r in (4, [9, 0, 3], (3, -1.0)):
        model.r = r
        with tokens.kept() as kept:
            assert model.forward_features(images()).shape == grid
        plan = schedule.plan(r, 3, 36 + prefix, prefix).tokens
        counts = [36 + prefix] + [step.shape[1] for step in kept[-1].steps[1:]] + [kept[-1].count()]
        assert counts == sorted(set(plan), reverse=True)


def survives_copies(model: nn.Module) -> None:
    """Copies, pickles, and the state of the unpatched model."""
    names = list(model.state_dict())
    tome.patch.timm(model).r = 4
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.r == 4
        assert torch.equal(twin(images()), expected)
    assert list(model.state_dict()) == names


def gradients(model: nn.Module, *inputs: Any) -> list[dict[str, Tensor]]:
    """The gradients by the names of the parameters that have one, without checkpoints and with them."""
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(0)  # for what drops, or moves its coordinates as Sapiens2 does
        with torch.enable_grad():
            model(*inputs).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def trains(model: nn.Module) -> dict[str, Tensor]:
    """Gradients are finite, the same with checkpoints; they are returned."""
    tome.patch.timm(model).train().r = 4
    found = gradients(model, images())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in found[0].values())
    assert len(found[0]) == sum(p.requires_grad for p in model.parameters())
    return found[0]


def compiles(model: nn.Module) -> None:
    """In one graph."""
    model.prune_intermediate_layers([1], prune_head=False)  # two blocks show what three would
    tome.patch.timm(model).r = 4
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()), **CLOSE)


def calls_what_is_watched(model: nn.Module, parts: dict[str, int]) -> None:
    """Hooks and replaced forwards of parts of the second block change no number, and are called so often."""
    tome.patch.timm(model).r = 4
    expected = model(images())
    for path, count in parts.items():
        for how in (hook, replace):
            twin = copy.deepcopy(model)
            calls = how(twin.blocks[1].get_submodule(path))
            torch.testing.assert_close(twin(images()), expected, **CLOSE, msg=f"{path}, {how.__name__}")
            assert len(calls) == count, (path, how.__name__)


def hook(part: nn.Module) -> list[Any]:
    """The calls that a hook sees."""
    calls: list[Any] = []
    part.register_forward_hook(lambda *_: calls.append(part))
    return calls


def replace(part: nn.Module) -> list[Any]:
    """The calls of a forward that was replaced for this instance."""
    calls: list[Any] = []
    real = part.forward
    part.forward = lambda *args, **kwargs: calls.append(part) or real(*args, **kwargs)
    return calls


def agrees_on_a_gpu(model: nn.Module) -> None:
    """The logits of both backends, in all dtypes."""
    from test_cuda_models import compare

    for dtype, autocast in DTYPES:
        compare(tome.patch.timm(copy.deepcopy(model)).cuda(), images(32).cuda(), dtype, autocast, 4)
