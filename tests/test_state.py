"""A patched model is still a model: copies, pickles, threads, checkpoints, autocast, training."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import HOSTS, images, make

import tome

SOME = ["plain", "deit distilled", "dinov2 registers", "siglip map", "mae avg", "q/k norm", "res-post-norm"]
every_host = pytest.mark.parametrize("host", HOSTS)
some_hosts = pytest.mark.parametrize("host", SOME)


@pytest.fixture(autouse=True)
def reference_backend():
    with tome.use_backend("reference"):
        yield


def patched(host, r=5, **kwargs):
    model = tome.patch.timm(make(host), **kwargs)
    model.r = r
    return model


@some_hosts
def test_deepcopy_and_pickle(host):
    model = patched(host, (5, -1.0), trace_source=True)
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.r == (5, -1.0)
        assert torch.equal(twin(images()), expected)
        twin.r = 0
        assert model.r == (5, -1.0)
    assert torch.equal(model(images()), expected)


def test_a_pickle_does_not_carry_the_last_batch():
    model = patched("plain", trace_source=True)
    before = len(pickle.dumps(model))
    model(images(64))
    assert len(pickle.dumps(model)) == before
    assert copy.deepcopy(model)._tome_info["source"] is None


@some_hosts
def test_state_dict_is_that_of_the_unpatched_model(host):
    model = patched(host)
    expected = model(images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = make(host)
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(torch.load(file, weights_only=True))
    tome.patch.timm(plain).r = 5
    assert torch.equal(plain(images()), expected)


def test_two_threads_at_once():
    model = patched("mae avg", (6, -1.0))
    batches = [images(1 + i % 3, 48) * (1 + i) for i in range(24)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, batches))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_host
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(host):
    model = patched(host).train()
    outcomes = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        out = model(images())
        loss = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*outcomes, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in outcomes[0]) > 20


def test_a_compiled_checkpoint_merges_as_the_model_does():
    model = patched("plain", 3).train()
    outcomes = []
    for checkpointing, run in ((False, model), (True, torch.compile(model, backend="aot_eager"))):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        loss = run(images()).square().sum()
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*outcomes, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_training_with_merging_learns():
    torch.manual_seed(0)
    model = patched("plain").train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = images(16), torch.arange(16) % 7
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_distilled_training_returns_both_predictions():
    model = patched("deit distilled").train()
    model.set_distilled_training(True)
    assert [o.shape for o in model(images())] == [(2, 7), (2, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some_hosts
def test_autocast_and_half_stay_near_float32(host, dtype):
    model = patched(host, 3)
    exact = model(images())
    with torch.autocast("cpu", dtype):
        mixed = model(images())
    half = copy.deepcopy(model).to(dtype)(images().to(dtype))
    # Another choice of pairs is allowed in half precision; nonsense is not.
    scale = exact.abs().max()
    assert (mixed - exact).abs().max() < 0.25 * scale
    assert half.dtype == dtype
    assert (half - exact).abs().max() < 0.25 * scale


def test_double():
    model = patched("plain").double()
    assert model(images().double()).dtype == torch.float64


def test_inference_mode_and_empty_batch():
    model = patched("plain")
    with torch.inference_mode():
        assert model(images()).shape == (2, 7)
        assert model(images()[:0]).shape == (0, 7)


def test_patch_dropout():
    model = tome.patch.timm(make("plain", patch_drop_rate=0.5)).train()
    model.r = 2
    assert tome.merged(model, images()).count() == 19 - 8
    assert model.forward_features(images()).shape[1] == 19


def test_patching_again_changes_the_options_and_starts_over():
    model = patched("plain")
    tome.patch.timm(model, trace_source=True)
    assert model.r == 0
    model.r = 5
    model(images())
    assert model._tome_info["source"].shape == (2, 37 - 20, 37)
    tome.unpatch(model)
    assert not hasattr(model, "r")
