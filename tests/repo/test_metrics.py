"""The table of metrics, which docs/metrics.md is made from: every key that the code spells is in
it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from unmaskrl.reporting.curves import CHARTS
from unmaskrl.reporting.metrics import STEP, find

SOURCE = Path(__file__).parents[2] / "src" / "unmaskrl"
SECTIONS = {m.key.split("/")[0] for m in STEP if "/" in m.key}


def spelled(path: Path) -> set[str]:
    """Strings of a file that look like a metric's key; a braced part of an f-string is ``x``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else "x" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if re.fullmatch(r"[a-z_]+/[a-z0-9_]+", text) and text.split("/")[0] in SECTIONS:
            found.add(text)
    return found


@pytest.mark.parametrize("room", ["core", "reporting", "training"])
def test_every_key_that_the_code_spells_is_in_the_table(room: str) -> None:
    keys = {key for path in sorted((SOURCE / room).rglob("*.py")) for key in spelled(path)}
    keys -= {"rollout/x"}  # tensors of an open step in a checkpoint
    assert keys and not {key for key in keys if find(key) is None}


def test_every_chart_has_a_line_and_every_line_a_chart() -> None:
    drawn = {metric.chart for metric in STEP} - {""}
    assert drawn == set(CHARTS) - {"loss"}, "that is of supervised runs"
    for metric in STEP:
        assert metric.ranks in ("sum", "mean", "max", "same")
        assert metric.updates in ("", "mean", "sum", "max")
        assert bool(metric.chart) >= bool(metric.label) and metric.meaning.endswith(".")
    keys = [metric.key for metric in STEP]
    assert len(keys) == len(set(keys))
