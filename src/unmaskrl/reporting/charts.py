"""Small charts as SVG for a page, drawn by matplotlib: curves with labels at their ends, or stacked
areas.

The same data give the same text: fixed salt, no date, no fonts embedded. The drawing is made in the
light palette, whose colours are then replaced by CSS variables (``CHART_CSS``), so that a page
follows the reader's light or dark theme.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Point = tuple[float, float]
# The hues of Okabe and Ito, made lighter or darker until any two differ by at least 20 (CIE Lab)
# also for a deuteranope, and each by 3 to 1 from the page. The last one is the ink of the page.
LIGHT = ("#00598b", "#803800", "#1c93d6", "#c76d9f", "#a67300", "#006a4d", "#1c2530")
DARK = ("#008fe0", "#e26400", "#65bbeb", "#c76d9f", "#ffcc5b", "#00da9e", "#e3e8ee")
COLOURS = LIGHT
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.8)),
    (0, (1.8, 1.2)),
    (0, (6, 1.6, 1.6, 1.6)),
    (0, (9, 2.5)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (1, 2.2)),
)
# roles of the page: name -> (light, dark)
PAGE = {
    "bg": ("#ffffff", "#14181d"),
    "fg": ("#1c2530", "#e3e8ee"),
    "muted": ("#5b6672", "#9aa5b1"),
    "soft": ("#f4f6f8", "#1c2229"),
    "grid": ("#e4e8ec", "#2c333c"),
    "band": ("#e9f3ee", "#1b2a26"),
}
_ROLES = {name: pair[0] for name, pair in PAGE.items()}
_WIDTH = 344.0
_HEIGHT = 210.0
_LEFT = 40.0
_TOP = 10.0
_BOTTOM = 38.0
_FONT = 10.0
_LINE = 12.0  # between two labels
_CHARACTER = 5.7  # the width of one, at most
_MAX_POINTS = 240
_MAX_LABEL = 15


def _variables(at: int) -> str:
    """The CSS variables of the light (0) or dark (1) theme."""
    named = {f"c{i}": pair[at] for i, pair in enumerate(zip(LIGHT, DARK, strict=True))}
    named |= {name: pair[at] for name, pair in PAGE.items()}
    return ";".join(f"--{name}:{colour}" for name, colour in named.items())


CHART_CSS = (
    f":root{{color-scheme:light dark;{_variables(0)}}}\n"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named curve. One with ``bars``, (x, low, high) intervals, is drawn as dots and not
    smoothed; ``apart``: its dots are not joined.
    """

    label: str
    points: Sequence[Point]
    bars: Sequence[tuple[float, float, float]] = ()
    apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over ``x``, or areas ``stacked`` on each other; the y axis includes ``floor``, and is
    in % for shares. ``band``: the healthy range. ``hint``: a line of words below the title.
    """

    title: str
    lines: Sequence[Line]
    x: str = "step"
    floor: float | None = None
    is_share: bool = False
    stacked: bool = False
    band: tuple[float, float] | None = None
    hint: str = ""

    def label(self, value: float) -> str:
        """A round value as it is written at an axis."""
        return f"{100 * value:.6g}%" if self.is_share else short_number(value, 6)

    def value(self, value: float) -> str:
        """A measured value as it is written at a line's end."""
        return f"{100 * value:.1f}%" if self.is_share else short_number(value, 3)


def chart_svg(chart: Chart) -> str:
    """The drawing as an ``<svg>`` element with its description. Needs a point."""
    import matplotlib
    from matplotlib.figure import Figure

    labels = {i: _end_label(chart, line) for i, line in _shown(chart)}
    right = 18 + _CHARACTER * max(map(len, labels.values()))
    options: Any = {  # typed for literal keys
        "svg.fonttype": "none",
        "svg.hashsalt": f"{chart.title} {chart.x}",
        "font.size": _FONT,
        "path.simplify_threshold": 0.3,
    }
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        size = (_WIDTH - _LEFT - right, _HEIGHT - _TOP - _BOTTOM)
        place = (_LEFT / _WIDTH, _BOTTOM / _HEIGHT, size[0] / _WIDTH, size[1] / _HEIGHT)
        axes = figure.add_axes(place)
        ends = draw_areas(axes, chart) if chart.stacked else draw_lines(axes, chart)
        _limit(axes, chart)
        _label_ends(axes, labels, ends, size[1])
        axes.set_xlabel(chart.x, fontsize=_FONT, color=_ROLES["muted"], labelpad=2)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        for artist in axes.findobj():
            artist.set_clip_on(False)  # all of it is inside
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return _for_a_page(file.getvalue(), describe(chart))


def describe(chart: Chart) -> str:
    """The chart in words: where each curve starts and ends."""
    parts = []
    for _, line in _shown(chart):
        (x0, y0) = line.points[0]
        (x1, y1) = line.points[-1]
        ends = (
            f"from {chart.value(y0)} at {short_number(x0)} to {chart.value(y1)} at "
            f"{short_number(x1)}"
        )
        parts.append(f"{line.label} {ends}")
    return f"{chart.title} by {chart.x}: {'; '.join(parts)}."


def _shown(chart: Chart) -> list[tuple[int, Line]]:
    """The lines that have points, by the number that gives each its colour and dash."""
    return [(i, line) for i, line in enumerate(chart.lines) if line.points]


def draw_lines(axes: Any, chart: Chart) -> dict[int, Point]:
    """The curves on matplotlib axes; returns where each ends."""
    ends = {}
    for i, line in _shown(chart):
        colour = COLOURS[i % len(COLOURS)]
        points = line.points if line.bars else thin(line.points)
        curve = points if line.bars else smooth(points)
        if curve != points:
            axes.plot(*_columns(points), color=colour, linewidth=0.7, alpha=0.3)
        dotted = bool(line.bars) or len(points) == 1
        axes.plot(
            *_columns(curve),
            color=colour,
            linewidth=0 if line.apart else 1.7,
            linestyle=DASHES[i % len(DASHES)],
            marker="oDs^v"[i % 5] if dotted else "",
            markersize=4.5,
            markerfacecolor=_ROLES["bg"] if line.apart else colour,
        )
        for x, low, high in line.bars:
            axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.6)
        ends[i] = curve[-1]
    return ends


def draw_areas(axes: Any, chart: Chart) -> dict[int, Point]:
    """The stacked areas; returns the middle of each at the right end."""
    ends = {}
    below = 0.0
    heights = [[y for _, y in line.points] for line in chart.lines]
    axes.stackplot(
        [x for x, _ in chart.lines[0].points],
        heights,
        colors=COLOURS,
        edgecolor=_ROLES["bg"],
        linewidth=0.8,
    )
    for i, values in enumerate(heights):
        ends[i] = (chart.lines[i].points[-1][0], below + values[-1] / 2)
        below += values[-1]
    return ends


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _limit(axes: Any, chart: Chart) -> None:
    """Ranges that enclose the data (and the floor), round ticks, the healthy band."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    xs = [x for line in chart.lines for x, _ in line.points]
    low = min(xs)
    high = max(xs)
    if 0 < low <= 0.05 * high:
        low = 0.0  # the first of many steps is as good as the origin
    pad = 0.02 * (high - low) or 1.0
    axes.set_xlim(low - pad, high + pad)
    bottom, top = axes.get_ylim()
    if chart.floor is not None and all(y >= chart.floor for x in chart.lines for _, y in x.points):
        bottom = chart.floor
    if bottom == top:
        top = bottom + 1.0
    axes.set_ylim(bottom, top)
    if chart.band is not None:
        inside = (max(bottom, chart.band[0]), min(top, chart.band[1]))
        if inside[0] < inside[1]:
            axes.axhspan(*inside, color=_ROLES["band"], linewidth=0, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    style_axes(axes, chart.label, size=_FONT)
    axes.tick_params(axis="x", pad=7)  # clear of the lowest label of the y axis


def style_axes(axes: Any, label: Callable[[float], str], size: float = 8) -> None:
    """The look of every panel, here and in the pictures of the commands."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_ROLES["grid"])
    axes.grid(axis="y", color=_ROLES["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=size, length=0, labelcolor=_ROLES["muted"])
    axes.yaxis.set_major_formatter(lambda value, _: label(round(value, 10)))


def _end_label(chart: Chart, line: Line) -> str:
    """Name and last value (of areas the mean); one line alone needs no name."""
    value = chart.value(end_value(chart, line))
    if len(chart.lines) == 1:
        return value  # the title names it
    name = line.label
    short = name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 2]}.."
    return f"{short} {value}"


def end_value(chart: Chart, line: Line) -> float:
    """What is said of a curve: the mean of an area, the smoothed end of a line."""
    if chart.stacked:
        return sum(y for _, y in line.points) / len(line.points)
    return (line.points if line.bars else smooth(thin(line.points)))[-1][1]


def _label_ends(axes: Any, labels: dict[int, str], ends: dict[int, Point], height: float) -> None:
    """Labels right of the axes at the ends of their lines, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    places = [(ends[i][1] - bottom) / (top - bottom) for i in labels]
    moved = spread(places, _LINE / height)
    start = axes.get_xlim()[1]
    for (i, label), place, at in zip(labels.items(), places, moved, strict=True):
        colour = COLOURS[i % len(COLOURS)]
        across = axes.get_xaxis_transform()
        axes.annotate(
            label,
            (start, at),
            xycoords=across,
            xytext=(13, 0),
            textcoords="offset points",
            color=_ROLES["fg"],
            va="center",
            parse_math=False,
        )
        axes.annotate(
            "",
            (start, place),
            xycoords=across,
            xytext=(11, (at - place) * height),
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1.2,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        if ends[i][0] < start:  # a line that ends earlier than others
            ink = {"color": colour, "linewidth": 0.6, "alpha": 0.5}
            axes.plot([ends[i][0], start], [ends[i][1]] * 2, **ink)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, each moved as little as needed for neighbours to be ``gap`` apart, inside
    [0, 1] as far as there is room.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    result = [min(1.0, max(0.0, place)) for place in places]
    for before, after in pairwise(order):
        result[after] = max(result[after], result[before] + gap)
    highest = 1.0
    for i in reversed(order):
        result[i] = min(result[i], highest)
        highest = result[i] - gap
    return result


def _for_a_page(svg: str, description: str) -> str:
    """The element alone: no ids that others could have, no name spaces, colours as variables."""
    start = svg.index("<svg")
    body = svg[svg.index(">", start) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"/>|<defs></defs>', "", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r' ?font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r' (?:d|x|y|width|height)="[^"]*"', _rounded, body)
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    label = html.escape(description)
    head = f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}">'
    return head + re.sub(r" ?\n *", " ", body.strip()).replace("> <", "><")


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to hundredths of a pixel."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])


_VARIABLES = {colour: f"c{i}" for i, colour in enumerate(LIGHT)} | {
    colour: name for name, colour in _ROLES.items()
}


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


def short_number(value: float, digits: int = 4) -> str:
    """A number in little room: ``0.05``, ``850``, ``12k``, ``3e-06``."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:.{digits}g}M" if abs(value) >= 1e6 else f"{value / 1e3:.{digits}g}k"
    return f"{value:.1e}".replace(".0e", "e") if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
