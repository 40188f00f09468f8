"""The decode settings beside a model's weights, and those that a recipe would accept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.loading import DECODE_FILE as DECODE_FILE
from ..recipes.load import build_recipe
from ..recipes.schema import DecodeConfig


def checked_decode(task: str | None, settings: dict[str, Any]) -> DecodeConfig:
    """Decode settings that a recipe would accept; the temperature is not theirs, commands have
    --temperature.
    """
    probe = {"task": {"name": task or "sudoku"}, "decode": {**settings, "temperature": 1.0}}
    return build_recipe(probe).decode


def settings_for(stored: Mapping[str, dict[str, Any]], task: str | None) -> dict[str, Any]:
    """Those of a task; the first ones if no task is named; empty without any."""
    if task is None:
        return next(iter(stored.values()), {})
    return stored.get(task, {})
