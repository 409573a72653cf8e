"""The command line, through its entry point."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
from entry import bad, run
from PIL import Image
from safetensors.torch import load_file, save_file

import tome
import tome.cli
import tome_cuda
from tome.cli import arguments, files, sources, tables
from tome.cli.models import create_model

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


def test_without_a_gpu_a_forced_cuda_is_an_error_after_the_facts(monkeypatch, capsys):
    monkeypatch.setattr(tome.backend, "extension_problem", lambda: "it is not built")
    with tome.use_backend("cuda"):
        code, out, err = run(capsys, "info")
    assert code == 2
    assert "backend: cuda" in out
    assert "cuda: it is not built" in out
    assert err == "tome: error: TOME_BACKEND chose cuda, which cannot run here: no operation can\n"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_info_tells_who_has_a_gpu_that_the_reference_is_slower(monkeypatch, capsys, has_gpu):
    monkeypatch.setattr(tome.backend, "extension_problem", lambda: "it is not built. Fix: build it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert out.count("cuda: it is not built. Fix: build it") == 1
    assert ("slower than the unpatched model" in out) is has_gpu


@pytest.mark.parametrize("command", ["info", "hosts", "bench", "evaluate", "tune", "report", "visualize"])
def test_help_has_examples(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"tome {command}" in out.split("Examples:")[1]


AT_ONCE = [
    "--help",
    "--version",
    "bench --help",
    "evaluate --help",
    "evaluate test_vit --data x --mean 1,2",
    "evaluate test_vit --data x --resume",
    "report --help",
    "report test_vit --data x --no-tune --speedup 2",
    "info --help",
    "hosts --help",
    "visualize --help",
    "frobnicate",
    "bench nosuchdir --r x",
    "info test_vit --device mps",
    "bench test_vit --dtype float16 --autocast bfloat16",
    "bench test_vit --backend abacus",
    "bench test_vit --json /no/such/folder/f.json",
    "visualize missing.jpg",
]


@pytest.mark.parametrize("line", AT_ONCE)
def test_help_and_mistakes_do_not_wait_for_torch(line):
    assert not loaded_by(line)


COMPLETING = {"_TOME_COMPLETE": "bash_complete", "COMP_WORDS": "tome bench --de", "COMP_CWORD": "2"}


def test_completion_does_not_wait_for_torch():
    assert not loaded_by("", **COMPLETING)


def test_completion():
    assert tome_command(**COMPLETING).stdout == "plain,--device\n"
    assert "_TOME_COMPLETE=zsh_source tome" in tome_command("--help").stdout
    for shell in ("zsh", "fish"):
        script = tome_command(_TOME_COMPLETE=f"{shell}_source")
        assert (script.returncode, f"_TOME_COMPLETE={shell}_complete" in script.stdout) == (0, True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash():
    folder = os.path.dirname(shutil.which("tome", path=os.path.dirname(sys.executable)) or "tome")
    lines = (
        f'export PATH="{folder}:$PATH"; eval "$(_TOME_COMPLETE=bash_source tome)"',
        "COMP_WORDS=(tome ev); COMP_CWORD=1; $(complete -p tome | grep -o '_tome[a-z_]*' | head -1) tome ev tome",
        'echo "${COMPREPLY[@]}"',
    )
    result = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert result.stdout == "evaluate\n", result.stderr


def loaded_by(line, **env):
    """Which slow modules a command line loads."""
    code = (
        "import atexit, sys\n"
        "slow = {'torch', 'timm', 'tome_reference', 'numpy', 'matplotlib', 'rich', 'PIL'}\n"
        "slow |= {'torchvision', 'transformers', 'open_clip'}\n"
        "atexit.register(lambda: print('loaded:', *slow & set(sys.modules)))\n"
        "from tome.cli import main; main(sys.argv[1:])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False,
        env={**os.environ, **env},
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    return result.stdout.partition("loaded:")[2].split()


def test_help_comes_at_once():
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tome", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0  # 0.1 on an idle machine; importing torch takes several


@pytest.mark.parametrize(("module", "swallows"), [("click", False), ("torch", False), ("torch", True)])
def test_stopped_while_modules_are_imported(tmp_path, module, swallows):
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\n"
    if swallows:  # as some modules do
        interrupted = "try:\n    " + interrupted.replace("\n", "\n    ") + "pass\nexcept BaseException:\n    pass\n"
    (tmp_path / f"{module}.py").write_text(interrupted)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "tome", "info"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (130, "tome: stopped\n")


def test_stopped_while_it_runs(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tome.report, "parts", interrupt)
    code, _, err = run(capsys, "info", TINY, "--r", "4")
    assert (code, err.strip()) == (130, "tome: stopped")


def test_choices_are_those_of_the_library(monkeypatch, capsys):
    assert arguments.BACKENDS == tome.backend.CHOICES
    assert [getattr(torch, name).is_floating_point for name in arguments.DTYPES] == [True] * 3
    monkeypatch.setenv("TOME_BACKEND", "abacus")
    for command in ("info", "bench", "visualize"):
        code, _, err = run(capsys, command, __file__)
        assert (code, err) == (
            2, "tome: error: TOME_BACKEND: unknown backend 'abacus'; choose one of auto, reference, cuda\n"
        )  # fmt: skip


def test_version_and_bare_call(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"tome, version {tome.__version__}\n")
    code, _, err = run(capsys)
    assert code == 2
    assert "bench" in err


def test_bench(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)  # others test the compiler
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    options = ["--r", "4", "--r", "6,-1.0", "--r", "0.1", "--batch-size", 2, "--runs", 3, "--warm-up", 1]
    code, out, err = run(
        capsys, "bench", TINY, *options, "--device", "cpu", "--json", figures, "--plot", plot, "--compile"
    )
    assert code == 0, err
    assert [getattr(model, "r", "none") for model in compiled] == ["none", 0, 4, (6, -1.0), 0.1]
    data = json.loads(figures.read_text())
    assert data["conditions"]["model"] == TINY
    assert data["conditions"]["torch"] == torch.__version__
    assert [(row["r"], row["mode"]) for row in data["results"]] == [
        (r, mode) for r in ("none", "0", "4", "(6, -1.0)", "0.1") for mode in ("eager", "compiled")
    ]
    for row in data["results"]:
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["share"] == pytest.approx(row["speedup"] / row["allowed"])
        assert row["peak_mib"] > 0
    base = data["results"][0]
    assert (base["speedup"], base["allowed"]) == (1.0, 1.0)
    unmerged, merged = data["results"][2], data["results"][4]
    assert merged["speedup"] == pytest.approx(base["median_ms"] / merged["median_ms"])
    assert merged["merging"] == pytest.approx(unmerged["median_ms"] / merged["median_ms"])
    assert (base["merging"], unmerged["merging"], unmerged["allowed"]) == (None, 1.0, 1.0)
    assert merged["allowed"] == pytest.approx(base["gflops"] / merged["gflops"])
    assert merged["allowed"] > 1
    for text in ("speed-up", "merging", "allowed", "spread", "MiB", "(6, -1.0) compiled", torch.__version__):
        assert text in out
    with Image.open(plot) as picture:
        assert picture.size > (300, 300)


def test_bench_in_a_narrow_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    figures = tmp_path / "figures.json"
    options = ["--r", "4", "--r", "6,-1.0", "--runs", "1", "--batch-size", "1", "--device", "cpu"]
    code, out, err = run(capsys, "bench", TINY, *options, "--json", figures)
    assert code == 0, err
    table = out[: out.index("spread: quartile")].rstrip().splitlines()
    assert max(map(len, table)) <= 60
    row = next(line for line in table if line.startswith(" (6, -1.0)")).split()
    assert row[4] == "-", "one run has no spread"
    assert row[-1].endswith("x")
    assert all(each["spread_percent"] is None for each in json.loads(figures.read_text())["results"])


@pytest.mark.parametrize(
    ("rate", "told"), [(25004.2, "25000"), (22880.0, "22900"), (54.321, "54.3"), (0.57455, "0.575"), (1.0, "1")]
)
def test_images_per_second_have_three_digits(rate, told):
    assert tables.rate(rate) == told


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
    assert drawn.shape == (450, 2 * 450 + 8, 3)  # 10 x 10 patches, of as many pixels as make 448
    assert "tokens" in text
    left, right = drawn[:, :450], drawn[:, 458:]
    assert not np.array_equal(left, right)
    assert len(np.unique(right.reshape(-1, 3), axis=0)) < len(np.unique(left.reshape(-1, 3), axis=0))


HYBRID = "vit_tiny_r_s16_p8_224"


def test_models_whose_stem_is_a_network(photo, tmp_path, capsys):
    code, out, err = run(capsys, "info", HYBRID, "--r", "4", "--device", "cpu")
    assert code == 0, err
    assert "blocks.0" in out
    code, out, err = run(capsys, "bench", HYBRID, "--batch-size", 1, "--runs", 1, "--warm-up", 0, "--device", "cpu")
    assert code == 0, err
    assert "50-2 " in out
    assert "2.13x" in out
    assert "(16, -1.0)" not in out, "the default schedules are those that fit"
    code, out, err = run(
        capsys, "visualize", photo, "--model", HYBRID, "--random-weights", "--r", "9", "--out", tmp_path
    )
    assert code == 0, err
    assert "50 -> 2 tokens" in out
    with Image.open(tmp_path / "photo_merged.png") as picture:
        assert picture.size == (2 * 448 + 8, 448)


def test_visualize_layer_by_layer_on_one_sheet_or_as_steps(photo, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.open(photo).rotate(90).save(other)
    drawn = ("visualize", photo, other, "--model", TINY, "--random-weights", "--r", "9", "--out", tmp_path)
    code, out, err = run(capsys, *drawn, "--layers", "--sheet", tmp_path / "all.png")
    assert code == 0, err
    *_, drawn_into, told = out.strip().splitlines()
    assert drawn_into == f"{tmp_path / 'all.png'}: 101 -> 47 tokens"
    assert told == "the weights are random: a trained model merges other patches"
    sheet = np.asarray(Image.open(tmp_path / "all.png"))
    assert sheet.shape == (2 * (450 + 28) + 8, 7 * 458 - 8, 3)  # six layers and the image
    assert not np.array_equal(sheet[:450, :450], sheet[486:936, :450])
    assert not (tmp_path / "photo_merged.png").exists()

    code, _, err = run(capsys, *drawn, "--gif", "--image-size", "128x192")
    assert code == 0, err
    with Image.open(tmp_path / "photo_merged.gif") as steps:
        assert steps.n_frames == 7
        assert steps.size == (672, 448)  # 8 x 12 patches
        frames = []
        for i in range(7):
            steps.seek(i)
            frames.append(len(np.unique(np.asarray(steps.convert("RGB")).reshape(-1, 3), axis=0)))
        assert steps.info["duration"] > 1000, "the last stays"
    assert frames[0] > frames[1] > frames[6]


def test_visualize_draws_models_that_take_any_size(photo, tmp_path, capsys):
    drawn = ("visualize", photo, "--random-weights", "--r", "2", "--out", tmp_path, "--model")
    code, _, err = run(capsys, *drawn, "naflexvit_base_patch16_gap", "--image-size", "32x64")
    assert code == 0, err
    with Image.open(tmp_path / "photo_merged.png") as picture:
        assert picture.size == (2 * 896 + 8, 448)
    code, _, err = run(capsys, *drawn, "torchvision:vit_b_32", "--image-size", "32x64")
    assert (code, err) == (
        2, "tome: error: torchvision:vit_b_32 cannot be drawn: it takes no image of 32 x 64 pixels\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad("frobnicate", "No such command 'frobnicate'"),
        bad("bench", "Missing argument 'MODEL'"),
        bad("bench", "vit_huge_patch99", "unknown model 'vit_huge_patch99'; timm has, for instance, "),
        bad("bench", "resnet18", "ResNet is not supported"),
        bad("bench", TINY, "--r", "eight", "'eight': not a schedule (forms: 8 or 8,-1.0 or [8,8,4] or 0.05 or a .json"),
        bad("bench", TINY, "--r", "-3", "r must not be negative, got -3"),
        bad("bench", TINY, "--r", "8,2.0", "inflection must be in [-1, 1], got 2.0"),
        bad("bench", TINY, "--r", "1.5", "ratio must be in (0, 1), got 1.5"),
        bad("bench", TINY, "--r", "[1,1,1,1,1,1,1,1]", "8 entries for a model of"),
        bad("bench", TINY, "--r", "300", "300 is too large for test_vit: of 101 tokens, 1 of them protected, a layer"),
        bad("bench", TINY, "--r", "0.7", "0.7 is too large for test_vit: of 101 tokens"),
        bad("bench", TINY, "--batch-size", "0", "0 is not in the range x>=1"),
        bad("bench", TINY, "--dtype", "int8", "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        bad("bench", TINY, "--device", "toaster", "device 'toaster' is not supported: use cpu, cuda or"),
        bad("info", TINY, "--device", "mps", "device 'mps' is not supported: use cpu, cuda or cuda:N"),
        bad("bench", TINY, "--dtype", "float16", "--autocast", "bfloat16", "needs --dtype float32 or bfloat16, not"),
        bad("bench", TINY, "--device", "cpu", "--cuda-graph", "--cuda-graph: needs --device cuda, not cpu"),
        bad("bench", TINY, "--json", "/no/such/folder/f.json", "there is no folder /no/such/folder"),
        bad("bench", TINY, "--json", "/proc/f.json", "cannot write /proc/f.json: No such file or directory"),
        bad("bench", TINY, "--json", "/", "/ is a folder"),
        bad("bench", TINY, "--plot", "/proc/f.png", "cannot write /proc/f.png: No such file or directory"),
        bad("bench", TINY, "--plot", "x" * 300 + ".png", "File name too long"),
        bad("bench", TINY, "--plot", "x.bogus", "x.bogus: Format 'bogus' is not supported (supported formats: "),
        bad("visualize", "Missing argument 'IMAGE...'"),
        bad("visualize", "missing.jpg", "File 'missing.jpg' does not exist"),
        bad("visualize", __file__, "--random-weights", "--out", "/proc", "cannot write /proc/test_cli_merged.png: No"),
        bad("visualize", __file__, "--random-weights", "--out", __file__, "cannot make the folder "),
        bad("visualize", __file__, "--random-weights", "--checkpoint", __file__, "choose one of --checkpoint and "),
        bad("visualize", __file__, "--random-weights", "is not a readable image"),
        bad("visualize", __file__, "--image-size", "32x", "'32x': not a size (forms: 448 or 336x504, height first)"),
        bad("visualize", __file__, "--gif", "--layers", "choose one of --gif and --layers"),
        bad("visualize", __file__, "--gif", "--sheet", "all.png", "choose one of --gif and --sheet"),
        bad("visualize", __file__, "--sheet", "/no/such/all.png", "there is no folder /no/such"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tome.measure, "time_calls", None)  # nothing is measured before
    code, _, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert err.startswith("tome: error: ")
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_suggestions_can_be_patched(capsys):
    _, _, err = run(capsys, "bench", "vit_dwee_patch16_reg1_gap_2566")
    suggested = err.strip().partition("for instance, ")[2].split(", ")
    assert len(suggested) == 3
    for name in suggested:  # the nearest, vit_dwee_patch16_reg1_gap_256, has an attention that is not known
        tome.patch.timm(timm.create_model(name, depth=1))
    _, _, err = run(capsys, "bench", "timm/vit_tiny_patch16_224.augreg_in21k")
    assert "write hf-hub:timm/vit_tiny_patch16_224.augreg_in21k for the model hub or local-dir:" in err


@pytest.fixture
def weights(tmp_path):
    """Files of weights, by what they hold; they are of ten classes."""
    model = timm.create_model(TINY, num_classes=10)
    state = model.state_dict()
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(state, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "training.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, folder / "headless.pth")
    torch.save(state | {"extra": torch.ones(1)}, folder / "extra.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.5.")}, folder / "short.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), folder / "wide.pth")
    torch.save(torch.ones(3), folder / "tensor.pth")
    torch.save({}, folder / "empty.pth")
    torch.save(model, folder / "pickled.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "text.safetensors").write_text("hello")
    return folder


@pytest.mark.parametrize("file", ["plain.safetensors", "plain.pth", "training.pth", "headless.pth"])
def test_a_checkpoint_is_loaded(weights, file):
    model = create_model(TINY, checkpoint=weights / file)
    expected = load_file(weights / "plain.safetensors")
    assert torch.equal(model.blocks[5].mlp.fc2.weight, expected["blocks.5.mlp.fc2.weight"])
    if file == "headless.pth":
        assert isinstance(model.head, torch.nn.Identity)
    else:
        assert torch.equal(model.head.weight, expected["head.weight"])
    assert "state_dict" not in model.pretrained_cfg, "copies of the model would copy it"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("extra.pth", "does not fit 'test_vit' (Unexpected key(s) in state_dict: \"extra\"."),
        ("short.pth", "does not fit 'test_vit' (Missing key(s) in state_dict: \"blocks.5.norm1.weight\", "),
        ("wide.pth", "size mismatch for cls_token: copying a param with shape torch.Size([1, 1, 192]) from checkpoint"),
        ("tensor.pth", "cannot read weights from "),
        ("empty.pth", "empty.pth: there are none in it"),
        ("pickled.pth", "cannot read weights from "),
        ("text.pth", "cannot read weights from "),
        ("text.safetensors", "cannot read weights from "),
        ("missing.pth", "does not exist"),
    ],
)
def test_a_wrong_checkpoint_is_one_line(weights, file, message, capsys):
    code, _, err = run(capsys, "info", TINY, "--r", "4", "--checkpoint", weights / file)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 1000


def test_every_command_takes_checkpoints_and_folders(weights, photo, tmp_path, capsys, monkeypatch):
    file = weights / "plain.safetensors"
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "model.safetensors")
    config = {"architecture": TINY, "num_classes": 10, "pretrained_cfg": timm.get_pretrained_cfg(TINY).to_dict()}
    config["pretrained_cfg"]["num_classes"] = 10
    (folder / "config.json").write_text(json.dumps(config))
    pictures = []
    short = ["--r", "4", "--device", "cpu"]
    for model in ([TINY, "--checkpoint", file], [f"local-dir:{folder}"]):
        assert run(capsys, "info", *model, *short)[0] == 0
        assert run(capsys, "bench", *model, *short, "--batch-size", 1, "--runs", 1, "--warm-up", 0)[0] == 0
        code, _, err = run(capsys, "visualize", photo, "--r", "4", "--out", tmp_path, "--model", *model)
        assert code == 0, err
        pictures.append((tmp_path / "photo_merged.png").read_bytes())
    assert pictures[0] == pictures[1]
    code, _, err = run(capsys, "info", f"local-dir:{folder}", "--checkpoint", file)
    assert (code, "--checkpoint needs a plain name of timm's" in err) == (2, True)
    code, _, err = run(capsys, "info", f"local-dir:{tmp_path / 'nowhere'}")
    assert (code, "cannot load 'local-dir:" in err, len(err.splitlines())) == (2, True, 1)


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "hf_hub:timm/no-such-model"])
def test_names_of_the_hub(name, capsys, offline):
    code, _, err = run(capsys, "info", name)
    assert code == 2
    assert f"cannot load '{name}' (" in err
    assert "connect to the model hub" in err
    assert len(err.strip().splitlines()) == 1


def test_files_are_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("before")

    def write(text, error=None):
        with files.replacing(file) as target:
            target.write_text(text)
            assert file.read_text() == "before"
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half of it", KeyboardInterrupt())
    assert (file.read_text(), list(tmp_path.iterdir())) == ("before", [file])
    write("after")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("after", [file])
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_devices_and_links_are_not_replaced(tmp_path):
    def write(file):
        files.check(file, "--json")
        with files.replacing(file) as target:
            assert target == file
            target.write_text("figures")

    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "behind.json")
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "behind.json").read_text() == "figures"
    write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    with pytest.raises(click.ClickException, match="cannot write /dev/full: No space left on device"):
        write(Path("/dev/full"))


def test_a_corrupt_image(tmp_path, capsys, photo):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(photo.read_bytes()[:200])
    code, _, err = run(capsys, "visualize", corrupt, "--model", TINY, "--random-weights")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "is not a readable image" in err


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_weights_that_cannot_be_loaded_name_the_way_out(photo, capsys, offline, tmp_path):
    code, _, err = run(capsys, "visualize", photo, "--model", TINY, "--out", tmp_path)
    assert code == 2
    assert "cannot load the pretrained weights of 'test_vit'" in err
    assert "use --checkpoint, or --random-weights if only speed counts" in err
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


SIZES = {"image_size": 48, "patch_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32}


@pytest.fixture
def folders(tmp_path):
    """Folders of transformers' models: configurations, and one with weights."""
    transformers = pytest.importorskip("transformers")
    vision = SIZES | {"intermediate_size": 64}
    text = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    transformers.ViTConfig(**vision, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    transformers.VideoMAEConfig(**vision, num_frames=4).save_pretrained(tmp_path / "video")
    transformers.ViTMAEConfig(**vision).save_pretrained(tmp_path / "mae")
    clip = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    mean = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    transformers.CLIPImageProcessor(**mean).save_pretrained(tmp_path / "clip")
    return tmp_path


SHORT = ("--device", "cpu", "--batch-size", 1, "--runs", 1, "--warm-up", 0)


def test_models_of_transformers(folders, photo, tmp_path, capsys, monkeypatch):
    for name, layer in (("vit", "layers.0"), ("clip", "encoder.layers.0")):
        code, out, err = run(capsys, "info", f"hf:{folders / name}", "--r", "4", "--device", "cpu")
        assert code == 0, err
        assert layer in out
    code, out, err = run(capsys, "bench", f"hf:{folders / 'vit'}", "--r", "4", *SHORT)
    assert code == 0, err
    assert "37-21" in out

    made = sources.make(f"hf:{folders / 'clip'}", True, "cpu")
    saved = load_file(folders / "clip" / "model.safetensors")
    layer = "vision_model.encoder.layers.3.mlp.fc2.weight"
    assert torch.equal(made.model.get_parameter(layer.removeprefix("vision_model.")), saved[layer])
    told = {key: tuple(value) if key in ("mean", "std") else value for key, value in made.pixels().items()}
    assert told == {
        "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_mode": "center",
        "crop_pct": 1.0,
    }  # fmt: skip
    short = {key: value for key, value in saved.items() if key != layer}
    save_file(short, folders / "clip" / "model.safetensors", {"format": "pt"})
    lost = run(capsys, "visualize", photo, "--model", f"hf:{folders / 'clip'}", "--r", "6", "--out", tmp_path)
    check_one_line(lost, f"has no weights for {layer} of CLIPModel")
    save_file(saved, folders / "clip" / "model.safetensors", {"format": "pt"})
    for options in (["--model", f"hf:{folders / 'clip'}"], ["--model", f"hf:{folders / 'vit'}", "--random-weights"]):
        code, out, err = run(capsys, "visualize", photo, *options, "--r", "6", "--out", tmp_path)
        assert code == 0, err
        with Image.open(tmp_path / "photo_merged.png") as picture:
            assert picture.size == (2 * 450 + 8, 450)


def test_models_of_torchvision_and_of_ones_own(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import timm, torchvision\n"
        "def small():\n"
        "    return torchvision.models.VisionTransformer(48, 8, 4, 2, 32, 64)\n"
        "class Wrapper(torchvision.models.vision_transformer.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inside = timm.create_model('test_vit')\n"
        "    def forward(self, x):\n"
        "        return self.inside(x)\n"
        "def broken():\n"
        "    raise OSError('no disk\\nat all')\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, err = run(capsys, "info", "torchvision:vit_b_32", "--r", "4", "--device", "cpu")
    assert code == 0, err
    assert "encoder_layer_1-10" in out
    code, out, err = run(capsys, "bench", "my_models:small", "--r", "4", *SHORT)
    assert code == 0, err
    assert "37-21" in out
    code, out, err = run(capsys, "visualize", photo, "--model", "my_models:Wrapper", "--r", "20", "--out", tmp_path)
    assert code == 0, err
    assert "101 -> 6" in out
    for name, message in {
        "my_models:smal": "module 'my_models' has no function 'smal'; it has small",
        "my_models:broken": "cannot make 'my_models:broken' (no disk)",
        "my_models:number": "'my_models:number' returned a int, not a torch.nn.Module",
        "no_such_module:f": "there is no module 'no_such_module' (forms: hf:",
    }.items():
        check_one_line(run(capsys, "info", name), message)


def test_the_vision_tower_of_open_clip(monkeypatch, capsys, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 48, "patch_size": 8, "layers": 4, "width": 64, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    code, out, err = run(capsys, "info", "open_clip:tiny", "--r", "4", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "transformer.resblocks.1-2" in out
    told = sources.make("open_clip:tiny", False, "cpu").pixels()
    assert told["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert (told["crop_mode"], told["interpolation"]) == ("center", "bicubic")
    check_one_line(
        run(capsys, "info", "open_clip:tinny"), "unknown model open_clip:tinny; there are, for instance, tiny,"
    )
    check_one_line(run(capsys, "info", "open_clip:ViT-B-32/openia"), "for 'ViT-B-32', not 'openia'")


def check_one_line(result, message):
    code, _, err = result
    errors = [line for line in err.splitlines() if line.strip() and "%|" not in line]  # transformers draws its progress
    assert (code, len(errors)) == (2, 1), err
    assert message in err


def test_what_sources_cannot_give_is_one_line(folders, photo, capsys, offline, monkeypatch):
    for name, message in {
        "torchvision:vit_b_61": "unknown model torchvision:vit_b_61; there are, for instance, vit_b_16, ",
        f"hf:{folders / 'nowhere'}": "cannot make 'hf:",
        "hf:google/no-such-vit": "connect to the model hub, or name a folder",
        f"hf:{folders / 'video'}": "VideoMAEModel does not say what images it was made for",
    }.items():
        check_one_line(run(capsys, "info", name, "--device", "cpu"), message)
    check_one_line(
        run(capsys, "info", "torchvision:vit_b_16", "--checkpoint", photo), "--checkpoint needs a plain name of timm's"
    )
    drawn = ("visualize", photo, "--random-weights", "--r", "2", "--model")
    check_one_line(run(capsys, *drawn, f"hf:{folders / 'mae'}"), "cannot be drawn: ViTMAEModel hides patches and")
    check_one_line(run(capsys, *drawn[:2], *drawn[3:], f"hf:{folders / 'vit'}"), "cannot make 'hf:")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    check_one_line(
        run(capsys, "info", "open_clip:ViT-B-32"), "open_clip is not installed: pip install 'token-merging[op"
    )


def test_hosts(capsys):
    code, out, err = run(capsys, "hosts")
    assert code == 0, err
    for text in ("tome.patch.open_clip", "VisionTransformer", "Dinov2Model", "XCiT", "attends over channels"):
        assert text in out
