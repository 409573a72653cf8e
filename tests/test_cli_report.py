"""``tome report``, through its entry point: what is on the page, and how it looks in a browser."""

import base64
import html
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from entry import bad, run
from PIL import Image
from tuning import flops_clock

from tome import measure
from tome import tune as tuning
from tome.cli import charts, page, report

MODELS = """
from timm.models.vision_transformer import VisionTransformer
from tuning import vit

def model():
    return vit()

def headless():
    return vit(classes=0)

def of_two():
    return vit(classes=2)

def infinite():
    model = vit()
    model.norm.weight.data.fill_(float("nan"))
    return model

def grey():
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=3, num_heads=2
    )
"""
MODEL = ("my_models:model", "--data", "photos", "--device", "cpu", "--batch-size", "4")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with models, and images with and without classes, of which one is broken."""
    (tmp_path / "my_models.py").write_text(MODELS)
    for folder in ("photos", "classes/ant", "classes/bee"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 90 * i + 60, (5, 6, 3)).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).resize((50, 40))
            image.save(tmp_path / folder / f"{i}.png")
    (tmp_path / "photos" / "0a <b>&.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(measure, "time_calls", flops_clock)
    monkeypatch.setattr(tuning.tune, "__defaults__", tuple(16 if d == 200 else d for d in tuning.tune.__defaults__))
    return tmp_path


def written(capsys, *args, code=0):
    """The page."""
    found, out, err = run(capsys, "report", *args)
    assert (found, err) == (code, ""), out
    return Path("report.html").read_text()


def table(text, caption):
    """A table of the page: heads, and rows by their first cell."""
    part = text.split(f"<caption>{caption}")[1].split("</table>")[0]
    heads = re.findall(r'<th scope="col">(.*?)</th>', part)
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', part, re.DOTALL)
    return heads, {html.unescape(name): re.findall(r"<td.*?>(.*?)</td>", rest) for name, rest in rows}


def commands(text):
    """The command lines of the page, by what they give."""
    part = text.split('<dl class="commands">')[1].split("</dl>")[0]
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part)
    return {what: shlex.split(html.unescape(re.sub("<.*?>", "", line))) for what, line in found}


def test_every_part_and_the_commands_that_give_it_again(place, capsys):
    text = written(capsys, *MODEL, "--r", "4", "--r", "6,-1.0", "--speedup", "1.3", "--pictures", "2")
    heads, rows = table(text, "Proof run")
    assert heads == ["schedule", "tokens", "1 - cosine", "drop", "ms", "speed-up"]
    assert list(rows) == ["unpatched", "constant r", "(r, -1)", "tuned"]
    assert float(rows["tuned"][-1][:-1]) == pytest.approx(1.3, abs=0.05)
    r = json.loads(re.search(r"model\.r = (\[.*?\])", text)[1])
    stored = json.loads(base64.b64decode(re.search(r"application/json;base64,(.*?)\"", text)[1]))
    assert (stored["r"], stored["met"]) == (r, True)

    heads, rows = table(text, "Speed of each")
    assert list(rows) == ["unpatched", "0", "4", "(6, -1.0)", "tuned"]
    assert rows["unpatched"][heads.index("speed-up") - 1] == "1.00x"
    heads, rows = table(text, "Answers and speed")
    assert list(rows) == ["unpatched", "4", "(6, -1.0)", "constant r", "(r, -1)", "tuned"]
    assert "top-1" not in heads
    assert "Agreement against speed" in text
    assert text.count("data:image/jpeg") == 2 * 6
    assert [re.split("[ ,]", alt)[0] for alt in re.findall(r'alt="(.*?)"', text)] == ["photos/0.png"] * 6 + [
        "photos/1.png"
    ] * 6
    for fact in ("1 broken and left out: photos/0a &lt;b&gt;&amp;.jpg", torch.__version__, "the function&#39;s own"):
        assert fact in text
    assert "<b>" not in text

    lines = commands(text)
    assert list(lines) == ["This page", "The tuned schedule", "Speed", "Answers against speed", "Merges, tuned"]
    assert run(capsys, *lines["Answers against speed"][1:], "--json", "again.json")[0] == 0
    again = json.loads(Path("again.json").read_text())["results"]
    assert [f"{row['cosine']:.4f}" for row in again] == [row[heads.index("cosine") - 1] for row in rows.values()]
    assert run(capsys, *lines["The tuned schedule"][1:])[0] == 0
    assert json.loads(Path("tuned.json").read_text())["r"] == r
    for name in ("Speed", "Merges, tuned"):
        assert run(capsys, *lines[name][1:])[0] == 0
    with Image.open("merges.png") as picture:
        assert picture.height > 2 * 448
    assert lines["This page"][1:] == [
        "report", "my_models:model", "--data", "photos", "--device", "cpu", "--batch-size", "4", "--r", "4",
        "--r", "6,-1.0", "--speedup", "1.3", "--tune-images", "5", "--pictures", "2", "--out", "report.html",
    ]  # fmt: skip
    assert {*os.listdir()} - {"__pycache__"} == {
        "again.json", "classes", "merges.png", "my_models.py", "photos", "report.html", "tuned.json",
    }  # fmt: skip


def test_labels(capsys):
    text = written(capsys, "my_models:of_two", "--data", "classes", *MODEL[3:], "--no-tune", "--r", "4")
    heads, rows = table(text, "Answers and speed")
    assert heads[:3] == ["r", "tokens", "top-1"]
    assert (list(rows), "Accuracy against speed" in text, "tuned" in rows) == (["unpatched", "4"], True, False)
    assert "Top-1, points" in text
    assert 'id="tuned"' not in text
    assert list(commands(text)) == ["This page", "Speed", "Answers against speed", "Merges, r = 4"]
    text = written(capsys, "my_models:of_two", "--data", "classes", *MODEL[3:], "--no-tune", "--no-labels")
    assert "Agreement against speed" in text
    assert "--no-labels" in commands(text)["Answers against speed"]


def test_features_a_limit_and_other_pixels(capsys):
    options = ("--no-tune", "--r", "4", "--limit", "2", "--crop", "1", "--mean", "0.2", "--pictures", "1")
    text = written(capsys, "my_models:headless", *MODEL[1:], *options)
    assert "KL" not in table(text, "Answers and speed")[0]
    assert "2 images of photos" in text
    assert "Merges, r = 4" not in commands(text), "tome visualize knows no other pixels"
    line = commands(text)["Answers against speed"]
    assert line[line.index("--limit") + 1] == "2"
    assert line[line.index("--mean") + 1] == "0.2"


def test_digits_of_a_grey_model(capsys):
    pytest.importorskip("sklearn")
    options = ("--device", "cpu", "--no-tune", "--limit", "6", "--pictures", "2", "--r", "2")
    text = written(capsys, "my_models:grey", "--data", "digits", *options)
    assert "Accuracy against speed" in text
    assert text.count("data:image/jpeg") == 2 * 4
    assert "<code>digits[225]</code>" in text
    assert "Merges, r = 2" not in commands(text)


def test_random_weights_and_a_checkpoint(capsys):
    options = ("--data", "photos", "--device", "cpu", "--no-tune", "--limit", "2", "--pictures", "1", "--r", "8")
    text = written(capsys, "test_vit", *options, "--random-weights", "--image-size", "80")
    assert "Random weights, 2 images of photos" in text
    line = commands(text)["Speed"]
    assert line[-4:] == ["--batch-size", "2", "--r", "8"]
    assert "--random-weights" not in line
    code, _, err = run(capsys, *line[1:])
    assert (code, err) == (0, "")
    import timm

    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), "weights.pth")
    text = written(capsys, "test_vit", *options, "--checkpoint", "weights.pth")
    assert "Weights of weights.pth" in text
    assert "--checkpoint" in commands(text)["Merges, r = 8"]


def test_a_wish_that_nothing_meets(capsys):
    text = written(capsys, *MODEL, "--r", "4", "--speedup", "40", "--pictures", "1", code=1)
    assert "No schedule was found that does <code>--speedup 40</code>; this is the nearest." in text


def test_a_wish_that_needs_no_merging(capsys):
    text = written(capsys, *MODEL, "--r", "4", "--latency-ms", "1e9", "--pictures", "1")
    assert "Nothing has to merge for --latency-ms 1000000000: without merging the model is 1.00x as fast" in text


@pytest.mark.parametrize(("device", "kernels", "expected"), [("cuda", 1.66, 2.5), ("cuda", 0.9, 1.5), ("cpu", 3, 1.5)])
def test_the_usual_wish_is_a_gain_by_merging(monkeypatch, device, kernels, expected):
    setup = SimpleNamespace(device=torch.device(device), size=(3, 8, 8), dtype=torch.float16, shape=(4,), base=None)
    monkeypatch.setattr(report.torch, "randn", lambda *size, **kwargs: size)
    monkeypatch.setattr(report, "seconds_of", lambda *args: {"unpatched": kernels, "tuned": 1.0})
    assert report._usual_wish(setup, 4) == ("speedup", expected)


def test_fast_models_have_rates_in_digits():
    rows = {
        "unpatched": SimpleNamespace(speedup=1.0, images_per_second=23_921.3, cosine=1.0, top1=None),
        "8": SimpleNamespace(speedup=1.6, images_per_second=38_183.0, cosine=0.99, top1=None),
    }
    contents = SimpleNamespace(figures=SimpleNamespace(rows=rows), made=None, tokens={"8": (197, 101)})
    assert {"what": "Images per second", "value": "38200", "than": "23900 unpatched"} in page._tiles(contents)


def test_models_that_cannot_be_drawn_have_a_page(capsys, monkeypatch):
    monkeypatch.setattr("tome.cli.visualize.SHUFFLED", ("VisionTransformer",))
    text = written(capsys, *MODEL, "--r", "4", "--no-tune")
    assert "No pictures: my_models:model cannot be drawn: MergedVisionTransformer" in text or "hides patches" in text
    assert "data:image/jpeg" not in text


def test_answers_that_are_not_finite_are_told(capsys):
    text = written(capsys, "my_models:infinite", *MODEL[1:], "--r", "4", "--no-tune", "--pictures", "1")
    assert "3 images gave no finite output" in text.replace("4 images", "3 images")
    assert "Scatter plot" not in text


def test_names_that_are_not_unicode(place, capsys):
    os.rename(place / "photos" / "0.png", bytes(place / "photos") + b"/\xff.png")
    assert "photos/" in written(capsys, *MODEL, "--r", "4", "--no-tune", "--pictures", "4")


def test_the_page_is_whole_or_as_it_was(place, capsys, monkeypatch):
    (place / "report.html").write_text("before")
    monkeypatch.setattr(page, "render", lambda contents: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, _ = run(capsys, "report", *MODEL, "--r", "4", "--no-tune")
    assert (code, (place / "report.html").read_text()) == (130, "before")
    assert not list(place.glob(".tome*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        bad(*MODEL, "--out", "/no/such/report.html", "--out: there is no folder /no/such"),
        bad(*MODEL, "--out", "photos", "--out: photos is a folder"),
        bad(*MODEL, "--no-tune", "--speedup", "2", "choose one of --speedup, --latency-ms, --max-drop and --agreement"),
        bad(*MODEL, "--agreement", "0.9", "--speedup", "2", "choose one of --speedup"),
        bad(*MODEL, "--pictures", "0", "0 is not in the range x>=1"),
        bad(*MODEL, "--tune-images", "1", "1 is not in the range x>=2"),
        bad(*MODEL, "--r", "99", "99 is too large for my_models:model"),
        bad(*MODEL, "--limit", "1", "1 images are too few to compare schedules on"),
        bad("my_models:headless", *MODEL[1:], "--max-drop", "1", "the model has no head"),
        bad("my_models:model", "--data", "nowhere/else", "there is no folder nowhere/else"),
        bad("my_models:model", "--data", "classes", "classes has 2 classes and my_models:model tells 5 apart"),
        bad("my_models:model", "--data", "broken", "none of the images of broken can be read"),
        bad("my_models:model", "--data", "broken", "--no-tune", "none of the images of broken can be read"),
        bad("resnet18", "--data", "photos", "--random-weights", "ResNet is not supported"),
        bad("my_models:model", "Missing option '--data'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(place, capsys, args, message):
    (place / "broken").mkdir()
    (place / "broken" / "a.png").write_bytes(b"no image")
    before = {*os.listdir(), "__pycache__"}
    code, _, err = run(capsys, "report", *args)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert message in err
    assert {*os.listdir(), "__pycache__"} == before


def test_in_a_browser(place, capsys):
    (place / "photos" / ("long-name-" * 15 + ".png")).write_bytes((place / "photos" / "0.png").read_bytes())
    text = written(capsys, *MODEL, "--r", "4", "--r", "6,-1.0", "--r", "[2,4,8]", "--speedup", "1.3", "--pictures", "3")
    assert len(text) > 50_000
    pages = []
    with browser.chromium() as chromium:
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                told, asked = [], []
                tab.on("console", lambda message, told=told: told.append(message.text))
                tab.on("pageerror", lambda error, told=told: told.append(str(error)))
                tab.on("request", lambda request, asked=asked: asked.append(request.url))
                tab.goto((place / "report.html").as_uri())
                where = f"{width} pixels, {scheme}"
                assert told == [], where
                assert [url for url in asked if not url.startswith("data:")] == [(place / "report.html").as_uri()]
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, where
                assert tab.evaluate(browser.OUTSIDE) == [], where
                images = tab.evaluate(browser.IMAGES)
                assert len(images) == 3 * 6
                assert all(is_decoded and alt for is_decoded, alt in images), where
                contrasts = tab.evaluate(browser.CONTRASTS)
                assert len(contrasts) > 100
                assert min(contrasts)[0] >= 4.5, (where, min(contrasts))
                kinds = [svg.get_attribute("class") for svg in tab.query_selector_all("svg") if svg.is_visible()]
                assert kinds == [f"chart {'narrow' if width == 390 else 'wide'}"] * 2
                pages.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
                tab.close()
    assert pages[0] == pages[2] != pages[1] == pages[3], "light and dark"


DOCS = (Path(__file__).parents[1] / "docs" / "report.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^tome report .*$", DOCS, re.MULTILINE))
def test_the_commands_of_the_documentation_run(capsys, line):
    args = shlex.split(line.replace("MODEL", "my_models:model"))[2:]
    code, out, err = run(capsys, "report", *args, "--device", "cpu")
    assert (code, err) == (0, ""), out
    assert Path("report.html").read_text().startswith("<!doctype html>")


def test_the_documentation_names_every_option_of_its_own(capsys):
    own = {option for option in run(capsys, "report", "--help")[1].split() if option.startswith("--")}
    shared = {option for option in run(capsys, "evaluate", "--help")[1].split() if option.startswith("--")}
    assert {option for option in own - shared if option not in DOCS} == set()


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 100.0, 5, ["0", "20", "40", "60", "80", "100"]),
        (0.991, 1.0, 5, ["0.992", "0.994", "0.996", "0.998", "1.000"]),
        (5.5, 14.4, 5, ["6", "8", "10", "12", "14"]),
        (1234.0, 5678.0, 4, ["2000", "4000"]),
    ],
)
def test_ticks_are_round_numbers(low, high, count, expected):
    assert [text for _, text in charts.ticks(low, high, count)] == expected


def test_labels_cover_no_points_nor_each_other():
    names = ("unpatched", "8 1.34x", "constant r 1.47x", "tuned 1.58x", "16 1.77x", "(r, -1) 1.49x")
    at = [(6.3, 1.0), (8.4, 0.999), (9.2, 0.9968), (9.9, 0.9966), (11.1, 0.988), (9.35, 0.984)]
    points = [charts.Point(x, y, name, "s1") for name, (x, y) in zip(names, at, strict=True)]
    for chart in charts.scatter(points, [4, 3, 1, 0], "x", "y"):
        boxes = [(t.x, t.y - 10, t.x + 6.5 * len(t.text), t.y) for t in chart.labels]
        boxes += [(m.x - 3, m.y - 3, m.x + 3, m.y + 3) for m in chart.marks]
        assert len(boxes) == 12
        for i, a in enumerate(boxes):
            assert chart.left <= a[0] + 3
            assert a[2] - 3 <= chart.right + charts.RIGHT
            assert not any(charts._overlap(a, b) for b in boxes[:i]), (chart.kind, a)


def test_points_stand_where_their_figures_say():
    points = [charts.Point(10.0, 0.9, "a", "s1"), charts.Point(30.0, 0.5, "b", "s1")]
    wide, narrow = charts.scatter(points, [1, 0], "x", "y")
    assert (wide.kind, narrow.kind) == ("wide", "narrow")
    for chart in (wide, narrow):
        a, b = chart.marks
        assert chart.left < a.x < b.x < chart.right
        assert chart.top < a.y < b.y < chart.bottom
        assert f"{b.x},{b.y}" in chart.lines[0].points
        middle = [(x, text) for x, text in chart.x_ticks if text == "20"]
        assert middle == [(pytest.approx((a.x + b.x) / 2, abs=0.2), "20")]
