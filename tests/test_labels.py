"""Labels of plots stay clear of each other and inside; what tome bench prints and draws fits."""

import random
from itertools import combinations

import pytest

from tome.cli import bars, bench
from tome.cli.labels import MARKER, place

pyplot = pytest.importorskip("matplotlib.pyplot")
CONDITIONS = {"model": "vit", "batch size": "16", "dtype": "float32", "cpu": "an EPYC"}


@pytest.mark.parametrize("seed", range(5))
def test_labels_neither_collide_nor_leave_the_frame(seed):
    chance = random.Random(seed)
    points = [(chance.gauss(100, 20), chance.choice([96, 96.1, chance.uniform(80, 97)])) for _ in range(9)]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.scatter(*zip(*points, strict=True), label="merged")
    axes.legend(loc="lower left")
    labels = place(axes, points, [f"r=({i}, -1.0), 1.23x" for i in range(9)])
    figure.canvas.draw()
    frame = axes.get_window_extent()
    boxes = [label.get_window_extent() for label in labels]
    for a, b in combinations([*boxes, axes.get_legend().get_window_extent()], 2):
        assert not a.overlaps(b)
    for box in boxes:
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
        for x, y in axes.transData.transform(points):
            near = min(max(x, box.x0), box.x1) - x, min(max(y, box.y0), box.y1) - y
            assert max(map(abs, near)) >= MARKER
    pyplot.close(figure)


def row(r, backend):
    return bench.Result(r, backend, "eager", (197, 11), 9.2, 25004.3, 0.1234, 1.234, 120.4, 1.0, 1.234, 1.2, 2.01)


def test_a_table_with_long_names_is_never_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    name = str([8] * 24)
    bench._print([row("none", ""), row(name, "reference")], CONDITIONS)
    out = capsys.readouterr().out
    assert f"{name} reference  197-11" in out
    assert "…" not in out


def test_the_plot_names_who_merged_and_its_figures_are_those_of_the_table(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    bars.draw([row("none", ""), row("8", "cuda"), row("8", "reference")], CONDITIONS, tmp_path / "a.png", "png")
    (figure,) = drawn
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ["unpatched", "merged by the kernels (cuda)", "merged by plain PyTorch (reference)"]
    (axes,) = figure.axes
    (right,) = axes.child_axes
    names, figures = ([text.get_text() for text in each.get_yticklabels()] for each in (axes, right))
    assert names == ["none", "8 cuda", "8 reference"]
    assert set(figures) == {"25000/s, 1.23x"}
    assert figure.get_window_extent().containsx(right.get_tightbbox().x1)
