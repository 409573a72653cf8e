"""The demonstration: what it says of noise, how it draws, what it prints into a pipe."""

import importlib
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("benchmarks.demo")


QUIET = {"8": (1.30, 1.31, 1.32), "12": (0.98, 1.1, 1.2), "(12, -1.0)": (1.9, 2.0, 2.1), "4": (0.8, 0.85, 0.9)}
BUSY = {"8": (0.4, 1.5, 1.8), "12": (0.9, 0.95, 1.02), "(12, -1.0)": (1.9, 2.0, 2.1)}


def rows(speedups):
    made = [("unpatched", (1, 1, 1)), ("0", (1, 1, 1)), *speedups.items()]
    return [
        {
            "schedule": name, "tokens": "65-25", "gflops": 0.08, "throughput": 1460.7 * middle,
            "quartiles": (1460.7 * low, 1460.7 * high), "speedup": middle, "spread": (low, high),
            "told": name == "unpatched" or not low <= 1 <= high, "accuracy": 96.0 - i, "change": -float(i),
        }
        for i, (name, (low, middle, high)) in enumerate(made)
    ]  # fmt: skip


def test_speeds_are_compared_within_each_round(demo):
    base = [1.0, 1.0, 5.0, 1.0, 9.0, 1.0]  # other programs slow whole rounds down
    assert demo.compared(base, [each / 2 for each in base]) == [2, 2, 2]


def test_the_verdict_leaves_out_what_noise_hides_and_is_refused_where_it_hides_most(demo):
    assert demo.verdict(rows(QUIET)) == "Faster than unpatched: 8, (12, -1.0). Not told from noise: 12."
    assert demo.verdict(rows(BUSY)).startswith("No verdict: the machine is too busy")


def test_the_table_is_whole_in_a_pipe(demo):
    console = Console(width=80, record=True)
    console.print(demo.table(rows(QUIET)))
    text = console.export_text()
    assert "…" not in text
    (noisy,) = (line for line in text.splitlines() if line.strip().startswith("12 "))
    assert noisy.split()[4:6] == ["noise", "0.98-1.20"]
    assert "1.31x  1.30-1.32" in text
    assert "1460" in text


@pytest.mark.parametrize(("speedups", "title"), [(QUIET, ""), (BUSY, "the machine was too busy")])
def test_the_picture_says_that_noise_is_noise(demo, monkeypatch, tmp_path, speedups, title):
    drawn = []
    monkeypatch.setattr(demo.pyplot, "close", drawn.append)
    demo.plot(rows(speedups), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert axes.get_title().startswith(title)
    assert bool(axes.get_title()) == bool(title)
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["unpatched", "token merging, no retraining", "speed not told from noise"]


def test_training_drops_patches_only_while_it_lasts_and_tells_how_far_it_is(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EPOCHS", 2)
    images, labels = torch.randn(128, 1, 16, 16), torch.arange(128) % 10
    model = demo.VisionTransformer(**demo.ARCHITECTURE | {"embed_dim": 12, "depth": 1})
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    demo.fit(model, images, labels, Console())
    model.eval()(images)
    assert seen == [33] * 4 + [65]
    assert "training on digits: epoch 2 of 2, loss " in capsys.readouterr().out
