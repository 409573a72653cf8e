"""The example that fine-tunes: the same curve however it is run, weights for any model, one line for what is wrong."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from entry import bad
from PIL import Image

import tome

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
MODELS = """
from timm.models.vision_transformer import VisionTransformer

def small(**kwargs):
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 2}
    model = VisionTransformer(**options | kwargs)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    return model

def three():
    return small(num_classes=3)

def digits():
    model = small(embed_dim=48, in_chans=1, num_classes=10)
    model.pos_embed.data.normal_(std=0.5)
    model.pretrained_cfg = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    return model
"""
RECIPE = [
    "photos", "--model", "my_models:small", "--workers", "0", "--device", "cpu", "--batch-size", "2", "--r", "3",
    "--r-warmup", "1", "--r-off", "1", "--epochs", "3", "--lr", "3e-3", "--drop-path", "0.2", "--clip-grad", "1",
    "--model-ema", "--model-ema-decay", "0.8", "--aa", "rand-m5", "--mixup", "0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models and images of two classes, to train on and to validate on."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "my_models.py").write_text(MODELS)
    for split, count in {"train": 9, "val": 3}.items():
        for name in ("ant", "bee"):
            home = folder / "photos" / split / name
            home.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([i, count]).integers(0, 150, (20, 24, 3), dtype=np.uint8)
                noise[..., 0] += 100 * (name == "bee")
                Image.fromarray(noise).save(home / f"{i}.png")
    return folder


@pytest.fixture
def finetune(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(folder)
    import finetune

    return finetune


def curve(rows):
    """What does not depend on the clock."""
    clocked = ("seconds", "seconds_to_first_batch", "images_per_second")
    return [{key: value for key, value in row.items() if key not in clocked} for row in rows]


def logged(folder):
    return json.loads((Path(folder) / "log.json").read_text())["epochs"]


def assert_same_curve(found, expected):
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["r"] == theirs["r"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        for name in ("eval", "eval_unmerged", "ema", "ema_unmerged"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.fixture(scope="module")
def one(folder):
    """The curve of one process, and its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(ROOT / "examples")
        patch.syspath_prepend(folder)
        import finetune

        assert finetune.main([*RECIPE, "--grad-accum-steps", "4", "--output", "one"]) == 0
    return logged(folder / "one")


TWO = """
import json, os, shutil, sys, finetune, torch
recipe, ports = json.loads(sys.argv[1]), iter(sys.argv[2:])

def run(*options):
    os.environ["MASTER_PORT"] = next(ports)
    return finetune.main([*recipe, "--grad-accum-steps", "2", *options])

assert run("--output", "ddp") == 0
save = finetune.Run.save

def stop(self, file):
    save(self, file)
    finetune.dist.barrier()  # the other process reads what one has written
    raise KeyboardInterrupt

finetune.Run.save = stop
assert run("--output", "fsdp", "--fsdp") == 130
finetune.Run.save = save
if os.environ["RANK"] == "0":
    shutil.copy("fsdp/last.pt", "first.pt")
assert run("--output", "half", "--fsdp", "--amp") == 0
compiled = torch.compile
torch.compile = lambda f, dynamic, mode: compiled(f, backend="eager", dynamic=dynamic)
assert run("--output", "fsdp", "--fsdp", "--torchcompile", "--resume", "fsdp/last.pt") == 0
"""


@pytest.fixture(scope="module")
def two(folder):
    """The folder in which two processes have trained by DDP, and by FSDP2, stopped behind an epoch and resumed."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
        for each in sockets:
            each.bind(("localhost", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    path = os.pathsep.join([str(ROOT / "examples"), str(folder), *sys.path])
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "PYTHONPATH": path}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, json.dumps(RECIPE), *ports], cwd=folder, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        ) for rank in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], told
    return folder


def test_one_process(one, folder):
    assert [row["r"] for row in one] == [0, 3, 0]
    assert len({row["train_loss"] for row in one}) == 3
    assert one[1]["eval"]["loss"] != one[1]["eval_unmerged"]["loss"], "validation merges by --r"
    assert one[2]["ema"]["loss"] != one[2]["eval"]["loss"]
    assert {file.name for file in (folder / "one").iterdir()} == {"curves.png", "last.pt", "log.json", "model.pt"}
    with Image.open(folder / "one" / "curves.png") as picture:
        assert picture.size > (300, 300)


def test_two_processes_give_the_curve_of_one(one, two):
    assert_same_curve(logged(two / "ddp"), one)


def test_sharded_and_resumed_gives_the_curve_of_one(one, two):
    assert_same_curve(logged(two / "fsdp"), one)
    ours, theirs = (torch.load(two / name / "model.pt") for name in ("fsdp", "one"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_sharded_in_bfloat16_stays_near(one, two):
    half = [row["train_loss"] for row in logged(two / "half")]
    assert half == pytest.approx([row["train_loss"] for row in one], rel=0.05)
    assert all(value.dtype is torch.float32 for value in torch.load(two / "half" / "model.pt").values())


def test_one_process_goes_on_where_two_stopped(finetune, one, two):
    assert finetune.main([*RECIPE, "--grad-accum-steps", "4", "--resume", "first.pt", "--output", "first"]) == 0
    assert_same_curve(logged("first"), one)


def test_interrupted_in_an_epoch_and_resumed(finetune, one, monkeypatch, capsys):
    calls, backward = [], finetune.Run.backward

    def stopping(self, batch):
        calls.append(batch)
        if len(calls) == 12:  # of 8 in an epoch
            raise KeyboardInterrupt
        return backward(self, batch)

    monkeypatch.setattr(finetune.Run, "backward", stopping)
    arguments = [*RECIPE, "--grad-accum-steps", "4", "--output", "again"]
    assert finetune.main(arguments) == 130
    assert "finetune: stopped; --resume" in capsys.readouterr().err
    assert finetune.main(arguments) == 2
    assert "again/last.pt is there: --resume it" in capsys.readouterr().err
    assert finetune.main([*arguments, "--resume", "again/last.pt", "--lr", "1"]) == 2
    assert "again/last.pt is of a run with lr 0.003, not 1.0" in capsys.readouterr().err
    assert finetune.main([*arguments, "--resume", "again/last.pt", "--workers", "1"]) == 0
    assert curve(logged("again")) == curve(one), "to the last bit, whoever reads the images"


def test_checkpointing_of_activations_changes_nothing(finetune, one):
    assert finetune.main([*RECIPE, "--grad-accum-steps", "4", "--grad-checkpointing", "--output", "thrifty"]) == 0
    assert_same_curve(logged("thrifty"), one)


def test_a_compiled_step_gives_the_same_curve(finetune, one, monkeypatch):
    compiled = torch.compile
    # Others test the compiler; this one keeps the numbers that are drawn.
    modes = []

    def compile(f, dynamic, mode):
        modes.append(mode)
        return compiled(f, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile)
    options = ("--torchcompile", "--torchcompile-mode", "max-autotune-no-cudagraphs")
    assert finetune.main([*RECIPE, "--grad-accum-steps", "4", *options, "--output", "compiled"]) == 0
    assert modes == ["max-autotune-no-cudagraphs"]
    assert_same_curve(logged("compiled"), one)


def test_weights_fit_the_unpatched_model_and_back(one, folder, finetune):
    import my_models

    state = torch.load(folder / "one" / "model.pt")
    plain, merging = my_models.small().eval(), tome.patch.timm(my_models.small().eval())
    plain.load_state_dict(state)
    merging.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), tome.use_backend("reference"):
        assert torch.equal(plain(x), merging(x))
        merging.r = 3
        assert not torch.equal(plain(x), merging(x))
    plain.load_state_dict(merging.state_dict())


def test_digits_are_learned(finetune, capsys):
    pytest.importorskip("sklearn")
    arguments = ["--model", "my_models:digits", "--no-aug", "--workers", "0", "--device", "cpu", "--amp"]
    arguments += ["--epochs", "4", "--r", "2", "--sched-on-updates", "--smoothing", "0", "--lr", "5e-3"]
    arguments += ["--batch-size", "32"]
    assert finetune.main(["digits", *arguments, "--output", "digits"]) == 0
    rows = logged("digits")
    assert rows[-1]["eval"]["top1"] > 50
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert "epoch 4/4  r 2  loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (8, [0, 4, 8, 8, 0]),
        ((8, -1.0), [(0, -1.0), (4, -1.0), (8, -1.0), (8, -1.0), (0, -1.0)]),
        ([8, 3], [[0, 0], [4, 2], [8, 3], [8, 3], [0, 0]]),
        (0.5, [0, 0.25, 0.5, 0.5, 0]),
    ],
    ids=str,
)
def test_r_over_epochs(finetune, r, expected):
    options = SimpleNamespace(r=r, r_warmup=2, r_off=1, epochs=5)
    assert [finetune.r_of(options, epoch) for epoch in range(5)] == expected


def test_a_head_for_other_classes_and_drop_path(finetune):
    options = SimpleNamespace(
        model="my_models:three", pretrained=False, initial_checkpoint=None, img_size=None, r=2, drop_path=0.3,
        grad_checkpointing=False,
    )  # fmt: skip
    model, _ = finetune.make_model(options, 2, torch.device("cpu"))
    assert model.head.out_features == 2
    assert [block.drop_path1.drop_prob for block in model.blocks] == [0.0, 0.15, 0.3]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_models_of_torchvision_get_a_head(finetune):
    vision = pytest.importorskip("torchvision.models")
    model = vision.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=7)
    finetune.set_head(model, 7, 4)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad("nowhere", "there is no folder nowhere: expected DATA/train and DATA/val, or digits"),
        bad("photos/train", "there is no folder photos/train/train"),
        bad("odd", "odd/val has not the classes of odd/train: cat in one only"),
        bad("photos", "--model", "no_such_vit", "unknown model 'no_such_vit'"),
        bad("photos", "--model", "resnet18", "ResNet is not supported"),
        bad("photos", "--r", "100", "100 is too large for my_models:small"),
        bad("photos", "--r", "x", "'x': not a schedule"),
        bad("photos", "--r-warmup", "2", "--r-off", "2", "--r-warmup 2 and --r-off 2 are more than --epochs 3"),
        bad("photos", "--opt", "adam_of_old", "no optimiser adam_of_old"),
        bad("photos", "--sched", "plateau", "'plateau' is not one of"),
        bad("photos", "--batch-size", "64", "18 images to train on are fewer than an update takes (1 x 64)"),
        bad("photos", "--batch-size", "3", "--mixup", "1", "need an even --batch-size"),
        bad("photos", "--fsdp", "--fsdp shards over processes: start them by torchrun"),
        bad("photos", "--torchcompile-mode", "default", "--torchcompile-mode needs --torchcompile"),
        bad(
            *("photos", "--torchcompile", "--torchcompile-mode", "reduce-overhead", "--grad-accum-steps", "2"),
            "--torchcompile-mode reduce-overhead takes no --grad-accum-steps",
        ),
        bad("photos", "--resume", "my_models.py", "cannot go on from my_models.py ("),
        bad("photos", "--pretrained", "--initial-checkpoint", "my_models.py", "choose one of --pretrained and"),
        bad("photos", "--img-size", "32", "--model", "my_models:stiff", "takes no images of another size"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(finetune, folder, capsys, args, message):
    for home in ("odd/train/ant", "odd/train/cat", "odd/val/ant"):
        (folder / home).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / home / "0.png")
    import my_models

    my_models.stiff = lambda: torch.nn.Sequential(my_models.small())
    common = ["--model", "my_models:small", "--device", "cpu", "--batch-size", "2", "--epochs", "3", "--workers", "0"]
    assert finetune.main([*common, *args, "--output", "none"]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1, err
    assert not Path("none").exists()


def test_a_broken_image_is_left_out_and_named(finetune, folder, capsys):
    for split in ("train", "val"):
        for name, color in {"ant": "red", "bee": "blue"}.items():
            (folder / "holed" / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), color).save(folder / "holed" / split / name / "0.png")
            (folder / "holed" / split / name / "1.png").write_text("no image")
    arguments = ["holed", "--model", "my_models:small", "--device", "cpu", "--workers", "0", "--epochs", "2"]
    assert finetune.main([*arguments, "--batch-size", "4", "--output", "out-of-holed"]) == 0
    assert "2 broken: holed/train/ant/1.png (cannot identify" in capsys.readouterr().out
    assert finetune.main([*arguments, "--batch-size", "1", "--output", "stopped"]) == 1
    assert "no image of a batch can be read: holed/train/" in capsys.readouterr().err
