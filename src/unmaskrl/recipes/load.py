"""Recipes: YAML plus ``section.key=value`` overrides -> one validated, frozen config.

A component is ``{name: ..., **kwargs}``; the keyword arguments of its factory are its schema.
Unknown keys fail and name the nearest known one.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from ..utils.text import nearest
from .checks import check_recipe, check_supervised
from .files import read_recipe
from .registry import COMPONENTS, Method
from .schema import OptimizerConfig, Recipe, Section, SFTRecipe

# Settings by the names that they had before: a section that has moved, then single settings.
MOVED = {
    "threshold": "sampler",
    "prior.hide_in_views": "estimator.hide_anchors",
    **{
        f"train.{key}": f"optimizer.{key}"
        for key in ("lr", "warmup", "schedule", "betas", "weight_decay", "max_grad_norm")
    },
    **{
        f"train.{key}": f"run.{key}"
        for key in (
            *("out", "seed", "threads", "save", "save_every", "save_minutes", "keep_checkpoints"),
            *("log_with", "log_every", "probe", "variance_draws"),
        )
    },
}
_DEFAULTS = {"optimizer": "adamw"}  # names that a recipe need not give
# how other trainers call a setting
_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "num_generations": "train.group_size",
    "max_steps": "train.steps",
    "warmup_steps": "optimizer.warmup",
    "save_steps": "run.save_every",
    "output_dir": "run.out",
    "report_to": "run.log_with",
    "lr_scheduler_type": "optimizer.schedule",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "max_completion_length": "decode.gen_length",
    "model_name_or_path": "model.path",
}


def load_recipe(
    name_or_path: str, overrides: Iterable[str] = (), kind: type[Section] = Recipe
) -> Any:
    """A shipped recipe by name or a YAML file, with overrides applied and everything checked."""
    return build_recipe(_read(name_or_path, overrides), kind)


def load_method(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[Recipe, Method]:
    """``load_recipe`` of an RL recipe, with the method that its checks have built."""
    recipe = _validated(_read(name_or_path, overrides), Recipe)
    return recipe, check_recipe(recipe)


def build_recipe(data: dict[str, Any], kind: type[Section] = Recipe) -> Any:
    """A checked config from a plain mapping."""
    recipe = _validated(data, kind)
    if isinstance(recipe, Recipe):
        check_recipe(recipe)
    elif isinstance(recipe, SFTRecipe):
        check_supervised(recipe)
    return recipe


def _read(name_or_path: str, overrides: Iterable[str]) -> dict[str, Any]:
    data = read_recipe(name_or_path)
    for override in overrides:
        _apply_override(data, override)
    return data


def _validated(data: dict[str, Any], kind: type[Section]) -> Any:
    """A config of the right keys and types; whether they fit together is not looked at."""
    _refuse_moved(data)
    _refuse_other_kind(data, kind)
    _check_keys(data, kind, "")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise ValueError(f"{where}: {first['msg'].lower()}, got {first['input']!r}") from None


def _refuse_other_kind(data: Mapping[str, Any], kind: type[Section]) -> None:
    """ValueError for a supervised recipe where one of RL is wanted, and the other way round."""
    if kind is Recipe and "data" in data and "task" not in data:
        raise ValueError("this is a supervised recipe (it has data:); run it by unmaskrl sft")
    if kind is SFTRecipe and "task" in data and "data" not in data:
        raise ValueError("this is a recipe of RL (it has task:); run it by unmaskrl train")


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
    value = _value(text, override)
    *path, last = key.split(".")
    for length in (1, 2):
        old = ".".join(key.split(".")[:length])
        if old in MOVED:
            raise ValueError(_moved(old, key.removeprefix(old)))
    node = _section_at(data, path, override)
    if isinstance(node, list):
        node[_list_index(last, node, override)] = value
        return
    if last == "name" and path and node.get("name", _DEFAULTS.get(path[-1])) != value:
        _forget_settings(node, path[-1])
    node[last] = value


def _value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"override {override[:80]!r}: the value is not valid YAML") from None
    return _number(value) if isinstance(value, str) else value


def _section_at(data: dict[str, Any], path: list[str], override: str) -> Any:
    """The mapping or list at ``path``; sections that are absent or off are made."""
    node: Any = data
    for part in path:
        if isinstance(node, list):
            node = node[_list_index(part, node, override)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {part} is not a section")
    return node


def _forget_settings(node: dict[str, Any], section: str) -> None:
    """The settings of another component are not this one's."""
    if section in COMPONENTS:
        node.clear()
    elif section == "optimizer":  # the rate and its schedule are any optimiser's
        for key in node.keys() - OptimizerConfig.model_fields.keys():
            del node[key]


def _refuse_moved(data: dict[str, Any]) -> None:
    """ValueError for the first setting that stands where it stood in older versions."""
    for old in MOVED:
        section, _, key = old.partition(".")
        values = data.get(section)
        if section in data and (not key or (isinstance(values, dict) and key in values)):
            raise ValueError(_moved(old))
    decode = data.get("decode")
    if isinstance(decode, dict) and decode.get("select") == "threshold":
        raise ValueError("decode.select: the rule threshold is now confidence_threshold")


def _moved(old: str, below: str = "") -> str:
    return f"{old}{below} is now {MOVED[old]}{below}"


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
        if key not in fields and section.model_config.get("extra") == "allow":
            misspelt = difflib.get_close_matches(str(key), list(fields), 1, 0.8)
            if not misspelt and not _ELSEWHERE.get(key, "").startswith(where):
                continue  # a keyword argument of the factory, which is asked for it
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
