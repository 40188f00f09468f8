"""What runs in the guard's worker for the task reasoning_gym: the only place that imports the
package.

Problems are named by (dataset, settings, seed, index) and made again where they are scored: some
entries are not JSON, and a scorer needs its dataset's settings. Measured on reasoning-gym 0.1.25:
one dataset draws from Python's global generator, one from numpy's, and five depend on the order of
sets; in a worker of fixed hashing whose global generator is set before each problem, every dataset
gives the same problem every time.
"""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import fields
from functools import lru_cache
from typing import Any

from unmaskrl.tasks.base import nearest

# Before the guard's limits, which count memory from here and refuse what the imports need (loading
# libraries).
_GYM: Any = importlib.import_module("reasoning_gym")
# Problems per dataset object; part of what a problem's seed means.
CHUNK = 64


def serve(operation: str, *args: Any) -> Any:
    """The guard's one target: "check", "entries", "prepare" or "score"."""
    return {"check": check, "entries": entries, "prepare": prepare, "score": score}[operation](
        *args
    )


def check(name: str, settings: str) -> None:
    """Raise ValueError for an unknown dataset or setting, or a value that the dataset refuses."""
    known = _GYM.factory.DATASETS
    if name not in known:
        close = nearest(name, known)
        hint = (
            close
            if close.startswith("did")
            else f"reasoning_gym.factory.DATASETS lists {len(known)} names"
        )
        raise ValueError(f"reasoning-gym has no dataset {name!r}: {hint}")
    names = [field.name for field in fields(known[name][1])]
    for key in json.loads(settings):
        if key not in names:
            raise ValueError(f"dataset {name!r} has no setting {key!r}: {nearest(key, names)}")
    try:
        _dataset(name, settings, 0)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"dataset {name!r} refuses the settings {settings}: {type(error).__name__} {first}"
        ) from None


def entries(
    name: str, settings: str, seed: int, start: int, stop: int
) -> list[tuple[str, str | None]]:
    """The (question, answer) pairs of problems start..stop - 1; no answer where the dataset gives
    none as a text.
    """
    chunk = [_entry(name, settings, seed, index) for index in range(start, stop)]
    return [
        (entry["question"], entry["answer"] if isinstance(entry["answer"], str) else None)
        for entry in chunk
    ]


def prepare(name: str, settings: str, seed: int, index: int) -> None:
    """Make a problem and what scoring it imports, so that neither counts against the time of an
    answer.
    """
    _entry(name, settings, seed, index)
    _score_once(name, settings)


@lru_cache(maxsize=256)
def _score_once(name: str, settings: str) -> None:
    score(name, settings, 0, 0, str(_entry(name, settings, 0, 0)["answer"]))


def score(name: str, settings: str, seed: int, index: int, answer: str) -> float:
    """The dataset's own score of an answer."""
    return float(
        _dataset(name, settings, seed).score_answer(answer, _entry(name, settings, seed, index))
    )


@lru_cache(maxsize=64)
def _dataset(name: str, settings: str, seed: int) -> Any:
    _set_global_generator(f"{seed}")
    return _GYM.create_dataset(name, seed=seed, size=CHUNK, **json.loads(settings))


@lru_cache(maxsize=8192)
def _entry(name: str, settings: str, seed: int, index: int) -> dict[str, Any]:
    dataset = _dataset(name, settings, seed)
    _set_global_generator(f"{seed}/{index}")
    return dataset[index]


def _set_global_generator(key: str) -> None:
    # The worker's own; the process that trains is not touched.
    random.setstate(random.Random(key).getstate())
