"""Labels in plots that neither hide each other nor leave the frame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

MARKER = 5  # pixels around a point that no label may cover
# Where a label may stand: its corner or the middle of a side at the point, and as far from it in points.
SIDES = (
    ("left", "bottom", 4, 3), ("left", "top", 4, -3), ("right", "bottom", -4, 3), ("right", "top", -4, -3),
    ("center", "bottom", 0, 6), ("center", "top", 0, -6), ("left", "center", 7, 0), ("right", "center", -7, 0),
)  # fmt: skip
REACH = (1, 2, 3, 4, 5, 6, 8, 10, 12)


def place(axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], size: float = 7) -> list[Any]:
    """Label points where there is room: inside the frame, clear of other labels, of points and of the legend.

    Args:
        axes: of matplotlib, with all else drawn: limits, points and the legend stay as they are.
        points: x and y of each.
        texts: one each.
        size: of the letters, in points.

    """
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()  # the layout is made while drawing
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    axes.set_autoscale_on(False)
    spots = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - MARKER, y - MARKER, 2 * MARKER, 2 * MARKER) for x, y in spots]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent(renderer))
    labels = []
    for point, text in zip(points, texts, strict=True):
        label = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", fontsize=size)
        label.set_in_layout(False)
        labels.append(label)
        best: tuple[int, dict[str, Any], Any] | None = None
        for reach, (horizontal, vertical, x, y) in product(REACH, SIDES):
            where = {"ha": horizontal, "va": vertical, "position": (reach * x, reach * y)}
            label.set(**where)
            box = label.get_window_extent(renderer).padded(1)
            outside = box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1
            hidden = box.count_overlaps(taken) + len(taken) * outside
            if best is None or hidden < best[0]:
                best = hidden, where, box
            if hidden == 0:
                break
        assert best is not None
        label.set(**best[1])
        taken.append(best[2])
    return labels
