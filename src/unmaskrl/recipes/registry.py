"""From a recipe's ``{name: ..., **kwargs}`` to objects.

A name is one of the shipped table, or ``package.module:factory`` or ``path/to/file.py:factory`` of
the user's own. The keyword arguments of the factory are the component's schema either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..core.advantages import ADVANTAGES, Advantage
from ..core.decoding import RULES, Rule
from ..core.estimators import ESTIMATORS, Estimator
from ..core.losses import LOSSES, PolicyLoss
from ..core.rollouts import DecodeSettings
from ..tasks import TASKS, Task, checked_task, place_of, tell_errors
from ..utils.imports import is_outside, load_object
from ..utils.text import nearest
from .schema import DecodeConfig, Recipe

Factory = Callable[..., Any]
Table = Mapping[str, Factory]

COMPONENTS: dict[str, Table] = {
    "task": TASKS,
    "estimator": ESTIMATORS,
    "advantage": ADVANTAGES,
    "loss": LOSSES,
}


def factory_of(spec: Mapping[str, Any], table: Table, section: str) -> Factory:
    """What builds ``{name: ...}``: a shipped factory by its name, or one from elsewhere."""
    if "name" not in spec:
        raise ValueError(
            f"{section}: expected {{name: ..., settings}}, got {spec!r}; names: {', '.join(table)}"
        )
    name = spec["name"]
    if is_outside(name):
        return load_object(name, f"{section}.name")
    if name not in table:
        raise ValueError(f"{section}.name: unknown {name!r}{nearest(str(name), table)}")
    return table[name]


def component(
    spec: Mapping[str, Any], table: Table, section: str, *given: Any, **fixed: Any
) -> Any:
    """Build ``{name, **kwargs}``: its factory is called with ``given`` first and with ``fixed``,
    which the spec may not set. ValueError, naming the section, for a setting it does not take, and
    for whatever a factory of the user's own raises.
    """
    factory = factory_of(spec, table, section)
    _check_settings(spec, factory, section, len(given), fixed)
    settings = {k: v for k, v in spec.items() if k != "name"}
    try:
        return factory(*given, **settings, **fixed)
    except ValueError as error:
        raise ValueError(f"{section} {spec['name']}: {error}") from None
    except TypeError as error:  # a word where a number belongs
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{section} {spec['name']}: {settings} has a setting of the wrong type ({first})"
        ) from None
    except Exception as error:
        if not is_outside(spec["name"]):
            raise
        raise ValueError(f"{section} {spec['name']}: raised {place_of(error)}") from error


def check_component(
    spec: Mapping[str, Any], table: Table, section: str, num_given: int = 0
) -> None:
    """The name is known and so is every keyword; the factory's first ``num_given`` are no
    settings.
    """
    _check_settings(spec, factory_of(spec, table, section), section, num_given, ())


def _check_settings(
    spec: Mapping[str, Any],
    factory: Factory,
    section: str,
    num_given: int,
    fixed: Iterable[str],
) -> None:
    parameters = list(_parameters(factory, section).values())[num_given:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in fixed]
    for key in spec:
        if key != "name" and key not in known:
            raise ValueError(
                f"{section}.{key}: {spec['name']} has no such setting{nearest(key, known)}"
            )


def _parameters(factory: Factory, section: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ValueError(
            f"{section}.name: {factory!r} does not say which settings it takes"
        ) from None


def setting(spec: Mapping[str, Any], table: Table, key: str, section: str = "estimator") -> Any:
    """A setting's value, or its default; None if the component has no such setting."""
    parameter = _parameters(factory_of(spec, table, section), section).get(key)
    if key in spec:
        return spec[key]
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


class Method(NamedTuple):
    """What turns rollouts into an update: built once from a recipe, shared by all who ask."""

    rule: Rule
    estimator: Estimator
    advantage: Advantage
    loss: PolicyLoss


def make_task(spec: Mapping[str, Any], section: str = "task") -> Task:
    """The task of ``{name, **kwargs}``, of the package or of the user's own; what it raises later
    is a ValueError of one line.
    """
    task = checked_task(component(spec, COMPONENTS["task"], section), spec["name"])
    tell_errors(task)
    return task


def build_method(recipe: Recipe) -> Method:
    """The recipe's selection rule, estimator, advantage and loss. ValueError if one cannot be
    built.
    """
    parts = {
        section: component(getattr(recipe, section), COMPONENTS[section], section)
        for section in ("estimator", "advantage", "loss")
    }
    for section, kind in (("estimator", Estimator), ("loss", PolicyLoss)):
        _check_kind(parts[section], kind, section, getattr(recipe, section)["name"])
    if not isinstance(parts["advantage"], Advantage):  # a plain function of the user's own
        _check_kind(parts["advantage"], Callable, "advantage", recipe.advantage["name"])
        parts["advantage"] = Advantage(parts["advantage"])
    return Method(selection_rule(recipe.decode.select), **parts)


def selection_rule(name: str) -> Rule:
    """``decode.select``: a shipped rule by its name, or what a factory of the user's own makes."""
    if not is_outside(name):
        if name not in RULES:
            raise ValueError(f"decode.select: unknown {name!r}{nearest(name, RULES)}")
        return RULES[name]
    made = component({"name": name}, {}, "decode.select")
    _check_kind(made, Rule, "decode.select", name)
    return made


def settings_at(config: DecodeConfig, temperature: float) -> DecodeSettings:
    """What an engine decodes with; a selection rule of the user's own is handed over as it is."""
    settings = config.at(temperature)
    if not is_outside(config.select):
        return settings
    return replace(settings, select=selection_rule(config.select))


def _check_kind(made: Any, kind: Any, section: str, name: str) -> None:
    if not isinstance(made, kind):
        raise ValueError(
            f"{section}: {name} made {type(made).__name__}, expected "
            f"{'a function' if kind is Callable else kind.__name__}"
        )
