"""Rules of the house that a machine can check: walls between rooms, sizes, the public surface, every recipe."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unmaskrl
from unmaskrl.config import ASSETS, Recipe, SFTRecipe, load_recipe
from unmaskrl.recipe_files import RECIPES, recipe_names

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "unmaskrl"
STDLIB = set(sys.stdlib_module_names)
CORE = "types denoiser priors rng scoring advantages losses importance thresholds variance toy probe finite".split()
SHELL_ONLY = {"accelerate", "peft", "datasets", "yaml", "matplotlib", "rich", "pydantic", "tokenizers", "transformers"}
# Optional extras, and the one file that may import each, inside a function.
TASK_EXTRAS = {"sources.py": {"datasets"}}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, and ours by their first part (unmaskrl.x as 'unmaskrl')."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module.split(".")[0]}
    return set()


def room(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_walls(path: Path) -> None:
    used = imports(path) - STDLIB - {"unmaskrl"}
    if room(path) == "tasks":
        top = {name for node in ast.parse(path.read_text()).body for name in imported(node)} - STDLIB - {"unmaskrl"}
        assert not top, f"tasks/ imports the standard library only, {path.name} imports {top}"
        assert used <= TASK_EXTRAS.get(path.name, set()), f"{path.name} imports {used} inside a function"
    elif room(path) in ("decoding", "estimators", "models", *CORE):
        # the denoiser and the model families read and write checkpoints
        extra = {"safetensors"} if room(path) in ("denoiser", "models", "thresholds") else set()
        assert used <= {"torch", "jaxtyping"} | extra, f"the core may not import {used}"


def test_core_does_not_import_the_shell() -> None:
    """One after another in one process: the first module after which a package is there has brought it in."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'unmaskrl.{name}')\n    "
    code += "print(name, *sorted({m.split('.')[0] for m in sys.modules}))"
    rooms = [*CORE, "decoding", "estimators", "models", "tasks"]
    done = subprocess.run([sys.executable, "-c", code, *rooms], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == rooms
    for name, *loaded in lines:
        assert not SHELL_ONLY & set(loaded), f"unmaskrl.{name} imports {SHELL_ONLY & set(loaded)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, "a file has at most 500 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 75, f"{node.name} has {length} lines (signature and docstring included); split it"


def test_trainer_stays_small() -> None:
    assert (SOURCE / "train.py").read_text().count("\n") <= 300


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
                assert not any(call == b or (b.startswith("torch") and call == b) for b in banned), f"{path.name}: {call}"
        assert "import pickle" not in path.read_text()


def test_public_surface() -> None:
    # (the shape-checking import hook of the tests leaves jaxtyping behind)
    names = sorted(n for n in vars(unmaskrl) if not n.startswith("_") and n != "jaxtyping")
    modules = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert [n for n in names if n not in modules - {"tasks", "estimators", "losses"}] == PUBLIC


PUBLIC = sorted(
    "Canvas Denoiser Estimator LossOutputs Rollout TrainBatch Views anchored_canvas backward_in_chunks blank_canvas "
    "choose_anchors decode estimators group_mean group_mean_std load_denoiser losses planned_calls save_model tasks "
    "token_logps view_logps".split()
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    kind = SFTRecipe if "\ndata:" in path.read_text() else Recipe
    recipe = load_recipe(name, [], kind)
    assert recipe.name == name
    assert path.read_text().startswith("# "), "the first line says what the recipe is"
    assert path.read_text().count("\n") <= 40
    if isinstance(recipe, Recipe):
        assert (ASSETS / recipe.model.path / "model.safetensors").is_file()


def test_assets_fit_the_repository() -> None:
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 10 * 2**20
