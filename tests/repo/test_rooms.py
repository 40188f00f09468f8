"""The rooms of the package: which may import which, how many files each has, and what an import
costs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import unmaskrl

SOURCE = Path(__file__).parents[2] / "src" / "unmaskrl"
STDLIB = set(sys.stdlib_module_names)
# The table of walls: a room imports itself and these, nothing above it.
BELOW: dict[str, set[str]] = {
    "core": set(),
    "utils": set(),
    "tasks": {"utils"},
    "models": {"core", "utils"},
    "recipes": {"core", "models", "tasks", "utils"},
    "testing": {"core", "models", "tasks", "utils"},
    "evaluation": {"core", "models", "tasks", "utils", "recipes"},
    "reporting": {"core", "evaluation", "utils"},
    "training": {"core", "models", "tasks", "utils", "recipes", "evaluation", "reporting"},
    "cli": {"core", "models", "tasks", "utils", "recipes", "evaluation", "reporting", "training"},
    "__main__": {"cli"},
}
LARGEST_ROOM = 15
HEAVY = {
    "accelerate",
    "peft",
    "datasets",
    "yaml",
    "matplotlib",
    "rich",
    "pydantic",
    "tokenizers",
    "transformers",
}
# Optional packages of tasks, and the one file that may import each, inside a function.
TASK_EXTRAS = {"sources.py": {"datasets"}}
# Public names whose rooms read recipes or draw: they need what training needs.
NEEDS_EXTRAS = {"EvalResult", "evaluate", "rollout_html", "train"}
# What the files of utils/ may import besides the standard library.
UTILS_EXTRAS = {"torch_setup.py": {"torch"}, "files.py": {"safetensors"}, "terminal.py": {"rich"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(node: ast.AST, module: str) -> set[str]:
    """What an import statement of ``module`` names: our modules in full, others by their first
    part.
    """
    if isinstance(node, ast.Import):
        return {a.name if a.name in FILES else a.name.split(".")[0] for a in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        package = module.split(".")
        if FILES[module].name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *filter(None, [node.module])])
    elif base.split(".")[0] != "unmaskrl":
        return {base.split(".")[0]}
    return {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}


def imports(module: str, *, top_only: bool = False) -> set[str]:
    tree = ast.parse(FILES[module].read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    return {name for node in nodes for name in imported(node, module)} - {module}


ARROWS = {module: {name for name in imports(module) if name in FILES} for module in FILES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_file_stands_in_a_room() -> None:
    assert {room(module) for module in FILES} == {"", *BELOW}


@pytest.mark.parametrize("name", BELOW)
def test_no_import_runs_upwards(name: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in ARROWS.items()
        for target in sorted(targets)
        if room(module) == name and room(target) not in {"", name, *BELOW[name]}
    ]
    assert not wrong, f"{name} may import {sorted(BELOW[name]) or 'no other room'}"


def test_no_import_runs_in_a_circle() -> None:
    """Imports inside functions and for types count as well; the package's own __init__ loads
    nothing by itself.
    """
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done:
            return
        for target in sorted(ARROWS[module] - {"unmaskrl"}):
            visit(target, (*above, module))
        done.add(module)

    for module in sorted(set(FILES) - {"unmaskrl"}):
        visit(module, ())


def test_a_room_can_be_looked_over() -> None:
    counts = Counter(path.parent for path in FILES.values() if not path.name.startswith("__"))
    large = {
        str(folder.relative_to(SOURCE)): count
        for folder, count in counts.items()
        if count > LARGEST_ROOM
    }
    assert not large, f"more than {LARGEST_ROOM} files: give some of them a room of their own"


@pytest.mark.parametrize("module", [m for m in FILES if room(m) in ("core", "tasks", "utils")])
def test_what_the_lower_rooms_are_made_of(module: str) -> None:
    path = FILES[module]
    used = {name for name in imports(module) if name.split(".")[0] != "unmaskrl"} - STDLIB
    if room(module) == "tasks":
        top = {
            name for name in imports(module, top_only=True) if name.split(".")[0] != "unmaskrl"
        } - STDLIB
        assert not top, f"tasks/ imports the standard library only, {path.name} imports {top}"
        assert used <= TASK_EXTRAS.get(path.name, set()), (
            f"{path.name} imports {used} inside a function"
        )
    elif room(module) == "core":
        assert used <= {"torch", "jaxtyping"}, f"the core may not import {used}"
    else:
        assert used <= UTILS_EXTRAS.get(path.name, set()), f"{path.name} imports {used}"


def loaded(code: str) -> set[str]:
    """Packages that are loaded after ``code``."""
    code += "; import sys; print(','.join({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.strip().split(","))


@pytest.mark.parametrize("name", ["core", "models"])
def test_core_and_models_load_nothing_of_the_rooms_above(name: str) -> None:
    assert not HEAVY & loaded(f"import {', '.join(m for m in FILES if room(m) == name)}")


def test_the_public_names_are_loaded_when_they_are_asked_for() -> None:
    assert not {"torch", *HEAVY} & loaded("import unmaskrl")
    light = sorted(unmaskrl._HOMES.keys() - NEEDS_EXTRAS)
    assert not HEAVY & loaded(f"import unmaskrl; [getattr(unmaskrl, name) for name in {light}]")


def test_tasks_load_no_torch() -> None:
    assert not {"torch", "numpy", *HEAVY} & loaded("import unmaskrl.tasks")


def test_type_checkers_see_the_public_names() -> None:
    """The names under TYPE_CHECKING are those of the table, from the same places."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname] = ".".join(filter(None, [node.module, alias.name]))
    assert seen == {name: home.replace(":", ".") for name, home in unmaskrl._HOMES.items()}
