"""Shipped recipes (shell): files by name, and large runs composed of three parts.

``llada-8b-gsm8k-stp`` is ``parts/model/llada-8b.yaml``, ``parts/method/stp.yaml`` and ``parts/task/gsm8k.yaml`` merged in this
order, so every model meets every task and method; a task may hold settings for some methods (``methods:``).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml

from .tasks.base import nearest

RECIPES = Path(__file__).parent / "recipes"
PARTS = RECIPES / "parts"


def recipe_names() -> list[str]:
    """Names of the shipped recipe files."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def part_names(kind: str) -> list[str]:
    """Models, tasks or methods that large runs are composed of."""
    return sorted(p.stem for p in (PARTS / kind).glob("*.yaml"))


def composed_names() -> list[str]:
    """Names of the large runs: MODEL-TASK-METHOD."""
    return ["-".join(names) for names in itertools.product(*map(part_names, ("model", "task", "method")))]


def is_method(name: str) -> bool:
    """Whether a shipped recipe is a published method's preset: those are named in one word, task recipes with hyphens."""
    return "-" not in name and not is_diffpo(name)


def is_diffpo(name: str) -> bool:
    """Whether a shipped recipe trains DiFFPO's policy, its sampler, or both."""
    return "diffpo" in name


def headline(path: Path) -> str:
    """The first line of a recipe or a part: what it is."""
    return path.read_text().split("\n", 1)[0].lstrip("# ")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """A shipped recipe, a composed one, or a YAML file, as a mapping with its name in it. ValueError if there is none."""
    if name_or_path in composed_names():
        return {**_compose(name_or_path), "name": name_or_path}
    shipped = RECIPES / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        known = [*recipe_names(), *composed_names()]
        raise ValueError(f"no recipe {name_or_path!r}: neither a file nor a shipped recipe; {nearest(name_or_path, known)}")
    data = _read(path)
    data.setdefault("name", path.stem)
    return data


def _compose(name: str) -> dict[str, Any]:
    model = next(m for m in part_names("model") if name.startswith(f"{m}-"))
    task, _, method = name.removeprefix(f"{model}-").partition("-")
    given = _read(PARTS / "task" / f"{task}.yaml")
    own = given.pop("methods", {}).get(method, {})
    result: dict[str, Any] = {}
    for part in (_read(PARTS / "model" / f"{model}.yaml"), _read(PARTS / "method" / f"{method}.yaml"), given, own):
        result = _merged(result, part)
    return result


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merged(below.get(key), value) for key, value in above.items()}
    return above


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}; expected a mapping with sections such as task: and train:")
    return data
