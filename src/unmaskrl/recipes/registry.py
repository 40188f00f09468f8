"""From a recipe's ``{name: ..., **kwargs}`` to objects.

The keyword arguments of a component's factory are its schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..core.advantages import ADVANTAGES
from ..core.estimators import ESTIMATORS, Estimator
from ..core.losses import LOSSES, PolicyLoss
from ..tasks import TASKS
from ..utils.text import nearest
from .schema import Recipe

COMPONENTS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "task": TASKS,
    "estimator": ESTIMATORS,
    "advantage": ADVANTAGES,
    "loss": LOSSES,
}


def component(spec: dict[str, Any], table: Mapping[str, Callable[..., Any]], section: str) -> Any:
    """Build ``{name, **kwargs}``."""
    check_component(spec, table, section)
    settings = {k: v for k, v in spec.items() if k != "name"}
    try:
        return table[spec["name"]](**settings)
    except ValueError as error:
        raise ValueError(f"{section} {spec['name']}: {error}") from None
    except TypeError as error:  # a word where a number belongs
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{section} {spec['name']}: {settings} has a setting of the wrong type ({first})"
        ) from None


def check_component(
    spec: dict[str, Any], table: Mapping[str, Callable[..., Any]], section: str
) -> None:
    """The name is known and so is every keyword."""
    if "name" not in spec:
        raise ValueError(
            f"{section}: expected {{name: ..., settings}}, got {spec!r}; names: {', '.join(table)}"
        )
    if spec["name"] not in table:
        raise ValueError(
            f"{section}.name: unknown {spec['name']!r}{nearest(str(spec['name']), table)}"
        )
    known = list(inspect.signature(table[spec["name"]]).parameters)
    for key in spec:
        if key != "name" and (key not in known or section == "advantage"):
            raise ValueError(
                f"{section}.{key}: {spec['name']} has no such setting{nearest(key, known)}"
            )


def setting(spec: dict[str, Any], table: Mapping[str, Callable[..., Any]], key: str) -> Any:
    """A setting's value, or its default; None if the component has no such setting."""
    parameter = inspect.signature(table[spec["name"]]).parameters.get(key)
    return spec.get(key, parameter.default) if parameter else None


def make_estimator(recipe: Recipe) -> Estimator:
    """The recipe's estimator; ``prior.hide_in_views`` is its ``hide_anchors``."""
    spec = {"hide_anchors": recipe.prior.hide_in_views, **recipe.estimator}
    return component(spec, COMPONENTS["estimator"], "estimator")


def make_loss(recipe: Recipe) -> PolicyLoss:
    """The recipe's policy loss."""
    return component(recipe.loss, COMPONENTS["loss"], "loss")
