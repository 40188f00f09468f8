"""Model families that load without remote code, by the ``model_type`` of their config.json."""

from __future__ import annotations

from typing import Any

from ...utils.imports import is_outside, load_object
from ...utils.text import nearest
from . import dream, llada, llada2, sdar
from .dream import Dream as Dream
from .dream import DreamConfig as DreamConfig
from .family import Family as Family
from .family import FamilyConfig as FamilyConfig
from .family import Given as Given
from .family import MaskPredictor as MaskPredictor
from .llada import LLaDA as LLaDA
from .llada import LLaDAConfig as LLaDAConfig
from .llada2 import LLaDA2 as LLaDA2
from .llada2 import LLaDA2Config as LLaDA2Config
from .sdar import SDAR as SDAR
from .sdar import SDARConfig as SDARConfig
from .sdar import SDARMoe as SDARMoe
from .sdar import SDARMoeConfig as SDARMoeConfig

_SHIPPED = (llada.FAMILY, dream.FAMILY, sdar.FAMILY, sdar.MOE_FAMILY, llada2.FAMILY)
FAMILIES = {family.model_type: family for family in _SHIPPED}


def named_family(name: str | Family | None, setting: str = "model.family") -> Family | None:
    """A shipped family by its model_type, or one from outside (``module:factory``); None is None.

    ValueError, beginning with ``setting``, if there is none.
    """
    if name is None or isinstance(name, Family):
        return name
    if not is_outside(name):
        if name not in FAMILIES:
            raise ValueError(f"{setting}: unknown {name!r}{nearest(name, FAMILIES)}")
        return FAMILIES[name]
    made = load_object(name, setting)()
    if not isinstance(made, Family):
        raise ValueError(
            f"{setting}: {name} returns a {type(made).__name__}; expected an unmaskrl.Family"
        )
    return made


def parse_config(
    raw: dict[str, Any],
    where: object,
    family: Family | None = None,
    given: Given | None = None,
    name: str = "",
) -> tuple[FamilyConfig, Family]:
    """The config in a config.json and its family, found by its model_type unless it is given.

    ``given``, ``name``: as of ``Family.config``. ValueError that names ``where`` it came from.
    """
    if family is None:
        kind = raw.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(
                f"{where} has model_type {kind!r}; shipped families: {', '.join(FAMILIES)} "
                "(another is named by model.family or --family, as my_module:factory)"
            )
        family = FAMILIES[kind]
    return family.config(raw, where, given, name), family


def known_config(hub_id: str, family: Family | None = None) -> dict[str, Any] | None:
    """The config of a released checkpoint by its hub id (or of a family by its model_type).

    None if it is not known; ``family`` is one more to look at.
    """
    for one in (*FAMILIES.values(), *([family] if family else [])):
        if (known := one.known(hub_id)) is not None:
            return known
    return None


def known_names(family: Family | None = None) -> list[str]:
    """How the hub ids of released models begin."""
    return [
        start
        for one in (*FAMILIES.values(), *([family] if family else []))
        for start in one.hub_ids
    ]
