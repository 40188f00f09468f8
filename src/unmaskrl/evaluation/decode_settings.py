"""The decode settings beside a model's weights, and those that a recipe would accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipes.load import build_recipe
from ..recipes.schema import DecodeConfig
from ..utils.files import read_json

DECODE_FILE = "decode.json"


def checked_decode(task: str | None, settings: dict[str, Any]) -> DecodeConfig:
    """Decode settings that a recipe would accept; the temperature is not theirs, commands have
    --temperature.
    """
    probe = {"task": {"name": task or "sudoku"}, "decode": {**settings, "temperature": 1.0}}
    return build_recipe(probe).decode


def stored_decode(path: str | Path, task: str | None) -> dict[str, Any]:
    """The decode settings beside the weights for a task, or the first ones if no task is named;
    empty without any.
    """
    file = Path(path) / DECODE_FILE
    stored = read_json(file) if file.is_file() else {}
    if not all(isinstance(settings, dict) for settings in stored.values()):
        raise ValueError(
            f"{file}: expected an object of decode settings for each task; correct or delete it"
        )
    if task in stored:
        return stored[task]
    return next(iter(stored.values())) if task is None and stored else {}
