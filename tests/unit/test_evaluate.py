"""Intervals and pass@k against their definitions."""

from __future__ import annotations

from itertools import combinations

import pytest

from unmaskrl.evaluate import EvalItem, EvalResult, wilson


def result(groups: list[list[bool]]) -> EvalResult:
    items = [
        EvalItem(id=str(g), correct=c, text="", nfe=4, num_tokens=6, kind="ab"[g % 2])
        for g, row in enumerate(groups)
        for c in row
    ]
    return EvalResult(items=items, samples=len(groups[0]), seconds=1.0, decode={})


@pytest.mark.parametrize(("share", "n"), [(0.0, 20), (0.094, 512), (0.5, 10), (1.0, 7)])
def test_wilson_solves_its_quadratic(share: float, n: int) -> None:
    """The bounds are the p at which |share - p| = z sqrt(p (1 - p) / n)."""
    for bound in wilson(share, n):
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, abs=1e-12)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    groups = [[True, False, False, True], [False] * 4, [True] * 4, [False, True, False, False]]
    for k in (1, 2, 3, 4):
        brute = [any(c) for row in groups for c in combinations(row, k)]
        assert result(groups).pass_at(k) == pytest.approx(sum(brute) / len(brute))
    with pytest.raises(ValueError, match="at least 5"):
        result(groups).pass_at(5)


def test_summary_by_kind_and_interval_over_problems() -> None:
    summary = result([[True, True], [False, True]]).summary()
    assert summary["accuracy"] == 0.75 and summary["accuracy_a"] == 1.0 and summary["accuracy_b"] == 0.5
    assert summary["nfe"] == 4 and summary["tokens_per_call"] == 1.5
    assert (summary["accuracy_low"], summary["accuracy_high"]) == wilson(0.75, 2)
