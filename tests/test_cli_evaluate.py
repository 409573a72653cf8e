"""``tome evaluate``, through its entry point: figures, several processes, interruptions, bad input."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import entry
import numpy as np
import pytest
import torch
from entry import bad
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import tome.cli
from tome import use_backend

MODELS = """
import os, signal, torch
from timm.models.vision_transformer import VisionTransformer

class Stopping(torch.nn.Module):  # SIGNAL comes with the call of that number; three more tell what the model is like
    calls = 0

    def __init__(self, classes):
        super().__init__()
        self.vit = VisionTransformer(img_size=32, patch_size=8, num_classes=classes, embed_dim=32, depth=3, num_heads=2)

    def forward(self, x):
        if x.device.type == "cpu":
            Stopping.calls += 1
            if Stopping.calls == int(os.environ.get("STOP_AT", 0)):
                os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return self.vit(x)

def small():
    return VisionTransformer(img_size=32, patch_size=8, num_classes=2, embed_dim=32, depth=3, num_heads=2)

def stopping():
    return Stopping(2)

def hungry():
    model = small()
    def fail(module, args):
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\\nMore")
    model.register_forward_pre_hook(fail)
    return model
"""
SHORT = ("--r", "2", "--r", "4", "--device", "cpu", "--batch-size", "1")


def run(capsys, *args):
    return entry.run(capsys, "evaluate", *args)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with models, and images of two classes, of which one is broken."""
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "needs_more.py").write_text("def model():\n    import no_such_part")
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 120 + 90 * (name == "bee"), (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "ant" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "bee" / "notes.txt").write_text("of bees")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def figures(file="out.json"):
    """What does not depend on the clock."""
    data = json.loads(Path(file).read_text())
    clock = ("images_per_second", "speedup")
    return [{key: value for key, value in row.items() if key not in clock} for row in data["results"]], data


def direct(r):
    """Top-1 and logits of the eleven whole images, by timm's own transform."""
    import my_models

    torch.manual_seed(0)
    model = my_models.small().eval()
    transform = create_transform(**resolve_model_data_config(model) | {"input_size": (3, 32, 32)}, is_training=False)
    images = [Image.open(f"photos/{name}/{i}.png") for name in ("ant", "bee") for i in range(6)]
    x = torch.stack([transform(image) for image in images])
    tome.patch.auto(model)
    model.r = r
    with torch.inference_mode(), use_backend("reference"):
        logits = torch.cat([model(each[None]) for each in x])
    return (logits.argmax(dim=1) == torch.arange(12) // 6).double().mean().item(), logits.double().log_softmax(dim=1)


def test_figures_and_picture(capsys):
    options = ["--json", "out.json", "--plot", "out.png", "--batch-size", "4"]
    code, out, err = run(capsys, "my_models:small", "--data", "photos", *SHORT[:-2], *options)
    assert (code, err) == (0, "")
    rows, data = figures()
    assert [row["r"] for row in rows] == ["unpatched", "2", "4"]
    assert rows[2]["tokens"] == [17, 13, 9, 5]
    log_p = direct(0)[1]
    for row, r in zip(rows, (0, 2, 4), strict=True):
        top1, log_q = direct(r)
        assert row["top1"] == pytest.approx(top1)
        assert row["top5"] is None, "of two classes"
        assert row["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(dim=1).mean().item(), rel=1e-3, abs=1e-8)
        assert row["same_top1"] == (log_p.argmax(dim=1) == log_q.argmax(dim=1)).double().mean()
    assert 0.5 < rows[2]["cosine"] < rows[1]["cosine"] < rows[0]["cosine"] == 1.0
    run_ = data["run"]
    assert (run_["images"], run_["ignored"]) == (12, 1)
    assert [name.split(" (")[0] for name in run_["broken"]] == ["photos/ant/broken.jpg"]
    assert 0 < run_["run_images_per_second"] < run_["model_images_per_second"]
    assert 0 < run_["waited"] < 1
    assert data["conditions"]["pixels"]["interpolation"] == "bicubic"
    for text in ("top-1", "cosine", "KL", "12 images; 1 broken and left out: photos/ant/broken.jpg (cannot identify",
                 "that are no images: 1", "of the models alone", "waited for images"):  # fmt: skip
        assert text in out
    with Image.open("out.png") as picture:
        assert picture.size > (300, 300)
    assert {*os.listdir()} - {"__pycache__"} == {"my_models.py", "needs_more.py", "out.json", "out.png", "photos"}


def test_agreement_only(capsys):
    code, out, err = run(
        capsys, "test_vit", "--random-weights", "--data", "photos", "--no-labels", "--r", "8", "--json", "out.json",
        "--plot", "out.svg", "--mean", "0.1,0.2,0.3", "--std", "0.5", "--crop", "1", "--interpolation", "bilinear",
        "--limit", "4", "--dtype", "bfloat16", "--image-size", "80",
    )  # fmt: skip
    assert (code, err) == (0, "")
    rows, data = figures()
    assert (rows[1]["top1"], rows[1]["tokens"][0], len(data["run"]["broken"])) == (None, 26, 1)
    expected = {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    assert {key: pytest.approx(data["conditions"]["pixels"][key]) for key in ("mean", "std", "crop_pct")} == {
        key: expected[key] for key in ("mean", "std", "crop_pct")
    }
    assert data["conditions"]["pixels"]["interpolation"] == "bilinear"
    assert "top-1" not in out.replace("same top-1", "")
    assert "the weights are random: speed is right, but agreement says nothing of a trained model" in out
    assert "cosine with the unpatched model" in Path("out.svg").read_text()


def test_digits(capsys):
    pytest.importorskip("sklearn")
    code, _, err = run(capsys, "test_vit", "--random-weights", "--data", "digits", "--r", "8", "--limit", "3")
    assert code == 2
    assert err == (
        "tome: error: digits has 10 classes and test_vit tells 1000 apart: choose images or weights of the same "
        "classes, or compare without labels by --no-labels\n"
    )


def test_compiled_variants_see_one_size(capsys, monkeypatch):
    sizes = []

    def compiled(model, dynamic):
        assert dynamic is False
        return lambda x: sizes.append(len(x)) or model(x)

    monkeypatch.setattr(torch, "compile", compiled)  # others test the compiler
    code, _, err = run(capsys, "my_models:small", "--data", "photos", "--batch-size", "5", "--compile", "--r", "2")
    assert (code, err, set(sizes)) == (0, "", {5})
    assert len(sizes) == 2 * 4, "one batch to warm up, and three"


def command(*args, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "tome", "evaluate", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]), "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def test_two_processes_give_the_figures_of_one(capsys):
    arguments = ["my_models:small", "--data", "photos", *SHORT[:-2], "--batch-size", "3"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    both = [command(*arguments, "--json", "two.json", RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "12 images; 1 broken" in told[0][0]
    assert told[1][0] == ""
    assert run(capsys, *arguments, "--json", "one.json")[0] == 0
    (two, data), (one, alone) = figures("two.json"), figures("one.json")
    assert two == one
    assert data["run"]["broken"] == alone["run"]["broken"]
    assert data["conditions"]["processes"] == "2"
    assert not [name for name in os.listdir() if "partial" in name]


def test_killed_and_resumed(capsys):
    arguments = ["my_models:stopping", "--data", "photos", *SHORT, "--json", "out.json"]
    assert run(capsys, *arguments)[0] == 0
    expected = figures()[0]
    os.remove("out.json")
    killed = command(*arguments, STOP_AT="20", SIGNAL=str(int(signal.SIGKILL)))
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(name for name in os.listdir() if "out.json" in name) == ["out.json.partial.jsonl"]
    code, _, err = run(capsys, *arguments)
    assert (code, "out.json.partial.jsonl is left from an interrupted run: use --resume, or remove it" in err) == (
        2,
        True,
    )
    assert run(capsys, *arguments, "--resume")[0] == 0
    assert figures()[0] == expected
    assert sorted(name for name in os.listdir() if "out.json" in name) == ["out.json"]


def test_stopped_by_ctrl_c_and_resumed(capsys, monkeypatch):
    arguments = ["my_models:stopping", "--data", "photos", *SHORT, "--json", "out.json"]
    assert run(capsys, *arguments)[0] == 0
    expected = figures()[0]
    os.remove("out.json")
    import my_models

    everything, my_models.Stopping.calls = my_models.Stopping.calls, 0
    monkeypatch.setenv("STOP_AT", str(everything - 6))
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGINT)))
    code, out, err = run(capsys, *arguments)
    assert (code, out.strip()) == (130, "")
    assert err.split("\n\n") == ["tome: 10 of 13 images are kept: --resume goes on", "tome: stopped\n"]
    assert not os.path.exists("out.json")
    monkeypatch.delenv("STOP_AT")

    # As of two processes, both of whose files lie on a disk that both see, and one of which was killed as it wrote.
    kept = Path("out.json.partial.jsonl")
    first, *lines = kept.read_text().splitlines(keepends=True)
    assert [len(json.loads(line)["positions"]) for line in lines] == [1] * 10
    kept.write_text("".join([first, *lines[:7], lines[7][:30]]))
    Path("out.json.partial-1.jsonl").write_text("".join([first, *lines[5:9]]))
    my_models.Stopping.calls = 0
    code, out, err = run(capsys, *arguments, "--resume")
    assert (code, err) == (0, "")
    assert figures()[0] == expected
    assert my_models.Stopping.calls == everything - 3 * 8, "nine images are done, one of them broken"
    assert not [name for name in os.listdir() if "partial" in name]
    assert run(capsys, *arguments, "--resume")[0] == 0, "with nothing to go on from it begins"


def test_what_is_resumed_is_the_same_run(capsys, monkeypatch):
    arguments = ["my_models:stopping", "--data", "photos", *SHORT, "--json", "out.json"]
    monkeypatch.setenv("STOP_AT", "20")
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGINT)))
    assert run(capsys, *arguments)[0] == 130
    monkeypatch.delenv("STOP_AT")
    kept = Path("out.json.partial.jsonl")
    before = kept.read_text()
    for other, message in {
        ("--r", "1"): "r ['unpatched', '2', '4'], not ['unpatched', '2', '4', '1']: repeat that run or remove it",
        ("--dtype", "bfloat16"): "dtype float32, not bfloat16",
        ("--limit", "5"): "images 13, not 5",
        ("--crop", "0.5"): "is of a run with pixels ",
    }.items():
        code, _, err = run(capsys, *arguments, "--resume", *other)
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err
    Image.new("RGB", (9, 9)).save("photos/ant/0a.png")
    os.remove("photos/ant/0.png")
    assert "is of a run with checksums [" in run(capsys, *arguments, "--resume")[2]
    assert kept.read_text() == before
    kept.write_text(before + "{]\n")
    assert f"cannot go on from {kept} (" in run(capsys, *arguments, "--resume")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad("my_models:small", "Missing option '--data'"),
        bad("no_such:model", "--data", "nowhere/else", "there is no folder nowhere/else"),  # before the model is loaded
        bad("needs_more:model", "--data", "photos", "(No module named 'no_such_part': pip install no_such_part)"),
        bad("my_models:small", "--data", "nowhere/else", "there is no folder nowhere/else: expected a folder of"),
        bad("my_models:small", "--data", "CIFAR1", "torchvision has no such dataset; did you mean CIFAR10?"),
        bad("my_models:small", "--data", "CIFAR10", "--root", "photos", "torchvision cannot open CIFAR10 in photos"),
        bad("my_models:small", "--data", "holed", "the class bee of holed is empty"),
        bad("my_models:small", "--data", "texts", "there are no images in texts, but 1 other files (bees.txt, ...)"),
        bad("my_models:small", "--data", "my_models.py", "my_models.py is a file: expected a folder"),
        bad("my_models:small", "--data", "broken", "none of the images of broken can be read: broken/a.png (cannot"),
        bad("my_models:small", "--data", "FakeData", "FakeData has 10 classes and my_models:small tells 2 apart"),
        bad("no_such_vit", "--data", "photos", "unknown model 'no_such_vit'"),
        bad("resnet18", "--data", "photos", "--random-weights", "ResNet is not supported"),
        bad("resnet18", "--data", "photos", "--random-weights", "--image-size", "64", "ResNet is not supported"),
        bad("test_vit", "--data", "photos", "--checkpoint", "other.pth", "other.pth does not fit 'test_vit'"),
        bad("test_vit", "--data", "photos", "--checkpoint", "other.pth", "--random-weights", "choose one of"),
        bad("my_models:small", "--data", "photos", "--r", "9", "9 is too large for my_models:small: of 17 tokens"),
        bad("my_models:small", "--data", "photos", "--r", "x", "'x': not a schedule"),
        bad("my_models:stopping", "--data", "photos", "--image-size", "20", "takes no images of another size"),
        bad("my_models:small", "--data", "photos", "--mean", "1,2", "'1,2' is neither one number nor three"),
        bad("my_models:small", "--data", "photos", "--std", "0", "'0' must be positive"),
        bad("my_models:small", "--data", "photos", "--crop", "0", "0.0 is not in the range 0<x<=1"),
        bad("my_models:small", "--data", "photos", "--limit", "0", "0 is not in the range x>=1"),
        bad("my_models:small", "--data", "photos", "--batch-size", "few", "'few' is not a valid integer range"),
        bad("my_models:small", "--data", "photos", "--resume", "--resume needs the --json of the run"),
        bad("my_models:small", "--data", "photos", "--json", "no/where.json", "there is no folder "),
        bad("my_models:small", "--data", "photos", "--plot", "out.bogus", "Format 'bogus' is not supported"),
        bad("my_models:hungry", "--data", "photos", "--batch-size", "9", "(CUDA out of memory.): choose a smaller"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(args, message, capsys, place):
    for file in ("holed/ant/0.png", "texts/bees.txt", "broken/a.png"):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text("no image")
    (place / "holed" / "bee").mkdir()
    torch.save({"weight": torch.ones(2)}, "other.pth")
    before = {*os.listdir(), "__pycache__"}
    json_file = [] if "--json" in args or "--resume" in args else ["--json", "out.json"]
    code, _, err = run(capsys, *args, *json_file)
    assert code == 2, err
    assert message in err
    assert len(err.splitlines()) == 1, err
    assert {*os.listdir(), "__pycache__"} == before


def test_a_gpu_for_all_processes_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, _, err = run(capsys, "my_models:small", "--data", "photos", "--device", "cuda:1")
    assert (code, "each process takes its own: write cuda without a number" in err) == (2, True)


def test_workers_that_die_are_one_line(capsys, monkeypatch):
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.\nMore")

    monkeypatch.setattr(tome.data, "batches", killed)
    code, _, err = run(capsys, "my_models:small", "--data", "photos", "--r", "2")
    assert (code, "killed by signal: Bus error.: choose fewer --workers, or give" in err) == (2, True)
    assert len(err.splitlines()) == 1
