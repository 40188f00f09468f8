"""An estimator, a loss, an advantage, a selection rule and an optimiser from a file outside the
package: checked, trained a step with, resumed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import tests.own_parts
from unmaskrl.cli.main import main
from unmaskrl.recipes.load import load_recipe
from unmaskrl.testing import check_estimator, check_loss

SOURCE = Path(tests.own_parts.__file__)
TINY = (
    "model.random_init=tiny train.steps=1 train.prompts_per_step=2 train.group_size=4 "
    "train.num_iterations=2 run.threads=1 run.log_with=[] eval.size=2 eval.size_during=2"
).split()
PARTS = {
    "estimator": "all_hidden",
    "loss": "squared_ratio",
    "advantage": "centred",
    "optimizer": "Signs",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mine.py, which nothing has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(SOURCE, tmp_path / "mine.py")
    return tmp_path


def test_all_five_train_a_step_and_are_found_again_on_resume(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{section}.name=mine.py:{name}" for section, name in PARTS.items()]
    words += ["decode.select=mine.py:from_both_ends", "loss.strength=0.25", "optimizer.lr=1e-3"]
    assert main(["check", "sudoku-mini", *TINY, *words]) == 0
    said = capsys.readouterr().out
    assert "mine.py:all_hidden" in said and "strength: 0.25" in said
    assert "optimiser state (mine.py:Signs)" in said
    assert main(["train", "sudoku-mini", *TINY, *words, "run.out=run", "--quiet"]) == 0
    stored = yaml.safe_load((own / "run" / "config.yaml").read_text())
    assert stored["loss"] == {"name": "mine.py:squared_ratio", "strength": 0.25}
    assert stored["decode"]["select"] == "mine.py:from_both_ends"
    row = json.loads((own / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["moved"] >= 0 and row["grad_norm"] >= 0
    capsys.readouterr()
    task = ["--task", "sudoku", "--size", "2", "--draws", "2", "--threads", "1"]
    both = "mine.py:all_hidden,elbo:num_mc=1"
    assert main(["variance", "mini", *task, "--estimators", both, "--json", "v.json"]) == 0
    names = [one["name"] for one in json.loads((own / "v.json").read_text())["estimators"]]
    assert names == both.split(",")
    assert main(["variance", "mini", *task, "--estimators", "mine.py:nothing:a=1"]) == 2
    assert "--estimators mine.py:nothing:a=1: " in capsys.readouterr().err
    assert main(["train", "run", "train.steps=2", "--resume", "--quiet"]) == 0
    assert len((own / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("section", "name"), PARTS.items())
def test_each_alone_by_a_module_of_the_current_folder(own: Path, section: str, name: str) -> None:
    module = f"mine_{section}"
    shutil.copy(SOURCE, own / f"{module}.py")
    recipe = load_recipe("sudoku-mini", [f"{section}.name={module}:{name}"])
    spec = getattr(recipe, section)
    assert (spec.name if section == "optimizer" else spec["name"]) == f"{module}:{name}"
    with pytest.raises(ValueError, match="has no such setting; "):
        load_recipe("sudoku-mini", [f"{section}.name={module}:{name}", f"{section}.strenth=1"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("estimator.name=mine.py:squared_ratio", "made PolicyLoss, expected Estimator"),
        ("loss.name=mine.py:all_hidden", "made Estimator, expected PolicyLoss"),
        ("advantage.name=mine.py:from_both_ends", "made Rule, expected a function"),
        ("decode.select=mine.py:all_hidden", "made Estimator, expected Rule"),
        ("optimizer.name=mine.py:all_hidden", "optimizer.lr|wrong type|takes"),
        ("loss.name=mine.py:absent", "mine.py has no 'absent'"),
        ("decode.select=gone.py:rule", "decode.select.name: there is no file"),
    ],
)
def test_what_makes_no_such_part_is_one_line(own: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        load_recipe("sudoku-mini", [override])
    assert "\n" not in str(error.value)


def test_they_keep_the_contracts() -> None:
    check_estimator(tests.own_parts.all_hidden)
    check_loss(tests.own_parts.squared_ratio)
    check_loss(tests.own_parts.squared_ratio, strength=2.0)
