"""docs/theory.md: its tables come from the committed figures, the exact figures can be computed
again, its tests exist.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.theory import exact_figures
from benchmarks.theory_page import PAGE, RESULTS, TABLES, fill

ROOT = Path(__file__).parents[2]
FIGURES = json.loads(RESULTS.read_text())


def test_tables_come_from_the_figures() -> None:
    text = PAGE.read_text()
    assert fill(text, FIGURES) == text, "run python -m benchmarks.theory --page"
    assert len(re.findall(r"^\| ---", text, re.M)) >= len(TABLES)
    with pytest.raises(ValueError, match="has no table 'calls'"):
        fill("", FIGURES)


def test_exact_figures_are_what_the_code_gives() -> None:
    for name, rows in exact_figures().items():
        assert len(rows) == len(FIGURES[name])
        for new, old in zip(rows, FIGURES[name], strict=True):
            assert new.keys() == old.keys()
            for key in new:
                assert new[key] == (
                    pytest.approx(old[key], rel=1e-6, abs=1e-6)
                    if isinstance(new[key], float)
                    else old[key]
                )


def test_every_test_on_the_page_exists_and_every_theory_test_is_on_the_page() -> None:
    source = "".join(
        path.read_text() for path in sorted((ROOT / "tests" / "unit").rglob("test_theory_*.py"))
    )
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    defined = set(re.findall(r"^def (test_\w+)", source, re.M))
    assert named == defined


def test_what_the_page_says_of_the_drift_is_in_the_figures() -> None:
    """Shared masks: no noise without drift, more with every update. Exit and anchors: what the list
    says.
    """
    found = {(r["likelihood"], r["updates"]): r for r in FIGURES["drift"]["table"]}

    def ratio(one: str, other: str, updates: int, kind: str) -> float:
        return sum(found[one, updates][kind]) / sum(found[other, updates][kind])

    for name in FIGURES["drift"]["tokens"]:
        shared = [sum(found[name, updates]["token shared"]) for updates in range(4)]
        assert shared[0] == 0 and shared == sorted(shared)
        for kind in ("token", "mean", "sum"):
            assert sum(found[name, 3][f"{kind} shared"]) < 0.5 * sum(
                found[name, 3][f"{kind} independent"]
            )
    for kind in ("token", "mean", "sum"):
        assert ratio("free tokens, exit", "free tokens", 3, f"{kind} shared") < 0.7
        assert (
            max(ratio("free tokens, exit", "free tokens", u, f"{kind} independent") for u in (0, 3))
            < 0.1
        )
    for end in ("", ", exit"):
        for masks in ("shared", "independent"):
            assert ratio("free tokens" + end, "all tokens" + end, 3, f"sum {masks}") < 1
            assert ratio("free tokens" + end, "all tokens" + end, 3, f"mean {masks}") > 1
            assert 0.9 < ratio("free tokens" + end, "all tokens" + end, 3, f"token {masks}") < 1.2
