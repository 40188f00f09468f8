"""The small charts: scales, smoothing, SVG geometry, words."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from unmaskrl.reporting.charts import (
    Chart,
    Line,
    describe,
    figure_html,
    short_number,
    smooth,
    thin,
    ticks,
)


def test_line_chart_maps_values_linearly() -> None:
    chart = Chart(title="t", lines=[Line(label="a", points=[(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)])])
    (path,) = re.findall(r'class="line s0" d="M([^"]*)"', figure_html(chart))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2)
    assert x2 > x0 and y2 < y0


@pytest.mark.parametrize(
    "points",
    [[(3.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -2.0), (2.0, -2.0)], [(1.0, 1e-9), (2.0, 1e9)]],
)
def test_any_data_can_be_drawn(points: list[tuple[float, float]]) -> None:
    text = figure_html(Chart(title="t", lines=[Line(label="a", points=points)], floor=0.0))
    ElementTree.fromstring(text)
    numbers = [
        float(x) for d in re.findall(r' d="([^"]*)"', text) for x in re.findall(r"[-\d.]+", d)
    ]
    assert numbers and all(-1 <= x <= 401 for x in numbers)


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


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.62, [0.0, 0.2, 0.4, 0.6, 0.8]),
        (-3.0, 7.0, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


def test_ticks_enclose_any_range() -> None:
    rng = random.Random(1)
    for _ in range(300):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 6)
        high = low + rng.random() * 10 ** rng.randint(-8, 6)
        found = ticks(low, high)
        slack = 1e-6 * (found[-1] - found[0])
        assert found[0] <= low + slack and found[-1] >= high - slack and 2 <= len(found) <= 8


def test_short_numbers() -> None:
    values = (0.0, 0.05, 1.00432, 850.0, 1234.0, 12_000.0, 2.5e6, 3e-6, 2.5e-6, -0.5)
    wanted = ["0", "0.05", "1.004", "850", "1234", "12k", "2.5M", "3e-06", "2.5e-06", "-0.5"]
    assert [short_number(v) for v in values] == wanted


def test_axis_labels_stay_apart() -> None:
    """Four digits would call 1.0001 and 1.00015 the same."""
    chart = Chart(title="t", lines=[Line(label="a", points=[(1.0, 1.0001), (2.0, 1.0003)])])
    labels = re.findall(r'text-anchor="end">([^<]*)<', figure_html(chart))
    assert len(labels) == len(set(labels)) >= 4
