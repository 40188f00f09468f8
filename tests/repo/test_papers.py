"""docs/papers.md: every preset is named with its paper, its cost is what is counted, no recipe is
undocumented.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unmaskrl.recipes.cost import step_cost
from unmaskrl.recipes.files import about, is_diffpo, is_method, recipe_names
from unmaskrl.recipes.load import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
PAPERS = (DOCS / "papers.md").read_text()
RECIPES = (DOCS / "recipes.md").read_text()
METHODS = [name for name in recipe_names() if is_method(name)]


def test_the_published_methods_are_there() -> None:
    wanted = (
        "diffu_grpo unigrpo elbo_grpo elbo_grpo_seq spg_mix spg_eubo rloo wd1 coupled_grpo "
        "espo gdpo d2_stepmerge tracerl"
    )
    assert set(METHODS) == {*wanted.split(), "justgrpo", "bgpo", "stp", "igpo"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_documented(name: str) -> None:
    if is_method(name):
        sections = re.findall(r"^\*\*(`.*?)\*\*", PAPERS, re.M)
        assert f"`{name}`" in ", ".join(sections).split(", ")
    elif is_diffpo(name):
        assert f"`{name}`" in (DOCS / "diffpo.md").read_text()
    else:
        task, _, variant = name.partition("-mini") if "-mini" in name else name.partition("-zero")
        assert f"`{name}`" in RECIPES or (task and f"`...{variant}`" in RECIPES)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_line_names_a_paper_of_the_page(name: str) -> None:
    numbers = re.findall(r"\b\d{4}\.\d{5}\b", about(name))
    assert numbers and all(f"arxiv.org/abs/{number}" in PAPERS for number in numbers)


@pytest.mark.parametrize("name", METHODS)
def test_the_cost_table_is_what_is_counted(name: str) -> None:
    cost = step_cost(load_recipe(name))
    cells = [
        cost.rollout,
        cost.old,
        cost.ref,
        cost.new,
        cost.num_iterations,
        f"{cost.per_update(cost.forwards):.6g}",
    ]
    assert f"| `{name}` | {' | '.join(map(str, cells))} |" in PAPERS


@pytest.mark.parametrize("name", METHODS)
def test_the_page_states_the_settings(name: str) -> None:
    """Clip, KL weight and inner updates of the recipe stand in its row of the two tables."""
    recipe = load_recipe(name)
    row = next(
        line for line in PAPERS.splitlines() if line.startswith("| ") and f"`{name}`" in line
    )
    # those refer to the row above
    if "clip_low" in recipe.loss and name not in ("stp", "elbo_grpo_seq"):
        assert f"clip {recipe.loss['clip_low']}" in row
        assert str(recipe.loss["kl_coef"]) in row or "no KL" in row or name == "bgpo"
    values = [
        line for line in PAPERS.splitlines() if line.startswith("| `") and f"`{name}`" in line
    ]
    assert len(values) == 2
