"""All JSON that is written can be read by any reader: no bare NaN or Infinity."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from unmaskrl.recipes.schema import DecodeConfig
from unmaskrl.reporting.progress import number
from unmaskrl.utils.files import append_jsonl, json_text, read_jsonl

SOURCE = Path(__file__).parents[3] / "src" / "unmaskrl"


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_is_null_and_an_infinity_a_string_that_reads_back() -> None:
    data = {
        "a": math.nan,
        "b": [math.inf, (-math.inf, 1.5)],
        math.inf: {"c": None, "d": True, "e": 3},
    }
    read = {"a": None, "b": ["Infinity", ["-Infinity", 1.5]], "inf": {"c": None, "d": True, "e": 3}}
    assert strict(json_text(data)) == read
    gamma: Any = strict(json_text(math.inf))
    assert DecodeConfig(select="eb", gamma=gamma).gamma == math.inf


def test_logs_hold_no_bare_nan_and_readers_know_no_number(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    append_jsonl(log, [{"step": 1, "loss": math.nan, "reward/mean": math.inf, "nfe/mean": 2.0}])
    (row,) = read_jsonl(log)
    assert strict(log.read_text()) == row
    assert (
        number(row, "loss") is None
        and number(row, "reward/mean") is None
        and number(row, "nfe/mean") == 2.0
    )


@pytest.mark.parametrize(
    "path", sorted(SOURCE.glob("**/*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_only_one_place_writes_json(path: Path) -> None:
    """tasks/ speaks to its own worker processes in Python's JSON, and a digest is not written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            options = {keyword.arg for keyword in node.keywords}
            assert "tasks" in path.parts or options & {"allow_nan", "default"}, (
                f"{path.name}:{node.lineno}: use files.json_text"
            )
