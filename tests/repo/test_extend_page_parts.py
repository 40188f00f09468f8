"""docs/extend.md: the family and the engine of the page pass their checkers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unmaskrl.models.families import named_family
from unmaskrl.recipes.engines import make_rollouts
from unmaskrl.testing import check_family, check_rollouts

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_family_of_the_page_passes(folder: Path) -> None:
    family = named_family("bag.py:family")
    assert family is not None
    check_family(family)


def test_the_engine_of_the_page_passes(folder: Path) -> None:
    check_rollouts(lambda den: make_rollouts({"name": "one_by_one.py:LeftToRight"}, den))
