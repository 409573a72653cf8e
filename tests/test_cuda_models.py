"""Whole models on both backends: the same logits, up to what the dtype itself leaves open.

Logits of the kernels may lie no further from float64's than the reference's own do, plus a floor of rounding.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from backends import NO_EXTENSION
from models import images, make
from torch import Tensor, nn

import tome
from tome import schedule
from tome.patch import timm_cost

pytestmark = [NO_EXTENSION, pytest.mark.usefixtures("no_grad")]

# The schedules 8, (8, -1), 16 and (16, -1) of 12 layers and 197 tokens, for 4 layers and 37.
SCHEDULES = [4, (4, -1.0), 8, (8, -1.0)]
HOSTS = ["plain", "dinov2 registers", "siglip map", "mae avg", "deit distilled", "res-post-norm"]
# Rounding of one entry; a model adds some hundreds of roundings, most of which cancel.
FLOOR = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STEPS = 16


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def logits(model: nn.Module, x: Tensor, backend: str, autocast: torch.dtype | None) -> Tensor:
    context: AbstractContextManager[object] = nullcontext()
    if autocast is not None:
        context = torch.autocast("cuda", autocast)
    with tome.use_backend(backend), context:
        return model(x)


def slots(model: nn.Module, x: Tensor, backend: str) -> Tensor:
    with tome.use_backend(backend):
        return model.forward_tokens(x, trace=True).slot


@pytest.mark.parametrize("r", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("host", HOSTS)
def test_the_same_logits(host, dtype, autocast, r):
    model = tome.patch.timm(make(host)).cuda()
    model.r = r
    truth_model = copy.deepcopy(model).double()
    model = model.to(dtype)
    x = images(32).cuda()
    truth = logits(truth_model, x.double(), "reference", None)
    ours, theirs = (logits(model, x.to(dtype), name, autocast) for name in ("cuda", "reference"))
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape

    entering, _ = timm_cost.cost(model)
    assert model._tome_info["size"].shape[1] == schedule.plan(r, 4, entering, model.num_prefix_tokens).tokens[-1]

    # Root mean squares over a batch: in half precision rounding makes either backend choose a few other pairs than
    # float64 does, and one image with another pair says nothing.
    floor = STEPS * FLOOR[autocast or dtype] * float(truth.abs().max())
    error_ours, error_theirs = (float((out.double() - truth).square().mean().sqrt()) for out in (ours, theirs))
    assert error_ours <= error_theirs + floor


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_pairs_in_float32(host):
    """Real weights nearly never tie; a different pair would be the sign of more than rounding."""
    model = tome.patch.timm(make(host)).cuda()
    model.r = 4
    x = images(16).cuda()
    ours, theirs = (slots(model, x, name) for name in ("cuda", "reference"))
    assert float((ours != theirs).any(dim=1).float().mean()) <= 1 / 16


@pytest.mark.parametrize("host", ["plain", "mae avg"])
def test_the_same_gradients_in_float32(host):
    model = tome.patch.timm(make(host)).cuda()
    model.r = 4
    found = []
    for name in ("cuda", "reference"):
        model.zero_grad()
        with torch.enable_grad(), tome.use_backend(name):
            model(images(4).cuda()).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-4 * float(grad.abs().max() + 1), msg=name)


def test_auto_takes_the_kernels():
    model = tome.patch.timm(make("plain")).cuda()
    model.r = 4
    x = images().cuda()
    with tome.use_backend("auto"):
        assert torch.equal(model(x), logits(model, x, "cuda", None))
