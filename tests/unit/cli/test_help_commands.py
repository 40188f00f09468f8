"""settings, doctor and recipes: what they show is what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmaskrl.cli.main import main
from unmaskrl.cli.show.doctor import OPTIONAL, accelerators, facts
from unmaskrl.recipes.files import RECIPES, composed_names
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.reference import components, find, settings
from unmaskrl.recipes.registry import COMPONENTS
from unmaskrl.recipes.schema import Recipe


def test_every_setting_of_a_recipe_is_in_the_table() -> None:
    recipe = load_recipe("sudoku-mini").model_dump(mode="json")
    names = {one.name for one in settings()}
    for section, value in recipe.items():
        keys = value if isinstance(value, dict) and "name" not in value else {}
        for key in keys:
            name = f"{section}.{key}"
            assert name in names or any(n.startswith(f"{name}.") for n in names), name


def test_defaults_are_those_of_the_schema() -> None:
    by_name = {one.name: one.default for one in settings()}
    fields = Recipe.model_fields
    assert by_name["decode.steps"] == str(fields["decode"].annotation.model_fields["steps"].default)
    assert by_name["decode.exit_at"] == "null"
    assert by_name["prior.adapt_share"] == "false"


def test_find_a_section_a_setting_and_a_last_word() -> None:
    assert {one.section for one in find("decode")} == {"decode"}
    assert [one.name for one in find("decode.steps")] == ["decode.steps"]
    assert "decode.exit_at" in [one.name for one in find("exit_at")]
    with pytest.raises(ValueError, match="did you mean 'decode'"):
        find("decod")


@pytest.mark.parametrize("section", COMPONENTS)
def test_components_are_shown_with_what_they_are(
    section: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["settings", section]) == 0
    shown = capsys.readouterr().out
    for name, (meaning, keys) in components(section).items():
        assert meaning, f"{section}.{name} has no docstring"
        assert f"{section}.name={name}: " in shown
        for key in keys:
            assert f"{key.name} = {key.default}" in shown


def test_doctor_says_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in OPTIONAL)
    assert all(value for _, value in facts())


def test_doctor_names_the_extra_of_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setitem(OPTIONAL, "no_such_package", ("nothing", "a test"))
    assert main(["doctor"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "no_such_package" in x)
    assert "pip install 'unmaskrl[nothing]'" in line


def test_doctor_says_that_apples_device_is_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert accelerators() == [("gpu", "Apple (mps), untried: --device mps for eval and sample")]


@pytest.mark.parametrize("name", ["sudoku-mini", "countdown-zero-stp", "llada-8b-gsm8k-stp"])
def test_a_copied_recipe_is_the_recipe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["recipes", name, "--copy", str(path)]) == 0
    assert f"unmaskrl check {path}" in capsys.readouterr().out
    assert load_recipe(str(path)).model_copy(update={"name": name}) == load_recipe(name)
    assert main(["recipes", name, "--copy", str(path)]) == 2
    assert "exists; name a new file" in capsys.readouterr().err


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "sudoku-mini"]) == 0
    assert capsys.readouterr().out == (RECIPES / "sudoku-mini.yaml").read_text()


def test_a_mistyped_recipe_gets_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "sudoku-mimi"]) == 2
    err = capsys.readouterr().err
    assert "sudoku-mini" in err and err.count("\n") == 1
    assert len(composed_names()) > 30 and len(err) < 300  # near ones, not all
