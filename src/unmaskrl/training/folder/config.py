"""The settings of a run that goes on: which may change, which belong to the steps already
taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ...recipes.files import read_mapping
from ...recipes.load import build_recipe
from ...recipes.schema import Recipe, SFTRecipe
from ...utils.files import free_name, write_text
from .run_folder import CONFIG

# Length, evaluation, saving, logging and how sums are split: no past step would have been another
# one.
FREE = {
    "": "name eval eval_decode",
    "train": "steps minutes shard gather_rollout max_canvases skip_bad_updates",
    "run": "out threads save save_every save_minutes keep_checkpoints log_with log_every "
    "project group tags variance_draws probe",
    "model": "activation_checkpointing compile",
    "rollouts": "url folder patience timeout retries rows agreement",
}
ROUNDING = (
    "run.threads",
    "train.max_canvases",
    "model.activation_checkpointing",
    "model.compile",
)


def write_config(recipe: BaseModel, folder: Path) -> None:
    """The recipe as config.yaml, whole or not at all."""
    write_text(folder / CONFIG, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def read_config(path: Path, kind: type = Recipe) -> Any:
    """A stored recipe; ValueError with the file's name if it holds none. Settings newer than the
    file have their defaults.
    """
    try:
        return build_recipe(read_mapping(path), kind)
    except (ValueError, TypeError, AttributeError) as error:
        text = str(error)
        raise ValueError(
            text if text.startswith(str(path)) else f"{path} holds no recipe: {text}"
        ) from None


def check_changes(recipe: BaseModel, stored: BaseModel, path: Path) -> list[str]:
    """The changed settings of a run that goes on; ValueError if one of them belongs to its past
    steps.
    """
    new = _flat(recipe)
    old = _flat(stored)
    changed = [key for key in new | old if new.get(key) != old.get(key)]
    bound = [key for key in changed if not _is_free(key)]
    if bound:
        each = ", ".join(
            f"{key} ({_shown(old.get(key))} there, {_shown(new.get(key))} now)" for key in bound
        )
        verb = "differs" if len(bound) == 1 else "differ"
        raise ValueError(
            f"--resume: {each} {verb} from {path} and would change what its steps were; leave it "
            "as it was there, or start a "
            "new run (with model.path=RUN/model to begin where this one stands)"
        )
    return changed


def describe_changes(
    recipe: Recipe | SFTRecipe, stored: BaseModel, changed: list[str]
) -> list[str]:
    """What to say about settings that changed: each with both values, and what follows from it."""
    new = _flat(recipe)
    old = _flat(stored)
    shown = [
        f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in changed
        if key != "run.out"
    ]
    notes = [f"changed on resume: {', '.join(shown)}"] if shown else []
    if any(key in ROUNDING for key in changed):
        notes.append(
            f"{', '.join(k for k in ROUNDING if k in changed)} changed: sums round differently "
            "from here on"
        )
    if {"train.steps", "train.minutes"} & set(changed) and (paced := paced_by_length(recipe)):
        notes.append(
            f"the run's length changed: {', '.join(paced)} follow the new one from here on, past "
            "steps keep what they had "
            "(a run of that length from the start would differ)"
        )
    return notes


def paced_by_length(recipe: Recipe | SFTRecipe) -> list[str]:
    """Settings whose values at a step depend on how long the run will be."""
    schedule = recipe.optimizer.schedule
    paced = {f"optimizer.schedule={schedule}": schedule != "constant"}
    if isinstance(recipe, Recipe):
        prior = recipe.prior
        paced["prior.keep_end"] = prior.name == "anchors" and prior.keep_end is not None
        paced["sampler.switch_at"] = recipe.sampler.mode == "sequential"
    else:
        paced["data.lazy_from"] = any(part.lazy_share > 0 for part in recipe.data)
    return [name for name, used in paced.items() if used]


def keep_old(path: Path) -> Path | None:
    """Copy a file to ``NAME-old-N`` before another takes its place; None if there is none."""
    if not path.is_file():
        return None
    kept = free_name(path)
    write_text(kept, path.read_text(encoding="utf-8"))
    return kept


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in FREE[""].split() or name in FREE.get(section, "").split()


def _flat(recipe: BaseModel) -> dict[str, Any]:
    """Every setting by section.key; adapters and lists are one setting each."""
    data = recipe.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for section, values in data.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
