"""Runs of integration tests: their reports without drawings, except where a test looks at them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unmaskrl.reporting import charts, pages


@pytest.fixture(scope="session", autouse=True)
def charts_not_drawn() -> Iterator[None]:
    """The sixteen drawings of a report take longer than a run of two steps on two problems.

    tests/unit/reporting draws every chart; tests/undrawn.py does the same for processes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "chart_svg", lambda chart: "<svg></svg>")
        yield


@pytest.fixture
def charts_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at a whole report."""
    monkeypatch.setattr(pages, "chart_svg", charts.chart_svg)
