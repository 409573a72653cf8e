"""Whole models on both backends: the same logits, up to what the dtype itself leaves open.

Logits of the kernels may lie no further from float64's than the reference's own do, plus a floor of rounding.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from backends import NO_EXTENSION
from models import WIDE, images, make
from torch import Tensor, nn

import tome
from tome import cost, ops, recording, report, schedule

pytestmark = [NO_EXTENSION, pytest.mark.usefixtures("no_grad")]

# The schedules 8, (8, -1), 16 and (16, -1) of 12 layers and 197 tokens, for 4 layers and 37.
SCHEDULES = [0, 4, (4, -1.0), 8, (8, -1.0)]
HOSTS = ["plain", "dinov2 registers", "siglip map", "mae avg", "deit distilled", "res-post-norm", "q/k norm"]
REAL = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}  # vit_small_patch16_224
DTYPES = pytest.mark.parametrize(
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
        return tome.merged(model, x).slot


@pytest.mark.parametrize("r", SCHEDULES, ids=str)
@DTYPES
@pytest.mark.parametrize("host", HOSTS)
def test_the_same_logits(host, dtype, autocast, r):
    compare(tome.patch.timm(make(host, **WIDE)).cuda(), images(32).cuda(), dtype, autocast, r)


@pytest.mark.parametrize("r", [8, (8, -1.0), 16, (16, -1.0)], ids=str)
@DTYPES
def test_the_same_logits_at_full_size(dtype, autocast, r):
    compare(tome.patch.timm(make("plain", **REAL)).cuda(), images(16, 224).cuda(), dtype, autocast, r)


def compare(
    model: nn.Module, x: Tensor, dtype: torch.dtype, autocast: torch.dtype | None, r: schedule.Schedule
) -> None:
    model.r = r
    truth_model = copy.deepcopy(model).double()
    model = model.to(dtype)
    with tome.use_backend("cuda"), recording.recorded() as calls:
        logits(model, x.to(dtype), "cuda", autocast)
    assert {call.backend for call in calls} <= {None, "torch", "cuda"}
    truth = logits(truth_model, x.double(), "reference", None)
    ours, theirs = (logits(model, x.to(dtype), name, autocast) for name in ("cuda", "reference"))
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape

    plan = schedule.plan(
        r, len(model.blocks), cost.tokens(model), tome.patch.auto(copy.deepcopy(model))._tome_prefix()[0]
    )
    size = model._tome_info["size"]
    assert (cost.tokens(model) if size is None else size.shape[1]) == plan.tokens[-1]

    # In half precision rounding makes either backend choose a few other pairs than float64 does, and an image with
    # another pair says nothing. So images with the same pairs count, where they are most for both backends; the kernels
    # must keep about as many as the reference. Over many layers hardly an image keeps them all: there the batch counts.
    with nullcontext() if autocast is None else torch.autocast("cuda", autocast):
        chosen = [slots(model, x.to(dtype), name) for name in ("cuda", "reference")]
    expected = slots(truth_model, x.double(), "reference")
    same = [(slot == expected).all(dim=1) for slot in chosen]
    shares = [float(each.float().mean()) for each in same]
    assert shares[0] >= shares[1] - 0.35, shares
    counted = same[0] & same[1] if min(shares) > 0.5 else torch.ones_like(same[0])
    floor = STEPS * FLOOR[autocast or dtype] * float(truth.abs().max())
    errors = [float((out.double() - truth)[counted].square().mean().sqrt()) for out in (ours, theirs)]
    assert errors[0] <= errors[1] + floor, (errors, shares)


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_pairs_in_float32(host):
    """Real weights nearly never tie; a different pair would be the sign of more than rounding."""
    model = tome.patch.timm(make(host, **WIDE)).cuda()
    model.r = 4
    x = images(16).cuda()
    ours, theirs = (slots(model, x, name) for name in ("cuda", "reference"))
    assert float((ours != theirs).any(dim=1).float().mean()) <= 1 / 16


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_the_gradients_under_autocast(autocast):
    """No further from float64's than the reference's own, plus rounding."""
    model = tome.patch.timm(make("deit3 layer scale", **WIDE)).cuda()
    model.r = 4
    found = {}
    for name, each, dtype in (
        ("truth", copy.deepcopy(model).double(), None),
        *((name, model, autocast) for name in ("cuda", "reference")),
    ):
        each.zero_grad()
        with torch.enable_grad():
            x = images(4).cuda().to(next(each.parameters()).dtype)
            logits(each, x, "reference" if name == "truth" else name, dtype).float().square().sum().backward()
        found[name] = torch.cat([p.grad.double().flatten() for p in each.parameters() if p.grad is not None])
    errors = {name: float((found[name] - found["truth"]).norm()) for name in ("cuda", "reference")}
    assert errors["cuda"] <= 1.5 * errors["reference"] + FLOOR[autocast] * float(found["truth"].norm())


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


def test_a_graph_of_a_model_replays_on_new_images():
    """Matching runs on a branch of its own there; the results are those of running one by one."""
    model = tome.patch.timm(make("plain", **REAL)).half().cuda()
    model.r = 8
    x = images(2, 224).half().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    for _ in range(10):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, model(x))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_graph_of_a_step_of_training_replays(drop_path):
    """With the halves of eager training, its gradients to the last bit, and its draws of stochastic depth."""
    model = make("plain", **REAL, drop_path_rate=drop_path).cuda().train()
    tome.patch.timm(model).r = 8
    x = images(4, 224).cuda()

    def step() -> None:
        with torch.enable_grad():
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model(x).float().square().mean()
            loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side), recording.recorded() as calls:
        step()
    assert [call.op for call in calls if call.reason == "one call"].count("attend_half") == len(model.blocks)
    captured = {name: p.grad for name, p in model.named_parameters()}
    for seed in range(3):
        x.normal_()
        torch.manual_seed(seed)
        graph.replay()
        found = {name: grad.clone() for name, grad in captured.items()}
        model.zero_grad()
        torch.manual_seed(seed)
        step()
        for name, p in model.named_parameters():
            assert torch.equal(found[name], p.grad), (seed, name)


def test_the_report_of_a_model_names_the_kernels():
    model = tome.patch.timm(make("plain", **WIDE)).half().cuda()
    model.r = 4
    with tome.use_backend("auto"):
        parts = report.ranges(report.parts(model, images().half().cuda()))
    # The first block has no addition to wait for, and of the last the class token is read.
    assert [part.name for part in parts] == ["patch_embed", "blocks.0", "blocks.1-2", "blocks.3", "norm"]
    assert [call.op for call in parts[0].calls] == ["matrix product"]
    attend, mlp = halves = parts[2].calls
    assert attend == recording.Call("attend_half", "cuda", "one call")
    assert mlp[:2] == ("mlp_half", "cuda")
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert mlp.reason.startswith("one call with GELU inside" if is_hopper else "one call without a product with GELU")
    assert parts[3].calls[:2] == halves
    assert [(call.op, call.backend) for call in parts[3].calls[2:]] == [("restore", None)]
    assert parts[4].calls == (recording.Call("merge_add_norm", "cuda", None),)
    with tome.use_backend("auto"):
        wide = report.ranges(report.parts(model.float(), images().cuda()))[2]
    (half,) = [call for call in wide.calls if call.op == "attend_half"]
    assert half.backend is None
    assert "the kernels of attention know float16 and bfloat16" in half.reason
    (attention,) = [call for call in wide.calls if call.op == "attention"]
    assert "by torch: the kernels of attention know float16 and bfloat16" in attention.reason


@pytest.mark.parametrize("gelu", ["erf", "quick"])
def test_autocast_decides_what_halves_compute_in(gelu):
    """What float16 weights make of float16 tokens is no float16 number, and one of autocast's dtype."""
    channels, norm = 32, (None, None, 1e-5)
    x, y = torch.zeros(2, 9, channels, device="cuda"), torch.full((2, 9, channels), 300.0, device="cuda").half()
    large, small = (torch.full((channels, channels), n, device="cuda").half() for n in (300.0, 1e-3))
    values = torch.cat((torch.zeros(2 * channels, channels, device="cuda").half(), large))
    with tome.use_backend("cuda"), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        attend = (x, (y,), 1, None, None, 7, 1, True, None, (values, None), (small, None), None, norm, None)
        mlp = (x, y, (large, None), gelu, (small, None), None, norm, None)
        for name, args in (("attend_half", attend), ("mlp_half", mlp)):
            assert ops.one_call(name, *args) is not None
            made = getattr(ops, name)(*args)[0]
            assert bool((made.isfinite() & (made > 65504.0)).all())


def launches(model: nn.Module, x: Tensor) -> int:
    """How many kernels a pass launches."""
    model(x)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # without it torch 2.11 warns
        model(x)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key)


def test_a_block_launches_no_more_kernels_than_unpatched():
    x = images(64, 224).half().cuda()
    counts = {}
    for depth in (2, 4):
        model = make("plain", **{**REAL, "depth": depth}).half().cuda()
        counts["unpatched", depth] = launches(model, x)
        tome.patch.timm(model).r = 8
        counts["patched", depth] = launches(model, x)
    patched, unpatched = (counts[name, 4] - counts[name, 2] for name in ("patched", "unpatched"))
    assert 0 < patched <= unpatched, counts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_on_a_second_gpu(dtype):
    model = tome.patch.timm(make("plain", **REAL)).to(dtype).cuda()
    model.r = 8
    x = images(4, 224).to(dtype).cuda()
    expected = logits(model, x, "cuda", None)
    assert torch.cuda.current_device() == 0
    other = logits(model.to("cuda:1"), x.to("cuda:1"), "cuda", None)
    assert other.device.index == 1
    assert torch.equal(other.to(x.device), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_is_not_to_use_them_is_the_unpatched_one_bit_for_bit(dtype):
    model = make("plain", **WIDE).to(dtype).cuda()
    twin = tome.patch.timm(copy.deepcopy(model), use_cuda_ext=False)
    x = images().to(dtype).cuda()
    with tome.use_backend("auto"):
        assert torch.equal(twin(x), model(x))


def test_auto_takes_the_kernels():
    model = tome.patch.timm(make("plain")).cuda()
    model.r = 4
    x = images().cuda()
    with tome.use_backend("auto"):
        assert torch.equal(model(x), logits(model, x, "cuda", None))
