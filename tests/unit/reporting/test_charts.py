"""The small charts: scales, smoothing, SVG geometry, words."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest

from unmaskrl.reporting.charts import (
    DARK,
    DASHES,
    LIGHT,
    PAGE,
    Chart,
    Line,
    chart_svg,
    describe,
    short_number,
    smooth,
    spread,
    thin,
)


def numbers(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*", path)]


def curves(text: str, colour: int) -> list[list[float]]:
    """Coordinates of the curves of a colour."""
    found = re.findall(rf' d="([^"]*)" style="fill: none;[^"]*stroke: var\(--c{colour}\)', text)
    return [numbers(path) for path in found]


def test_line_chart_maps_values_linearly() -> None:
    chart = Chart(title="t", lines=[Line(label="a", points=[(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)])])
    x0, y0, *_, x1, y1 = curves(chart_svg(chart), 0)[0]
    assert x1 > x0 and y1 < y0
    bent = Chart(title="t", lines=[Line(label="a", points=[(0.0, 0.0), (5.0, 9.0), (10.0, 10.0)])])
    a0, b0, a1, b1, a2, b2 = curves(chart_svg(bent), 0)[0]
    assert a1 - a0 == pytest.approx(a2 - a1, abs=0.1)
    assert b1 - b0 == pytest.approx(0.9 * (b2 - b0), abs=0.1)


def test_areas_lie_on_each_other() -> None:
    lines = [Line(label=n, points=[(0.0, v), (1.0, v)]) for n, v in (("a", 1.0), ("b", 3.0))]
    text = chart_svg(Chart(title="t", lines=lines, stacked=True, floor=0.0))
    shapes = dict(re.findall(r'<path id="([^"]*)" d="([^"]*)"', text))
    areas = re.findall(r'<use href="#([^"]*)"[^>]*style="fill: var\(--c([01])\)', text)
    low, high = (sorted(set(numbers(shapes[name])[1::2])) for name, _ in areas)
    assert [colour for _, colour in areas] == ["0", "1"] and high[1] == low[0]  # y runs downwards
    assert high[1] - high[0] == pytest.approx(3 * (low[1] - low[0]), abs=0.1)


@pytest.mark.parametrize(
    "points",
    [[(3.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -2.0), (2.0, -2.0)], [(1.0, 1e-9), (2.0, 1e9)]],
)
def test_any_data_can_be_drawn(points: list[tuple[float, float]]) -> None:
    text = chart_svg(Chart(title="t", lines=[Line(label="a", points=points)], floor=0.0))
    ElementTree.fromstring(text)
    found = [x for path in re.findall(r' d="([^"]*)"', text) for x in numbers(path)]
    assert found and all(-20 <= x <= 401 for x in found)


def test_a_drawing_is_the_same_twice_and_holds_nothing_of_its_maker() -> None:
    points = [(float(i), float(i % 5)) for i in range(40)]
    bars = [(0.0, 0.0, 1.0)]
    chart = Chart(
        title="<b>&",
        lines=[Line(label="a", points=points), Line(label="b", points=[(0.0, 0.5)], bars=bars)],
    )
    text = chart_svg(chart)
    assert chart_svg(chart) == text
    assert (
        "http" not in text
        and "url(" not in text
        and "<style" not in text
        and "id=" not in (re.sub(r'<path id="m[0-9a-f]+"', "", text))
    )
    assert not set(re.findall(r"#[0-9a-f]{6}\b", text)), "colours are the page's variables"
    assert 'aria-label="&lt;b&gt;&amp; by step' in text
    other = chart_svg(Chart(title="u", lines=chart.lines))
    ids = [set(re.findall(r'id="([^"]*)"', page)) for page in (text, other)]
    assert ids[0] and not ids[0] & ids[1], "two charts of a page share no id"


def test_a_line_that_is_empty_keeps_the_colours_of_the_others() -> None:
    lines = [Line(label="a", points=[]), Line(label="b", points=[(0.0, 0.5), (1.0, 0.9), (2.0, 0)])]
    text = chart_svg(Chart(title="t", lines=lines))
    assert curves(text, 1) and not curves(text, 0)
    assert "a from" not in text and "b from" in text


def test_labels_at_line_ends_do_not_overlap() -> None:
    rng = random.Random(3)
    for _ in range(200):
        places = [rng.random() ** 3 for _ in range(rng.randint(1, 9))]
        moved = sorted(spread(places, 0.1))
        assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(moved))
        assert moved[0] >= -1e-9 and moved[-1] <= 1 + 1e-9
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    names = ["first", "second", "third"]
    lines = [Line(label=name, points=[(0.0, 0.0), (1.0, 1.0)]) for name in names]
    text = chart_svg(Chart(title="t", lines=lines))
    heights = [float(re.findall(rf'y="([^"]*)"[^>]*>{name} 1<', text)[0]) for name in names]
    assert all(abs(a - b) >= 11 for a, b in combinations(heights, 2))


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)


def times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def lab(colour: str, sight: str) -> tuple[float, float, float]:
    """CIE Lab (D65) of a colour as it is seen."""
    seen = [min(1.0, max(0.0, c)) for c in times(SIGHT[sight], linear(colour))]
    x, y, z = (
        c ** (1 / 3) if c > 216 / 24389 else (24389 / 27 * c + 16) / 116
        for c in (v / w for v, w in zip(times(TO_XYZ, seen), (0.95047, 1, 1.08883), strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_any_two_lines_of_a_chart_can_be_told_apart(palette: Sequence[str], sight: str) -> None:
    for one, other in combinations(palette, 2):
        assert math.dist(lab(one, sight), lab(other, sight)) >= 20, (one, other)


def test_the_measure_tells_red_and_green_that_are_one_colour() -> None:
    """The report's old red and green: 6 for a deuteranope, far apart for others."""
    red = "#c8553d"
    green = "#5f8a3a"
    assert math.dist(lab(red, "deuteranopia"), lab(green, "deuteranopia")) < 10
    assert math.dist(lab(red, "all"), lab(green, "all")) > 50


@pytest.mark.parametrize(("palette", "at"), [(LIGHT, 0), (DARK, 1)], ids=["light", "dark"])
def test_lines_stand_out_from_the_page_and_text_can_be_read(
    palette: Sequence[str], at: int
) -> None:
    def contrast(one: str, other: str) -> float:
        low, high = sorted(times(TO_XYZ, linear(colour))[1] for colour in (one, other))
        return (high + 0.05) / (low + 0.05)

    page = PAGE["bg"][at]
    assert all(contrast(colour, page) >= 3 for colour in palette)
    assert all(contrast(PAGE[name][at], page) >= 4.5 for name in ("fg", "muted"))


def test_lines_differ_by_dashes_as_well() -> None:
    assert len(LIGHT) == len(DARK) == len(DASHES) == len(set(map(str, DASHES))) == len(set(LIGHT))


def test_description_names_both_ends() -> None:
    chart = Chart(
        title="Loss", lines=[Line(label="a", points=[(1.0, 0.5), (2.0, 0.25)])], is_share=True
    )
    assert describe(chart) == "Loss by step: a from 50.0% at 1 to 25.0% at 2."


def test_smoothing_keeps_constants_and_length_and_damps_noise() -> None:
    flat = [(float(i), 2.0) for i in range(100)]
    assert smooth(flat) == flat
    noise = [(float(i), float(i % 2)) for i in range(100)]
    inner = [y for _, y in smooth(noise)[10:-10]]
    assert all(abs(y - 0.5) < 0.1 for y in inner)
    assert smooth(noise[:10]) == noise[:10]


def test_thinning_bounds_the_points_and_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100 and few[0] == (4.5, sum(i % 7 for i in range(10)) / 10)
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points, 1000) == points and len(thin(points, 999)) == 500 and thin([], 5) == []


def test_short_numbers() -> None:
    values = (0.0, 0.05, 1.00432, 850.0, 1234.0, 12_000.0, 2.5e6, 3e-6, 2.5e-6, -0.5)
    wanted = ["0", "0.05", "1.004", "850", "1234", "12k", "2.5M", "3e-06", "2.5e-06", "-0.5"]
    assert [short_number(v) for v in values] == wanted


def test_axis_labels_stay_apart() -> None:
    """Four digits would call 1.0001 and 1.00015 the same."""
    chart = Chart(title="t", lines=[Line(label="a", points=[(1.0, 1.0001), (2.0, 1.0003)])])
    labels = re.findall(r"text-anchor: end[^>]*>([^<]*)<", chart_svg(chart))
    assert len(labels) == len(set(labels)) >= 4
