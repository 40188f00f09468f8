"""docs/estimators.md is what benchmarks/estimators.py makes of the committed figures, and has a
card for every estimator.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from unmaskrl.core.estimators import ESTIMATORS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "estimators_script", ROOT / "benchmarks" / "estimators.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_made_from_the_committed_figures(script: ModuleType) -> None:
    page = script.PAGE.read_text()
    results = json.loads(script.RESULTS.read_text())
    assert script.fill(page, results) == page, (
        "run python benchmarks/estimators.py --page: docs/estimators.md is stale"
    )
    changed = json.loads(script.RESULTS.read_text())
    for table in ("toy", "pruning", "model"):
        changed[table][0][{"toy": "bias_elbo", "pruning": "value", "model": "mean"}[table]] += 1
        assert script.fill(page, {**results, table: changed[table]}) != page


def test_every_setting_is_in_its_table(script: ModuleType) -> None:
    results = json.loads(script.RESULTS.read_text())
    assert [r["estimator"] for r in results["toy"]] == [s.label for s in script.ON_TOY]
    assert [r["estimator"] for r in results["model"]][:-1] == [s.label for s in script.ON_MODEL]
    assert {s.name for s in script.ON_TOY} == {s.name for s in script.ON_MODEL} == set(ESTIMATORS)


def test_every_estimator_has_a_card(script: ModuleType) -> None:
    cards = dict(
        re.findall(r"^### `(\w+)`\n(.*?)(?=^### |\Z)", script.PAGE.read_text(), re.M | re.S)
    )
    assert set(cards) == set(ESTIMATORS)
    for name, card in cards.items():
        assert re.findall(r"^- (\w+):", card, re.M) == [
            "Paper",
            "Formula",
            "Cost",
            "Bias",
            "Watch",
        ], name


def test_unbiased_estimators_are_unbiased_in_the_committed_figures(script: ModuleType) -> None:
    """Within 4 standard errors of the mean over all completions."""
    rows = {r["estimator"]: r for r in json.loads(script.RESULTS.read_text())["toy"]}
    for label in (
        "`elbo`, independent draws",
        "`elbo`",
        "`elbo`, antithetic",
        "`espo`",
        "`sandwich`, random masks, A >= 0",
    ):
        assert abs(rows[label]["bias_elbo"]) < 4 * rows[label]["error_of_bias"] < 0.03
    assert rows["`coupled`"]["bias_elbo"] < -1
    assert rows["`trajectory`"]["rms_rollout"] < 1e-5
