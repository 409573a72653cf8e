"""``tome tune``, through its entry point, with a clock that counts FLOPs."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from entry import bad, run
from PIL import Image
from tuning import flops_clock

from tome import measure, schedule
from tome import tune as tuning

MODELS = """
from tuning import vit

def model():
    return vit()

def headless():
    return vit(classes=0)
"""
MODEL = ("my_models:model", "--data", "photos", "--device", "cpu", "--batch-size", "4")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with models, and images without classes, of which one is broken."""
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(measure, "time_calls", flops_clock)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tuning.tune, "__defaults__", tuple(24 if d == 200 else d for d in tuning.tune.__defaults__))


def test_a_schedule_that_other_commands_take(place, capsys, quick):
    code, out, err = run(capsys, "tune", *MODEL, "--speedup", "1.3", "--json", "tuned.json", "--plot", "tokens.png")
    assert code == 0, err
    written = json.loads((place / "tuned.json").read_text())
    r = json.loads(re.search(r"^model\.r = (\[.*\])$", out, re.MULTILINE)[1])
    assert r == written["r"] == schedule.load("tuned.json")
    assert written["met"] is True
    assert written["wish"] == {"kind": "speedup", "value": 1.3}
    assert [row["name"] for row in written["results"]] == ["unpatched", "constant r", "(r, -1)", "tuned"]
    assert written["results"][-1]["speedup"] == pytest.approx(1.3, rel=0.03)
    assert written["conditions"]["images"] == "6"
    assert len(written["costs"]["tokens"]) == len(written["costs"]["plain"])
    for text in ("constant r", "(r, -1)", "tuned", "1.3", "1 - cosine", "drop", torch.__version__):
        assert text in out
    assert "not read: photos/broken.jpg" in out
    with Image.open(place / "tokens.png") as picture:
        assert picture.size > (300, 300)
    for command in ("bench", "evaluate"):
        more = () if command == "evaluate" else ("--runs", "1")
        args = [arg for arg in MODEL if command == "evaluate" or arg not in ("--data", "photos")]
        code, out, err = run(capsys, command, *args, "--r", "tuned.json", *more)
        assert code == 0, err
        assert str(r) in out


def test_a_wish_that_nothing_meets(place, capsys, quick):
    code, out, _ = run(capsys, "tune", *MODEL, "--speedup", "40", "--json", "tuned.json")
    assert code == 1
    assert "no schedule was found that does --speedup 40; this is the nearest:\nmodel.r = [32, 16, 8, 4]" in out
    assert json.loads((place / "tuned.json").read_text())["met"] is False
    assert "host" not in out


def test_a_wish_that_needs_no_merging(place, capsys, quick):
    code, out, _ = run(capsys, "tune", *MODEL, "--latency-ms", "1e9")
    assert code == 0
    assert "nothing has to merge for --latency-ms 1000000000: without merging the model is 1.00x as fast" in out
    assert "model.r = [0, 0, 0, 0]" in out


def test_where_the_host_sets_the_pace_it_says_so(place, capsys, quick, monkeypatch):
    def clock(*args, **kwargs):
        return {name: [10 + time for time in times] for name, times in flops_clock(*args, **kwargs).items()}

    monkeypatch.setattr(measure, "time_calls", clock)
    monkeypatch.setattr(measure, "machine", lambda device: {"gpu": "one"})
    code, out, _ = run(capsys, "tune", *MODEL[:-1], "auto", "--speedup", "1.3", "--json", "tuned.json")
    assert code == 1
    assert "at batch size 8 a block takes nearly as long with a few tokens as with all" in out
    assert json.loads((place / "tuned.json").read_text())["conditions"]["batch size"] == "8"


def test_without_classes(place, capsys, quick):
    args = ("tune", "my_models:headless", *MODEL[1:])
    code, out, err = run(capsys, *args, "--agreement", "0.9", "--json", "tuned.json")
    assert code == 0, err
    assert "drop" not in out
    assert [row["drop"] for row in json.loads((place / "tuned.json").read_text())["results"]] == [None] * 4
    code, _, err = run(capsys, *args, "--max-drop", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "has no head" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad("--max-drop", "1", "--speedup", "2", "choose one of --speedup, --latency-ms, --max-drop and --agreement"),
        bad("choose one of --speedup"),
        bad("--speedup", "1", "1.0 is not in the range x>1"),
        bad("--agreement", "1", "not in the range 0<x<1"),
        bad("--latency-ms", "-3", "not in the range x>0"),
        bad("--speedup", "2", "--json", "/no/such/folder/f.json", "there is no folder /no/such/folder"),
        bad("--speedup", "2", "--plot", "f.abc", "f.abc: Format 'abc' is not supported"),
        bad("--speedup", "2", "--limit", "1", "1 is not in the range x>=2"),
        bad("--speedup", "2", "--data", "nowhere", "nowhere"),
        bad("--speedup", "2", "--device", "mps", "device 'mps' is not supported"),
        bad("--speedup", "2", "--dtype", "float16", "--autocast", "bfloat16", "bfloat16 needs --dtype"),
    ],
)
def test_bad_input_is_one_line(capsys, args, message):
    code, out, err = run(capsys, "tune", *MODEL, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tome: error: ")
    assert message in err


def test_images_that_cannot_be_read(place, capsys):
    for file in (place / "photos").glob("*.png"):
        file.write_bytes(b"broken")
    code, _, err = run(capsys, "tune", *MODEL, "--speedup", "1.3")
    assert (code, err.count("\n")) == (2, 1)
    assert "none of the images of photos can be read" in err


@pytest.mark.parametrize("text", ["{", "{}", '{"r": "eight"}'])
@pytest.mark.parametrize("command", ["bench", "evaluate", "info", "visualize"])
def test_files_without_a_schedule_are_one_line(place, capsys, command, text):
    (place / "bad.json").write_text(text)
    args = {"visualize": ["photos/0.png"], "evaluate": ["my_models:model", "--data", "photos"]}
    code, out, err = run(capsys, command, *args.get(command, ["my_models:model"]), "--r", "bad.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "bad.json" in err
    code, _, err = run(capsys, command, *args.get(command, ["my_models:model"]), "--r", "none.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "none.json: No such file or directory" in err
