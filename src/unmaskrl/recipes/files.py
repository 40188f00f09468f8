"""Shipped recipes: files by name, and runs composed of parts.

Large ones: ``llada-8b-gsm8k-stp`` is ``parts/method/stp.yaml``, ``parts/model/llada-8b.yaml`` and
``parts/task/gsm8k.yaml`` merged in this order, so every model meets every task and method; a task
may hold settings for some methods (``methods:``). The part of a block-causal model says its
``decode.block_length``, and meets the methods that hold ``blocks:``, what changes there, or are
``blocks_only``.

Small ones: ``sudoku-mini-stp`` is ``parts/small/method/stp.yaml`` and
``parts/small/common/sudoku-mini.yaml``, whose ``methods:`` names the methods that it is composed
with, and the settings of each. A method without a file of its own (``diffpo-mf``) says there what
it is (``about:``).
"""

from __future__ import annotations

import difflib
import functools
import itertools
from pathlib import Path
from typing import Any

import yaml

from .schema import Recipe

RECIPES = Path(__file__).parent
PARTS = RECIPES / "parts"
SMALL = "small/common"
SMALL_METHOD = "small/method"
_OF_PARTS = ("methods", "about", "blocks", "blocks_only")  # what parts say of themselves


def recipe_names() -> list[str]:
    """Names of the shipped recipes but the large ones: files, and those composed of small parts."""
    return sorted([*(p.stem for p in RECIPES.glob("*.yaml")), *_small_names()])


@functools.cache
def _small_names() -> dict[str, tuple[str, str]]:
    """Names of the small composed recipes: the part that they share, and the method."""
    return {
        f"{common}-{method}": (common, method)
        for common in part_names(SMALL)
        for method in read_mapping(part_path(SMALL, common))["methods"]
    }


def part_names(kind: str) -> list[str]:
    """Models, tasks or methods that large runs are composed of."""
    return sorted(p.stem for p in (PARTS / kind).glob("*.yaml"))


def part_path(kind: str, name: str) -> Path:
    """The file of a part."""
    return PARTS / kind / f"{name}.yaml"


@functools.cache
def composed_names() -> list[str]:
    """Names of the large runs: MODEL-TASK-METHOD."""
    models, methods = (
        {name: read_mapping(part_path(kind, name)) for name in part_names(kind)}
        for kind in ("model", "method")
    )
    return [
        f"{model}-{task}-{method}"
        for model, task, method in itertools.product(models, part_names("task"), methods)
        if _meet(models[model], methods[method])
    ]


def _meet(model: dict[str, Any], method: dict[str, Any]) -> bool:
    """Whether a method is for this model: full attention, or block-causal."""
    if _is_block_causal(model):
        return "blocks" in method or "blocks_only" in method
    return "blocks_only" not in method


def _is_block_causal(model: dict[str, Any]) -> bool:
    return "decode" in model


def is_method(name: str) -> bool:
    """Whether a shipped recipe is a published method's preset: those are named in one word, task
    recipes with hyphens.
    """
    return "-" not in name and not is_diffpo(name)


def is_diffpo(name: str) -> bool:
    """Whether a shipped recipe trains DiFFPO's policy, its sampler, or both."""
    return "diffpo" in name


def headline(path: Path) -> str:
    """The first line of a recipe or a part: what it is."""
    return path.read_text().split("\n", 1)[0].lstrip("# ")


def about(name: str) -> str:
    """What a recipe of ``recipe_names`` is, in a line."""
    if name not in _small_names():
        return headline(RECIPES / f"{name}.yaml")
    common, method = _small_names()[name]
    own = _own_settings(read_mapping(part_path(SMALL, common)), method)
    return f"{headline(part_path(SMALL, common))}, " + (
        own["about"] if "about" in own else headline(part_path(SMALL_METHOD, method))
    )


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """A shipped recipe, a composed one, a YAML file, or that of a run folder, as a mapping with its
    name in it.

    ValueError if there is none.
    """
    if name_or_path in _small_names() or name_or_path in composed_names():
        return {**_compose(name_or_path), "name": name_or_path}
    shipped = RECIPES / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if path.is_dir() and (stored := _stored_recipe(path)):
        return stored
    if not path.is_file():
        raise ValueError(_not_found(name_or_path))
    data = read_mapping(path)
    data.setdefault("name", path.stem)
    return data


def recipe_text(name: str) -> str:
    """A shipped recipe as its file stands; a composed one as the sum of its parts.

    ValueError with the nearest names if there is none.
    """
    if (path := RECIPES / f"{name}.yaml").is_file():
        return path.read_text(encoding="utf-8")
    if name in _small_names():
        what = about(name)
    elif name in composed_names():
        what = f"{name}: model, method and task of that name, merged"
    else:
        raise ValueError(_not_found(name))
    body = yaml.safe_dump(_compose(name), sort_keys=False, default_flow_style=None, width=96)
    return f"# {what}\n{body}"


def _stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a run, with the place where the run is now; None if the folder holds none."""
    path = folder / "config.yaml"
    data = read_mapping(path) if path.is_file() else {}
    if not isinstance(data.get("train"), dict):
        return None
    run = data.setdefault("run", {})
    run["out"] = str(folder).replace("{", "{{").replace("}", "}}")
    return data


def _not_found(wanted: str) -> str:
    """A path names a file; a word is most likely a recipe's name, mistyped."""
    if wanted.endswith((".yaml", ".yml")) or "/" in wanted:
        return f"recipe file {wanted} not found"
    close = difflib.get_close_matches(wanted, [*recipe_names(), *composed_names()], 3, 0.0)
    return (
        f"no recipe {wanted!r}; the nearest are {', '.join(close)}; all of them: unmaskrl recipes"
    )


def _compose(name: str) -> dict[str, Any]:
    if name in _small_names():
        task, method = _small_names()[name]
        task_kind = SMALL
        below = [(SMALL_METHOD, method)] if method in part_names(SMALL_METHOD) else []
    else:
        model = next(m for m in part_names("model") if name.startswith(f"{m}-"))
        task, _, method = name.removeprefix(f"{model}-").partition("-")
        task_kind = "task"
        below = [("method", method), ("model", model)]
    given = read_mapping(part_path(task_kind, task))
    own = _own_settings(given, method)
    parts = [read_mapping(part_path(*part)) for part in below]
    if task_kind == "task" and _is_block_causal(parts[1]):
        parts.insert(1, parts[0].get("blocks", {}))
    result = functools.reduce(_merged, [*parts, given, own], {})
    ordered = [key for key in (*Recipe.model_fields, *result) if key in result]
    return {key: result[key] for key in ordered if key not in _OF_PARTS}


def _own_settings(task: dict[str, Any], method: str) -> dict[str, Any]:
    """What a task says for one method."""
    return task.get("methods", {}).get(method) or {}


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merged(below.get(key), value) for key, value in above.items()}
    return above


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds a mapping; ValueError in one line if it does not."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid YAML: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds {type(data).__name__}; expected a mapping with sections such as task: "
            "and train:"
        )
    return data
