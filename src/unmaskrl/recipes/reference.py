"""Every setting of a recipe as a table: what ``unmaskrl settings`` and docs/settings.md show."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..utils.text import nearest
from .optimizers import OPTIMIZERS
from .registry import COMPONENTS
from .schema import Component, Recipe, Section, SFTRecipe


@dataclass(frozen=True)
class Setting:
    """One setting: ``name`` is section.key, ``default`` and ``values`` are as YAML has them."""

    name: str
    values: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The part of the name before the last dot; "" for a key of the recipe itself."""
        return self.name.rpartition(".")[0]


def settings(kind: type[Section] = Recipe) -> list[Setting]:
    """The settings of a kind of recipe, section by section, nested sections in their place."""
    return list(_settings(kind, ""))


def sft_settings() -> list[Setting]:
    """Those of supervised recipes that an RL recipe does not have, or has in another sense."""
    shared = set(settings(Recipe))
    return [one for one in settings(SFTRecipe) if one not in shared]


def find(word: str) -> list[Setting]:
    """The settings of a section, or the one of that name.

    Raises ValueError with the nearest name where there is none.
    """
    every = settings(Recipe) + sft_settings()
    found = [s for s in every if word in (s.name, s.section) or s.section.startswith(f"{word}.")]
    if found:
        return found
    last = [s for s in every if s.name.rpartition(".")[2] == word]
    if last:
        return last
    names = [*dict.fromkeys(s.section for s in every if s.section), *(s.name for s in every)]
    raise ValueError(f"no section or setting {word!r}{nearest(word, names)}")


def components(section: str) -> dict[str, tuple[str, list[Setting]]]:
    """The shipped components of a section by name: what each is, and its keyword arguments."""
    table = {**COMPONENTS, "optimizer": OPTIMIZERS}.get(section, {})
    given = ("parameters", "lr")  # of an optimiser: what is trained, and a setting of the section
    result = {}
    for name, factory in table.items():
        known = inspect.signature(factory).parameters.values()
        first = (inspect.getdoc(factory) or "").split("\n\n")[0]
        keys = [
            Setting(f"{section}.{p.name}", _values(p.annotation), _yaml(p.default), "")
            for p in known
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in given
        ]
        result[name] = (" ".join(first.split()), keys)
    return result


def _settings(kind: type[Section], prefix: str) -> Iterator[Setting]:
    for key, field in kind.model_fields.items():
        nested = _nested(field.annotation)
        if nested is None:
            yield Setting(
                f"{prefix}{key}", _values(field.annotation), _default(field), _meaning(field)
            )
            continue
        if field.annotation is not nested:  # optional: null, or a section
            yield Setting(f"{prefix}{key}", "null or a section", _default(field), _meaning(field))
        yield from _settings(nested, f"{prefix}{key}.")


def _nested(annotation: Any) -> type[Section] | None:
    choices = [annotation, *get_args(annotation)]
    if get_origin(annotation) in (list, tuple, dict):
        return None
    found = [c for c in choices if isinstance(c, type) and issubclass(c, Section)]
    return found[0] if found else None


def _meaning(field: FieldInfo) -> str:
    text = field.description or ""
    bounds = {
        name: getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(rule, name, None) is not None
    }
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = ", ".join(f"{signs[name]} {value:g}" for name, value in bounds.items())
    return f"{text} ({limits})" if text and limits else text or limits


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return _yaml(field.default_factory())  # type: ignore[call-arg]
    return _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_yaml(v)}' for k, v in value.items())}}}"
    return str(value)


def _values(annotation: Any) -> str:
    """A type in words: ``number``, ``a | b``, ``list of text``."""
    words = {float: "number", int: "whole number", str: "text", bool: "true, false"}
    if annotation == Component:
        return "{name: ..., settings}"
    if isinstance(annotation, str):  # a signature under postponed annotations
        names = {"float": "number", "int": "whole number", "str": "text", "bool": "true, false"}
        return " or ".join(names.get(part, part) for part in annotation.split(" | ")).replace(
            "None", "null"
        )
    if annotation in words:
        return words[annotation]
    if annotation is type(None):
        return "null"
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_values(a) for a in arguments)
    if origin in (list, tuple):
        return f"list of {_values(arguments[0])}"
    if origin is dict:
        return f"mapping of {_values(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))
