"""Who computes: the choice, its errors, its one warning, and what importing loads."""

import inspect
import json
import pickle
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import images, make

import tome
import tome_reference
from tome import backend, ops

X = torch.randn(1, 8, 4)
MISSING = backend.extension_problem()


class FakeCudaTensor(torch.Tensor):
    """A CPU tensor that says it is on a GPU, to reach the choice without one."""

    is_cuda = True


def on_gpu() -> torch.Tensor:
    return X.as_subclass(FakeCudaTensor)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(backend, "extension_problem", lambda: "the CUDA extension is not installed. Fix: build it")
    monkeypatch.setattr(backend, "_warned", False)


@pytest.fixture
def fake_extension(monkeypatch):
    fake = types.ModuleType("tome_cuda")
    fake.why_not = lambda op, *args, **kwargs: "head dim 300 is above 256" if op == "attention" else None
    fake.match = fake.attention = fake.follow = lambda *args, **kwargs: "from the extension"
    monkeypatch.setitem(sys.modules, "tome_cuda", fake)
    monkeypatch.setattr(backend, "extension_problem", lambda: None)


def test_default_is_auto_and_set_backend_chooses_for_the_process():
    assert tome.get_backend() == "auto"
    try:
        tome.set_backend("reference")
        assert tome.get_backend() == "reference"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tome.get_backend).result() == "reference"
    finally:
        tome.set_backend("auto")


def test_use_backend_nests_and_holds_for_its_thread_only():
    with tome.use_backend("reference"):
        with tome.use_backend("cuda"), tome.use_backend(None):
            assert tome.get_backend() == "cuda"
        assert tome.get_backend() == "reference"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tome.get_backend).result() == "auto"
    assert tome.get_backend() == "auto"
    with pytest.raises(KeyError), tome.use_backend("reference"):
        raise KeyError
    assert tome.get_backend() == "auto"


@pytest.mark.parametrize("choose", [tome.set_backend, tome.use_backend])
def test_an_unknown_name_is_refused_with_the_choices(choose):
    with pytest.raises(ValueError, match="unknown backend 'triton'; choose one of auto, reference, cuda"):
        choose("triton")
    assert tome.get_backend() == "auto"


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses():
    assert run("import tome; print(tome.get_backend())", TOME_BACKEND="reference").stdout == "reference\n"
    wrong = run("import tome, torch; tome.ops.match(torch.ones(1, 4, 2), 1)", TOME_BACKEND="tpu")
    assert "ValueError: unknown backend 'tpu'; choose one of auto, reference, cuda" in wrong.stderr


def test_auto_is_silent_on_the_cpu(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.match(X, 2)


def test_auto_warns_once_for_a_gpu_without_extension(no_extension):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ops.match(on_gpu(), 2)
        ops.match(on_gpu(), 2)
    (warning,) = map(str, (each.message for each in told))
    assert f"runs on {backend.REFERENCE}: " in warning
    assert "slower than the unpatched model" in warning
    assert warning.endswith(": the CUDA extension is not installed. Fix: build it")


def test_the_warning_s_figures_are_the_stored_ones():
    stored = Path(__file__).parents[1] / "benchmarks" / "results" / "h200-base-sweep.json"
    rows = json.loads(stored.read_text())["results"]
    found = [row["speedup"] for row in rows if row["backend"] == "reference" and row["r"] != "0"]
    assert f"({min(found):.2f}x to {max(found):.2f}x of its images/s" in backend.REFERENCE


def test_explicit_cuda_raises_with_the_reason_and_never_falls_back(no_extension):
    with (
        tome.use_backend("cuda"),
        pytest.raises(tome.BackendError, match="cannot run match: the CUDA extension is not installed"),
    ):
        ops.match(X, 2)


def test_the_extension_runs_where_it_can(fake_extension):
    assert ops.match(on_gpu(), 2) == "from the extension"
    assert isinstance(ops.match(X, 2), torch.Tensor)
    with tome.use_backend("reference"):
        assert isinstance(ops.match(on_gpu(), 2), torch.Tensor)
    q = torch.randn(1, 1, 4, 8).as_subclass(FakeCudaTensor)
    assert ops.attention(q, q, q).shape == q.shape
    with tome.use_backend("cuda"), pytest.raises(tome.BackendError, match="attention: head dim 300"):
        ops.attention(q, q, q)


def test_a_patched_model_chooses_cuda_as_a_whole(fake_extension):
    kernels = sys.modules["tome_cuda"]
    for op in tome_reference.__all__:
        setattr(kernels, op, getattr(tome_reference, op))
    kernels.why_not = lambda op, *args, **kwargs: None
    kernels.PREDICATES = dict.fromkeys(tome_reference.__all__, lambda *args, **kwargs: None)
    model = tome.patch.timm(make("plain"))
    model.r = 3
    with torch.no_grad(), tome.use_backend("reference"):
        expected = model(images())
    with torch.no_grad(), tome.use_backend("cuda"):
        assert torch.equal(model(images()), expected)


@pytest.mark.skipif(MISSING is None, reason="the extension can run here")
def test_the_reason_says_what_mends_it():
    assert ". Fix: " in MISSING


def test_importing_tome_loads_nothing_heavy():
    code = (
        "import sys, tome\n"
        "heavy = {'tome_cuda', 'matplotlib', 'transformers', 'torchvision', 'timm', 'rich', 'click', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = run(code)
    assert result.stdout == "[]\n", result.stderr


def test_imports_run_one_way():
    result = run("import sys, tome_reference; print([m for m in sys.modules if m.split('.')[0] in ('tome', 'timm')])")
    assert result.stdout == "[]\n", result.stderr


def test_operations_are_those_of_the_reference_to_whoever_asks():
    assert {*ops.__all__} == {*tome_reference.__all__, "one_call", "take"}
    for name in tome_reference.__all__:
        op, definition = getattr(ops, name), getattr(tome_reference, name)
        assert op.__doc__ == definition.__doc__
        assert inspect.signature(op) == inspect.signature(definition)
        assert pickle.loads(pickle.dumps(op)) is op  # a model that is given one as its matching is pickled with it


def test_operations_take_keywords(fake_extension):
    expected = tome_reference.match(X, 2)
    assert torch.equal(ops.match(keys=X, r=2), expected)
    assert torch.equal(ops.match(X, r=2, prefix=1), expected)
    assert ops.match(keys=on_gpu(), r=2) == "from the extension"
    with pytest.raises(TypeError, match="unexpected keyword argument 'ratio'"):
        ops.match(X, ratio=2)


def test_a_list_of_maps_lies_where_its_first_one_does(fake_extension):
    slot = torch.arange(8, dtype=torch.int32)[None]
    assert ops.follow([slot.as_subclass(FakeCudaTensor), slot]) == "from the extension"
    assert torch.equal(ops.follow((slot, slot)), slot)
