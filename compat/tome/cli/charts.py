"""Where everything of a chart stands, in the units of its SVG; templates/macros.html draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {"wide": (860, 380), "narrow": (350, 330)}  # a desktop's and a phone's; styles show one of them
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 48  # around the frame
FONT, LETTER = 12.0, 6.9  # pixels: height of the text, and a little more than the mean width of a letter
AWAY = 8.0  # from a point to its label
MARGIN = 0.09  # of a range, on either side of the points


class Text(NamedTuple):
    """A label; x is where it begins."""

    x: float
    y: float
    text: str
    kind: str = ""


class Mark(NamedTuple):
    """A point, and what is told of it when it is pointed at."""

    x: float
    y: float
    kind: str
    title: str


class Line(NamedTuple):
    """Points of an SVG polyline."""

    points: str
    kind: str


class Point(NamedTuple):
    """A point in the units of the data."""

    x: float
    y: float
    label: str
    kind: str


@dataclass
class Chart:
    """A frame with ticks, and what is in it."""

    kind: str  # of SIZES
    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    whole: bool = False  # ticks of x at whole numbers
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    labels: list[Text] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.width, self.height = SIZES[self.kind]
        self.left, self.right, self.top, self.bottom = LEFT, self.width - RIGHT, TOP, self.height - BOTTOM
        count = max(5, (self.right - self.left) // 90)
        self.x_ticks = [(self.x(v), text) for v, text in ticks(*self.x_range, count, self.whole)]
        self.y_ticks = [(self.y(v), text) for v, text in ticks(*self.y_range, 5)]

    def x(self, value: float) -> float:
        """From the data to the drawing."""
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Likewise."""
        low, high = self.y_range
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Add a line through points of the data."""
        self.lines.append(Line(" ".join(f"{self.x(x)},{self.y(y)}" for x, y in points), kind))

    def label(self, points: Sequence[Point]) -> None:
        """Put each label beside its point, where it covers least of points and of other labels."""
        taken = [(self.x(p.x) - 6, self.y(p.y) - 6, self.x(p.x) + 6, self.y(p.y) + 6) for p in points]
        for point in sorted(points, key=lambda p: -p.x):
            x, y, width = self.x(point.x), self.y(point.y), LETTER * len(point.label) + 4
            places = [
                (left, y + down)
                for down in (-AWAY, AWAY + FONT - 2, FONT / 3, -AWAY - FONT, AWAY + 2 * FONT)
                for left in (x + AWAY, x - AWAY - width, x - width / 2)
            ]
            boxes = [(left, base - FONT, left + width, base + 3) for left, base in places]
            best = min(range(len(boxes)), key=lambda i: (self._covered(boxes[i], taken), i))
            taken.append(boxes[best])
            left, base = places[best]
            self.labels.append(Text(round(left, 1), round(base, 1), point.label, point.kind))

    def _covered(self, box: tuple[float, ...], taken: Sequence[tuple[float, ...]]) -> float:
        inside = _overlap(box, (self.left, self.top, self.right, self.bottom))
        area = (box[2] - box[0]) * (box[3] - box[1])
        return sum(_overlap(box, other) for other in taken) + 4 * (area - inside)


def scatter(points: Sequence[Point], front: Sequence[int], x_title: str, y_title: str) -> list[Chart]:
    """Labelled points, and the front of those in ``front`` (by x, descending) as steps; a chart of each size."""
    charts = []
    for kind in SIZES:
        x_range, y_range = _padded([p.x for p in points]), _padded([p.y for p in points])
        chart = Chart(kind, x_title, y_title, x_range, y_range)
        steps = [(points[front[0]].x, y_range[0])]
        for a, b in zip(front, [*front[1:], front[-1]], strict=True):
            steps += [(points[a].x, points[a].y), (points[b].x, points[a].y)]
        chart.line([*steps, (x_range[0], steps[-1][1])], "front")
        chart.marks = [Mark(chart.x(p.x), chart.y(p.y), p.kind, f"{p.label}: {p.x:.5g}, {p.y:.5g}") for p in points]
        chart.label(points)
        charts.append(chart)
    return charts


def lines(series: Mapping[str, Sequence[int]], kinds: dict[str, str], x_title: str, y_title: str) -> list[Chart]:
    """A line for each series over 0, 1, 2 ...; a chart of each size."""
    charts = []
    most = max(max(values) for values in series.values())
    last = max(len(values) for values in series.values()) - 1
    for kind in SIZES:
        chart = Chart(kind, x_title, y_title, (-0.25, last + 0.25), (0.0, 1.06 * most), whole=True)
        for name, values in series.items():
            chart.line(enumerate(values), kinds[name])
            chart.marks += [Mark(chart.x(i), chart.y(v), kinds[name], f"{name}: {v}") for i, v in enumerate(values)]
        charts.append(chart)
    return charts


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[tuple[float, str]]:
    """About ``count`` round numbers from low to high, and how they are written."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
    step = max(step, 1.0) if whole else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = MARGIN * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
