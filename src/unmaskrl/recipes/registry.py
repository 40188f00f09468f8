"""From a recipe's ``{name: ..., **kwargs}`` to objects.

A name is one of the shipped table, or ``package.module:factory`` or ``path/to/file.py:factory`` of
the user's own. The keyword arguments of the factory are the component's schema either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..core.advantages import ADVANTAGES
from ..core.estimators import ESTIMATORS, Estimator
from ..core.losses import LOSSES, PolicyLoss
from ..tasks import TASKS, Task, checked_task
from ..utils.imports import is_outside, load_object
from ..utils.text import nearest
from .schema import Recipe

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
    which the spec may not set. ValueError, naming the section, for a setting it does not take.
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
        if key != "name" and (key not in known or section == "advantage"):
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


def make_estimator(recipe: Recipe) -> Estimator:
    """The recipe's estimator."""
    return component(recipe.estimator, COMPONENTS["estimator"], "estimator")


def make_loss(recipe: Recipe) -> PolicyLoss:
    """The recipe's policy loss."""
    return component(recipe.loss, COMPONENTS["loss"], "loss")


def make_task(spec: Mapping[str, Any], section: str = "task") -> Task:
    """The task of ``{name, **kwargs}``, of the package or of the user's own."""
    return checked_task(component(spec, COMPONENTS["task"], section), spec["name"])
