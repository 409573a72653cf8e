"""The command line, through its entry point."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from PIL import Image

import tome.cli
import tome_cuda

TINY = "test_vit"


def tome_command(*args, **env):
    (entry,) = entry_points(group="console_scripts", name="tome")
    assert entry.value == "tome.cli:main"
    return subprocess.run(
        [shutil.which("tome", path=os.path.dirname(sys.executable)) or "tome", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **env},
    )


def run(capsys, *args):
    """The same without a new process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        tome.cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    ramp = np.linspace(0, 255, 120 * 90 * 3).reshape(90, 120, 3).astype(np.uint8)
    Image.fromarray(ramp).save(file)
    return file


def test_info_through_the_installed_command():
    result = tome_command("info")
    assert result.returncode == 0, result.stderr
    for text in ("match", "merge_add_norm", "backend: auto", "torch", torch.__version__, "driver"):
        assert text in result.stdout
    if tome.backend.extension_problem() is not None:
        assert tome.backend.extension_problem() in result.stdout
    for fact in tome_cuda.build_info().values():
        assert fact in result.stdout
    assert "backend: reference" in tome_command("info", TOME_BACKEND="reference").stdout
    wrong = tome_command("info", TOME_BACKEND="abacus")
    assert wrong.returncode == 2
    assert "unknown backend 'abacus'; choose one of auto, reference, cuda" in wrong.stderr


@pytest.mark.parametrize("command", ["info", "bench", "visualize"])
def test_help_has_examples(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"tome {command}" in out.split("Examples:")[1]


def test_version_and_bare_call(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, "0.1.0" in out) == (0, True)
    code, _, err = run(capsys)
    assert code == 2
    assert "bench" in err


def test_bench(tmp_path, capsys):
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    options = ["--r", "4", "--r", "6,-1.0", "--r", "0.1", "--batch-size", 2, "--runs", 3, "--warm-up", 1]
    code, out, err = run(
        capsys, "bench", TINY, *options, "--device", "cpu", "--json", figures, "--plot", plot, "--compile"
    )
    assert code == 0, err
    data = json.loads(figures.read_text())
    assert data["conditions"]["model"] == TINY
    assert data["conditions"]["torch"] == torch.__version__
    assert [(row["r"], row["mode"]) for row in data["results"]] == [
        (r, mode) for r in ("none", "4", "(6, -1.0)", "0.1") for mode in ("eager", "compiled")
    ]
    for row in data["results"]:
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["share"] == pytest.approx(row["speedup"] / row["allowed"])
        assert row["peak_mib"] > 0
    base = data["results"][0]
    assert (base["speedup"], base["allowed"]) == (1.0, 1.0)
    assert data["results"][2]["speedup"] == pytest.approx(base["median_ms"] / data["results"][2]["median_ms"])
    assert data["results"][2]["allowed"] == pytest.approx(base["gflops"] / data["results"][2]["gflops"])
    assert data["results"][2]["allowed"] > 1
    for text in ("speed-up", "allowed", "spread", "MiB", "(6, -1.0) compiled", torch.__version__):
        assert text in out
    with Image.open(plot) as picture:
        assert picture.size > (300, 300)


def test_visualize(photo, tmp_path, capsys):
    other = tmp_path / "again" / "photo.png"
    other.parent.mkdir()
    shutil.copy(photo, other)
    out = tmp_path / "pictures"
    code, text, err = run(
        capsys, "visualize", photo, other, "--model", TINY, "--r", "20", "--out", out, "--random-weights"
    )
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["photo_merged.png", "photo_merged_2.png"]
    drawn = np.asarray(Image.open(out / "photo_merged.png"))
    assert drawn.shape == (160, 2 * 160 + 8, 3)
    assert "tokens" in text
    left, right = drawn[:, :160], drawn[:, 168:]
    assert not np.array_equal(left, right)
    assert len(np.unique(right.reshape(-1, 3), axis=0)) < len(np.unique(left.reshape(-1, 3), axis=0))


def bad(*args):
    return pytest.param(args[:-1], args[-1], id=" ".join(map(str, args[:-1]))[:60])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad("frobnicate", "No such command 'frobnicate'"),
        bad("bench", "Missing argument 'MODEL'"),
        bad("bench", "vit_huge_patch99", "unknown model 'vit_huge_patch99'; timm has, for instance, "),
        bad("bench", "resnet18", "ResNet is not supported"),
        bad("bench", TINY, "--r", "eight", "'eight': not a schedule (forms: 8 or 8,-1.0 or [8,8,4] or 0.05)"),
        bad("bench", TINY, "--r", "-3", "r must not be negative, got -3"),
        bad("bench", TINY, "--r", "8,2.0", "inflection must be in [-1, 1], got 2.0"),
        bad("bench", TINY, "--r", "1.5", "ratio must be in (0, 1), got 1.5"),
        bad("bench", TINY, "--r", "[1,1,1,1,1,1,1,1]", "8 entries for a model of"),
        bad("bench", TINY, "--r", "300", "300 is too large: test_vit has"),
        bad("bench", TINY, "--batch-size", "0", "0 is not in the range x>=1"),
        bad("bench", TINY, "--dtype", "int8", "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        bad("bench", TINY, "--device", "toaster", "unknown device 'toaster': use cpu or cuda"),
        bad("bench", TINY, "--device", "cpu", "--cuda-graph", "--cuda-graph: needs --device cuda, not cpu"),
        bad("bench", TINY, "--json", "/no/such/folder/f.json", "there is no folder /no/such/folder"),
        bad("visualize", "Missing argument 'IMAGE...'"),
        bad("visualize", "missing.jpg", "there is no file missing.jpg"),
        bad("visualize", __file__, "--random-weights", "is not a readable image"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(args, message, capsys):
    code, _, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert err.startswith("tome: error: ")
    assert len(err.strip().splitlines()) == 1


def test_a_corrupt_image(tmp_path, capsys, photo):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(photo.read_bytes()[:200])
    code, _, err = run(capsys, "visualize", corrupt, "--model", TINY, "--random-weights")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "is not a readable image" in err


def test_weights_that_cannot_be_loaded_name_the_way_out(photo, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, _, err = run(capsys, "visualize", photo, "--model", TINY, "--out", tmp_path)
    assert code == 2
    assert "cannot load the pretrained weights of 'test_vit'" in err
    assert "--random-weights" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    code, _, err = run(capsys, "bench", TINY, "--device", "cuda")
    assert code == 2
    assert "needs an NVIDIA GPU and none is available: use cpu" in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:token merging runs on the PyTorch reference")
def test_bench_on_the_gpu_as_a_graph(capsys):
    code, out, err = run(
        capsys, "bench", TINY, "--r", "4", "--device", "cuda", "--dtype", "float16", "--cuda-graph", "--runs", 3
    )
    assert code == 0, err
    assert "cuda graph True" in out
