"""Recipes: YAML plus ``section.key=value`` overrides -> one validated, frozen config.

A component is ``{name: ..., **kwargs}``; the keyword arguments of its factory are its schema.
Unknown keys fail and name the nearest known one.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from ..utils.text import nearest
from .checks import check_recipe
from .files import read_recipe
from .registry import COMPONENTS
from .schema import Recipe, Section

# how other trainers call a setting
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_generations": "train.group_size",
    "max_steps": "train.steps",
    "warmup_steps": "train.warmup",
    "save_steps": "train.save_every",
    "output_dir": "train.out",
    "report_to": "train.log_with",
    "lr_scheduler_type": "train.schedule",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "max_completion_length": "decode.gen_length",
    "model_name_or_path": "model.path",
}


def load_recipe(
    name_or_path: str, overrides: Iterable[str] = (), kind: type[Section] = Recipe
) -> Any:
    """A shipped recipe by name or a YAML file, with overrides applied and everything checked."""
    data = read_recipe(name_or_path)
    for override in overrides:
        _apply_override(data, override)
    return build_recipe(data, kind)


def build_recipe(data: dict[str, Any], kind: type[Section] = Recipe) -> Any:
    """A checked config from a plain mapping."""
    _check_keys(data, kind, "")
    try:
        recipe = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise ValueError(f"{where}: {first['msg'].lower()}, got {first['input']!r}") from None
    if isinstance(recipe, Recipe):
        return check_recipe(recipe)
    return recipe


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``section.key=value`` strings as a nested mapping."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply_override(data, override)
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ValueError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"override {override[:80]!r}: the value is not valid YAML") from None
    if isinstance(value, str):
        value = _number(value)
    node: Any = data
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list):
            node = node[_list_index(part, node, override)]
            continue
        if node.get(part) is None:  # absent, or a section that is off
            node[part] = {}
        node = node[part]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {part} is not a section")
    if isinstance(node, list):
        node[_list_index(parts[-1], node, override)] = value
    elif (
        parts[-1] == "name"
        and parts[-2:-1]
        and parts[-2] in COMPONENTS
        and node.get("name") != value
    ):
        node.clear()  # the settings of another component are not this one's
        node["name"] = value
    else:
        node[parts[-1]] = value


def _list_index(part: str, node: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(
            f"override {override!r}: expected an index below {len(node)}, got {part!r}"
        )
    return int(part)


def _number(text: str) -> Any:
    try:
        return float(text)  # YAML 1.1 reads 1e-4 as a string
    except ValueError:
        return text


def _check_keys(data: Any, kind: Any, where: str) -> None:
    """Walk mapping and model together; the first unknown key is refused with the nearest known
    one.
    """
    section = _section_type(kind)
    if section is None or not isinstance(data, dict):
        if isinstance(data, list) and get_args(kind):
            for i, item in enumerate(data):
                _check_keys(item, get_args(kind)[0], f"{where}{i}.")
        return
    fields = section.model_fields
    for key, value in data.items():
        if key not in fields:
            raise ValueError(f"{where}{key}: unknown setting{_suggestion(str(key), where, fields)}")
        _check_keys(value, fields[key].annotation, f"{where}{key}.")


def _suggestion(key: str, where: str, fields: Iterable[str]) -> str:
    """The setting that was meant: one of this section by its name, or one of any section by its
    name elsewhere.
    """
    everywhere = {
        name: section
        for section, field in Recipe.model_fields.items()
        if (kind := _section_type(field.annotation))
        for name in kind.model_fields
    }
    own = list(fields)
    if key in everywhere and key not in own:
        return f"; did you mean '{everywhere[key]}.{key}'?"
    close = difflib.get_close_matches(key, [*own, *_ELSEWHERE], 1, 0.7)
    if close and close[0] in _ELSEWHERE:
        return f"; did you mean '{_ELSEWHERE[close[0]].removeprefix(where)}'?"
    return nearest(key, own)


def _section_type(kind: Any) -> type[Section] | None:
    if get_origin(kind) in (Union, types.UnionType):
        return next((s for a in get_args(kind) if (s := _section_type(a))), None)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
