"""What `frontier` and `variance` show: a sentence that says whether pruning helped, and pictures in
which no label lies on another.
"""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unmaskrl.reporting.frontier import frontier_figure, frontier_png
from unmaskrl.reporting.variance import variance_png, variance_table, verdicts

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def stored(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / name).read_text())


def result(*ratio: float) -> dict[str, Any]:
    """An estimator whose pruned variance is ``ratio`` (mean, low, high) of the full one."""
    found = {"ratio": {"variance": list(ratio)}} if ratio else {"ratio": {"variance": None}}
    versions = {"full": {}, "free": {"ratio": {"variance": [0.5, 0.4, 0.8]}}, "free+exit": found}
    return {"estimators": [{"name": "elbo", "versions": versions}]}


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((0.25, 0.2, 0.5), "pruning helped: variance 2.0 times lower (1.2 to 2.5) with anchors, "
         "4.0 times lower (2.0 to 5.0) with the exit too"),
        ((2.0, 1.5, 2.5), "pruning hurt: variance 2.0 times lower (1.2 to 2.5) with anchors, "
         "2.0 times higher (1.5 to 2.5) with the exit too"),
        ((0.9, 0.5, 1.2), "no clear difference: variance"),
        ((), "no verdict"),
    ],
)  # fmt: skip
def test_whether_pruning_helped(ratio: tuple[float, ...], said: str) -> None:
    (line,) = verdicts(result(*ratio))
    assert line.startswith(f"elbo: {said}") and "\n" not in line


def test_every_estimator_gets_a_sentence_and_the_table_fits(tmp_path: Path) -> None:
    figures = stored("variance.json")
    names = [estimator["name"] for estimator in figures["estimators"]]
    assert [line.split(": ")[0] for line in verdicts(figures)] == names
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(variance_table(figures))
    text = console.export_text()
    variance = figures["estimators"][0]["versions"]["free+exit"]["variance"]
    assert "that rose" in text and f"{variance:.3g}" in text
    assert text.rstrip().count("\n") < 100
    variance_png(figures, tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["frontier-s0.json", "frontier-mixed-s1.json"])
def test_labels_lie_on_nothing(name: str, tmp_path: Path) -> None:
    figures = stored(name)
    figure = frontier_figure(figures)
    renderer = figure.canvas.get_renderer()
    for axes, model in zip(figure.axes, figures["models"], strict=True):
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        inside = axes.get_window_extent(renderer)
        assert len(boxes) >= 0.6 * len(model["points"])
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        points = axes.transData.transform(
            [(p["nfe"], 100 * p["accuracy"]) for p in model["points"]]
        )
        for box in boxes:
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1
            assert not any(box.contains(x, y) for x, y in points)
    frontier_png(figures, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
