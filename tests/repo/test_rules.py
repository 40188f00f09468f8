"""Rules of the house that a machine can check: sizes, the public surface, every recipe. Walls:
test_rooms.py.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import unmaskrl
from unmaskrl.models.hub import ASSETS
from unmaskrl.recipes.checks import check_blocks
from unmaskrl.recipes.files import about, read_recipe, recipe_names, recipe_text
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.registry import build_method
from unmaskrl.recipes.schema import Recipe, SFTRecipe

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "unmaskrl"
FILES = sorted(SOURCE.rglob("*.py"))
SOURCES = [
    path
    for folder in ("src", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LONGEST = 60  # lines of a function


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, "a file has at most 500 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST, f"{node.name} has {length} lines; split it"


def packed(node: ast.AST) -> bool:
    """``a, b = x, y`` where neither value needs the other name: two statements in one line."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            pass
        case _:
            return False
    places = (ast.Name, ast.Attribute, ast.Subscript)
    used = {ast.unparse(n) for v in values for n in ast.walk(v) if isinstance(n, places)}
    return used.isdisjoint(map(ast.unparse, names))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_one_assignment_a_line(path: Path) -> None:
    found = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if packed(n)]
    assert not found, f"lines {found} assign unrelated values to several names at once"


def test_packed_assignments_are_told_from_swaps() -> None:
    def first(text: str) -> ast.AST:
        return ast.parse(text).body[0]

    assert packed(first("a, b = x, y"))
    assert packed(first("low, high = 0, n")) and packed(first("self.a, b[0] = 1, f(x)"))
    for related in ("a, b = b, a", "a, b = b, a + b", "a, b = f(x)", "a[0], b = b, a[0]"):
        assert not packed(first(related)), related


def test_trainer_stays_small() -> None:
    assert (SOURCE / "training" / "loop.py").read_text().count("\n") <= 420


def test_no_forbidden_calls() -> None:
    banned = (
        "torch.manual_seed(",
        "random.seed(",
        "set_seed(",
        "torch.load(",
        "pickle",
        "trust_remote_code=True",
        "eval(",
        "exec(",
    )
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func) + "("
                assert not any(
                    call == b or (b.startswith("torch") and call == b) for b in banned
                ), f"{path.name}: {call}"
        assert "import pickle" not in path.read_text()


# Notes that a reader of the repository cannot open: a source is a paper, or a page of docs/.
NOTES = "diffpo faults feasibility families field gpu house maths peers performance sparse stp"
NOTES = f"{NOTES} style traps trouble users".split()
PRIVATE = re.compile(rf"\(shell\)|(?<!docs/)\b({'|'.join(NOTES)})\.md\b|\breference/\w+\.md\b")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_reference_to_private_notes(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if PRIVATE.search(line)]
    assert not found, "name the paper (arXiv id, section), or a page of docs/"


def test_private_notes_are_told_from_pages() -> None:
    for private in ("as built (shell)", "(stp.md 3.5)", "see peers.md", "reference/other.md 2"):
        assert PRIVATE.search(private), private
    for public in ("docs/diffpo.md", "a shell", "docs/theory.md, section 3", "shell (bash)"):
        assert not PRIVATE.search(public), public


PUBLIC = sorted(
    "BlockCausal Canvas DecodeSettings Denoiser Estimator EvalResult Family Grade LocalRollouts "
    "LossOutputs MaskPredictor Model Rollout Rollouts Task TrainBatch Views anchored_canvas "
    "backward_in_chunks blank_canvas choose_anchors decode estimators evaluate group_mean "
    "group_mean_std load load_denoiser losses planned_calls rollout_html save_model tasks "
    "testing token_logps train view_logps".split()
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name: str) -> None:
    kind = SFTRecipe if "data" in read_recipe(name) else Recipe
    recipe = load_recipe(name, [], kind)
    assert recipe.name == name
    assert " " in about(name) and about(name).endswith("."), "a sentence says what it is"
    assert recipe_text(name).startswith("# ") and recipe_text(name).count("\n") <= 40
    if isinstance(recipe, Recipe):
        folder = ASSETS / recipe.model.path
        assert (folder / "model.safetensors").is_file()
        grid = json.loads((folder / "config.json").read_text()).get("block_size")
        check_blocks(recipe, build_method(recipe), grid)


def test_assets_fit_the_repository() -> None:
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 10 * 2**20


def test_public_surface() -> None:
    assert sorted(unmaskrl._HOMES) == PUBLIC
    assert all(hasattr(unmaskrl, name) for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(unmaskrl))
