"""Recipes that are composed of parts, beside those that are files."""

from __future__ import annotations

from typing import Any

import pytest

from unmaskrl.recipes import files
from unmaskrl.recipes.files import RECIPES, about, read_recipe, recipe_names
from unmaskrl.recipes.load import load_recipe


def settings(name: str) -> dict[str, Any]:
    recipe = load_recipe(name).model_dump()
    assert recipe.pop("name") == name
    return recipe


def test_no_name_is_given_twice() -> None:
    names = recipe_names()
    assert len(names) == len(set(names))
    assert {"sudoku-mini", "sudoku-mini-stp", "diffpo-mf", "mini-base", "stp_diffpo"} <= set(names)


def test_a_method_changes_what_it_says_and_nothing_else() -> None:
    base = settings("sudoku-mini-elbo")
    assert settings("sudoku-mini-diffu") == base | {
        "estimator": {"name": "mean_field", "p_mask_prompt": 0.15}
    }
    assert settings("countdown-zero-elbo")["loss"] == base["loss"] | {"name": "sequence_clip"}
    diffpo = settings("diffpo-2mf")
    capped = diffpo | {"loss": diffpo["loss"] | {"is_cap": 2.0}}
    assert settings("diffpo-2mf-is") == capped


@pytest.mark.parametrize(
    ("name", "composed", "section", "change"),
    [
        ("sudoku-mini", "sudoku-mini-stp", "train", {"steps": 30}),
        ("countdown-mini", "countdown-mini-elbo", "decode", {"exit_at": 0.85}),
        ("countdown-zero", "countdown-zero-stp", "train", {}),
    ],
)
def test_the_files_keep_step_with_the_parts(
    name: str, composed: str, section: str, change: dict[str, Any]
) -> None:
    """These three are whole files because the documentation starts from them."""
    assert (RECIPES / f"{name}.yaml").is_file() and not (RECIPES / f"{composed}.yaml").exists()
    expected = settings(composed)
    expected[section] = expected[section] | change
    assert settings(name) == expected


def test_what_a_composed_recipe_is_comes_from_its_parts() -> None:
    assert about("sudoku-mini-elbo") == "Sudoku 4x4, plain ELBO-GRPO: no pruning."
    assert about("diffpo-mf").startswith("DiFFPO (arXiv 2510.02212), ablation: mean field,")
    assert "about" not in read_recipe("diffpo-mf") and "methods" not in read_recipe("diffpo-mf")


def test_every_small_method_is_used() -> None:
    used = {name.rpartition("-")[2] for name in recipe_names()}
    used |= {"-".join(name.rsplit("-", 2)[1:]) for name in recipe_names()}
    assert set(files.part_names(files.SMALL_METHOD)) <= used
