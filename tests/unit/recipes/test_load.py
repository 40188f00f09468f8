"""Recipes from files and overrides: settings by their old names are refused with the new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmaskrl.recipes.load import MOVED, build_recipe, load_recipe
from unmaskrl.recipes.schema import Recipe, SFTRecipe
from unmaskrl.training.folder.config import read_config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=1e-5", "train.lr is now optimizer.lr"),
        ("train.out=here", "train.out is now run.out"),
        ("prior.hide_in_views=true", "prior.hide_in_views is now estimator.hide_anchors"),
        ("threshold.mode=joint", "threshold.mode is now sampler.mode"),
        ("decode.select=threshold", "decode.select: the rule threshold is now"),
    ],
)
def test_an_override_by_its_old_name_is_refused_with_the_new(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe("sudoku-mini", [override])


@pytest.mark.parametrize("old", MOVED)
def test_a_file_with_an_old_name_is_refused_with_the_new(old: str) -> None:
    section, _, key = old.partition(".")
    data = {"task": {"name": "sudoku"}, section: {key: 1} if key else {"mode": "joint"}}
    with pytest.raises(ValueError, match=f"^{old} is now {MOVED[old]}$"):
        build_recipe(data)


def test_every_new_name_is_a_setting() -> None:
    """Those that stand in no section's fields are keyword arguments of a shipped factory."""
    of_factories = {"estimator.hide_anchors", "optimizer.betas", "optimizer.weight_decay"}
    for new in set(MOVED.values()) - of_factories - {"sampler"}:
        section, key = new.split(".")
        kinds = [kind.model_fields[section].annotation for kind in (Recipe, SFTRecipe)]
        assert any(key in kind.model_fields for kind in kinds), new
    settings = [
        "estimator.hide_anchors=true",
        "optimizer.betas=[0, 0.5]",
        "optimizer.weight_decay=1",
    ]
    assert load_recipe("sudoku-mini", settings).estimator["hide_anchors"] is True


def test_a_run_of_an_older_version_is_told_what_to_rename(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: {name: sudoku}\ntrain: {steps: 3, seed: 1}\n")
    with pytest.raises(ValueError, match=r"holds no recipe: train\.seed is now run\.seed"):
        read_config(path)


def test_another_optimiser_keeps_the_rate_and_drops_the_settings_of_the_first() -> None:
    words = ["optimizer.betas=[0, 1]", "optimizer.name=torch.optim:SGD", "optimizer.momentum=0.9"]
    optimizer = load_recipe("sudoku-mini", words).optimizer
    assert (optimizer.lr, optimizer.schedule) == (2e-4, "linear")
    assert optimizer.settings == {"momentum": 0.9}
