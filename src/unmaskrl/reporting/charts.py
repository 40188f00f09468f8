"""Small charts (shell): curves and stacked areas as hand-made inline SVG for the report, or on
matplotlib axes for a PNG.

The SVG takes its colours from the page's CSS variables (``CHART_CSS``), so it follows the light or
dark theme, and holds no ids or dates: the same data give the same text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]
COLOURS = ("#26648e", "#c8553d", "#5f8a3a", "#7d5ba6", "#a97f00", "#6b7280")
_WIDTH = 400
_HEIGHT = 220
_LEFT = 44
_RIGHT = 12
_TOP = 10
_BOTTOM = 34
_MAX_POINTS = 400

CHART_CSS = """
:root{--c0:#26648e;--c1:#c8553d;--c2:#5f8a3a;--c3:#7d5ba6;--c4:#a97f00;--c5:#6b7280;--grid:#e4e8ec}
@media(prefers-color-scheme:dark){:root{--c0:#6fb1e0;--c1:#f08a6e;--c2:#a3cc74;--c3:#bda0e3;--c4:#e0bb4a;
--c5:#9aa4b2;--grid:#2c333c}}
figure{margin:0;min-width:0;display:flex;flex-direction:column}figcaption{font-weight:600;font-size:.93rem}
figure svg{width:100%;height:auto;margin-top:auto;overflow:visible}
figure text{font-size:11px;fill:var(--muted)}
.grid{stroke:var(--grid);stroke-width:1}.raw{opacity:.3;stroke-width:1}
.line,.raw,.bar{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.bar{stroke-width:1.2;opacity:.7}
.raw{stroke-width:1}.dash{stroke-dasharray:4 4;stroke-width:1.4}
.keys{display:flex;flex-wrap:wrap;gap:1px 12px;font-size:.8rem;color:var(--muted);min-height:1.3em}
.keys i{display:inline-block;width:11px;height:3px;border-radius:2px;
 margin-right:5px;vertical-align:middle}
.keys b{color:var(--fg);font-weight:600;margin-left:4px}
""" + "".join(
    f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.k{i}{{background:var(--c{i})}}"
    for i in range(6)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named curve; one with ``bars``, (x, low, high) intervals, is drawn as dots and not
    smoothed.
    """

    label: str
    points: Sequence[Point]
    bars: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over ``x``, or areas ``stacked`` on each other; the y axis includes ``floor``, and is
    in % for shares.
    """

    title: str
    lines: Sequence[Line]
    x: str = "step"
    floor: float | None = None
    is_share: bool = False
    stacked: bool = False

    def label(self, value: float) -> str:
        """A round value as it is written at an axis."""
        return f"{100 * value:.6g}%" if self.is_share else short_number(value, 6)

    def value(self, value: float) -> str:
        """A measured value as it is written in the legend."""
        return f"{100 * value:.1f}%" if self.is_share else short_number(value)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Axis ranges with their ticks, and the map to SVG coordinates."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def at(self, x: float, y: float) -> str:
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        right = _WIDTH - _LEFT - _RIGHT
        down = _HEIGHT - _TOP - _BOTTOM
        return f"{_LEFT + across * right:.1f},{_TOP + (1 - up) * down:.1f}"

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(self.at(x, y) for x, y in points)


def figure_html(chart: Chart) -> str:
    """A ``<figure>``: title, legend with the last (stacked: mean) values, the drawing and its
    description. Needs a point.
    """
    frame = _frame(chart)
    draw = _svg_areas if chart.stacked else _svg_lines
    keys = "".join(
        f'<span><i class="k{i % 6}"></i>{html.escape(line.label)}'
        f"<b>{chart.value(_key_value(chart, line))}</b></span>"
        for i, line in enumerate(chart.lines)
    )
    label = html.escape(describe(chart))
    return (
        f'<figure><figcaption>{html.escape(chart.title)}</figcaption><div class="keys">{keys}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{_svg_axes(chart, frame)}{draw(chart, frame)}</svg></figure>"
    )


def describe(chart: Chart) -> str:
    """The chart in words: where each curve starts and ends."""
    parts = []
    for line in chart.lines:
        (x0, y0) = line.points[0]
        (x1, y1) = line.points[-1]
        ends = (
            f"from {chart.value(y0)} at {short_number(x0)} to {chart.value(y1)} at "
            f"{short_number(x1)}"
        )
        parts.append(f"{line.label} {ends}")
    return f"{chart.title} by {chart.x}: {'; '.join(parts)}."


def style_axes(axes: Any, label: Callable[[float], str]) -> None:
    """The look of every panel of a PNG."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.yaxis.set_major_formatter(lambda value, _: label(round(value, 10)))


def smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over an eighth of the curve around each point (less at the ends); below 16 points the
    curve as it is.
    """
    half = len(points) // 16
    result = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def thin(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most ``limit`` points: means of equally many neighbours."""
    size = -(-len(points) // limit)
    chunks = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` steps of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short_number(value: float, digits: int = 4) -> str:
    """A number in little room: ``0.05``, ``850``, ``12k``, ``3e-06``."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:.{digits}g}M" if abs(value) >= 1e6 else f"{value / 1e3:.{digits}g}k"
    return f"{value:.1e}".replace(".0e", "e") if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"


def _key_value(chart: Chart, line: Line) -> float:
    """What the legend says of a curve: the mean of an area, the end of a line."""
    if chart.stacked:
        return sum(y for _, y in line.points) / len(line.points)
    return (line.points if line.bars else smooth(thin(line.points)))[-1][1]


def _frame(chart: Chart) -> _Frame:
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for _, y in line.points]
    if chart.stacked:
        ys = [
            sum(heights)
            for heights in zip(*([y for _, y in x.points] for x in chart.lines), strict=True)
        ]
    ys += [y for line in chart.lines for bar in line.bars for y in bar[1:]]
    ys += [chart.floor] if chart.floor is not None else []
    low = min(xs)
    high = max(xs)
    low = 0.0 if 0 < low <= 0.05 * high else low  # the first of many steps is as good as the origin
    if low == high:
        low = low - 1
        high = high + 1
    inside = [
        x for x in ticks(low, high, 8) if low <= x <= high and (x == round(x) or high - low < 3)
    ]
    return _Frame(low, high, inside, ticks(min(ys), max(ys)))


def _svg_axes(chart: Chart, frame: _Frame) -> str:
    parts = []
    for y in frame.y_ticks:
        left, height = frame.at(frame.x_low, y).split(",")
        parts.append(f'<path class="grid" d="M{left},{height}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{height}" dy=".35em" '
            f'text-anchor="end">{chart.label(y)}</text>'
        )
    for x in frame.x_ticks:
        across = frame.at(x, frame.y_ticks[0]).split(",")[0]
        parts.append(
            f'<text x="{across}" y="{_HEIGHT - 19}" text-anchor="middle">{short_number(x)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{html.escape(chart.x)}</text>'
    )
    return "".join(parts)


def _svg_lines(chart: Chart, frame: _Frame) -> str:
    parts = []
    for i, line in enumerate(chart.lines):
        colour = i % 6
        dash = " dash" if line.dashed else ""
        points = line.points if line.bars else thin(line.points)
        if not line.bars and len(points) >= 16:
            parts.append(f'<path class="raw s{colour}" d="{frame.path(points)}"/>')
        curve = points if line.bars else smooth(points)
        parts.append(f'<path class="line s{colour}{dash}" d="{frame.path(curve)}"/>')
        for x, low, high in line.bars:
            parts.append(f'<path class="bar s{colour}" d="{frame.path([(x, low), (x, high)])}"/>')
        dots = points if line.bars or len(points) == 1 else []
        for x, y in dots:
            across, down = frame.at(x, y).split(",")
            parts.append(f'<circle class="f{colour}" cx="{across}" cy="{down}" r="3"/>')
    return "".join(parts)


def _svg_areas(chart: Chart, frame: _Frame) -> str:
    parts = []
    below = [(x, 0.0) for x, _ in chart.lines[0].points]
    for i, line in enumerate(chart.lines):
        above = [(x, y + b) for (x, y), (_, b) in zip(line.points, below, strict=True)]
        outline = frame.path([*above, *reversed(below)])
        parts.append(f'<path class="f{i % 6}" opacity=".85" d="{outline}Z"/>')
        below = above
    return "".join(parts)
