"""A run folder as it was left: read as far as it goes, whatever its files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.decoding import RULES, planned_calls, whole_blocks
from .trajectory import is_sample
from .words import Row, number

RUN_FILES = ("config.yaml", "metrics.jsonl", "eval.jsonl", "summary.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """What a run folder holds; missing parts are empty."""

    folder: Path
    config_text: str
    config: Row
    metrics: list[Row]
    evals: list[Row]
    samples: list[Row]
    summary: Row
    sessions: list[Row]  # one per start of the command: when, how, with what

    @property
    def before(self) -> Row:
        """The base's test row, from the summary or the log; {} if there is none."""
        rows = [
            row for row in self.evals if row.get("split") == "test" and row.get("weights") == "base"
        ]
        return mapping(self.summary.get("before")) or (rows[0] if rows else {})

    @property
    def after(self) -> dict[str, Row]:
        """The last test row of the raw and the averaged weights."""
        stored = {
            key: row for key, row in mapping(self.summary.get("after")).items() if mapping(row)
        }
        logged = {str(row.get("weights")): row for row in self.evals if row.get("split") == "test"}
        return stored or {key: logged[key] for key in ("raw", "ema") if key in logged}

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return str(
            self.summary.get("name") or self.config.get("name") or self.folder.resolve().name
        )

    @property
    def block_length(self) -> int | None:
        """Tokens of a block of the decoding, if the config says so."""
        return _count(mapping(self.config.get("decode")).get("block_length"))

    @property
    def unpruned_calls(self) -> int | None:
        """Denoiser calls of a blank rollout without exit, if no EOS ends it early; None for rules
        that decide as they go.
        """
        decode = mapping(self.config.get("decode"))
        keys = ("gen_length", "block_length", "steps")
        gen_length, block_length, steps = (_count(decode.get(key)) for key in keys)
        rule = RULES.get(str(decode.get("select")))
        if rule is None or rule.prefix is not None:
            return None
        if not gen_length or not block_length or not steps:
            return None
        return planned_calls(whole_blocks(gen_length, block_length), gen_length, steps)


def load_run(run: Path) -> StoredRun:
    """Read a run folder, as far as it goes. Raises ValueError if it holds none of a run's files."""
    folder = Path(run)
    if not any((folder / name).is_file() for name in RUN_FILES):
        names = ", ".join(RUN_FILES)
        raise ValueError(
            f"{run} is no run folder (none of {names} is there): pass what `unmaskrl train` wrote"
        )
    text = _read_text(folder / "config.yaml")
    try:
        config = mapping(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError):
        config = {}  # shown as text all the same
    sessions = _read_object(folder / "run.json").get("sessions")
    return StoredRun(
        folder=folder,
        config_text=text,
        config=config,
        metrics=_read_rows(_read_text(folder / "metrics.jsonl")),
        evals=_read_rows(_read_text(folder / "eval.jsonl")),
        samples=[row for row in _read_rows(_read_text(folder / "samples.jsonl")) if is_sample(row)],
        summary=_read_object(folder / "summary.json"),
        sessions=[s for s in sessions if mapping(s)] if isinstance(sessions, list) else [],
    )


def step_of(row: Row) -> float | None:
    """The step of a row of a log."""
    return number(row, "step")


def spent_by(metrics: list[Row], key: str, scale: float = 1.0) -> dict[float, float]:
    """Step -> what was spent up to it (``calls/total``, ``seconds``), 0 at the start."""
    spent: dict[float, float] = {}
    for row in metrics:
        step = step_of(row)
        value = number(row, key)
        if step is not None and value is not None:
            spent[step] = value * scale
    return {0.0: 0.0, **spent} if spent else {}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section.key."""
    result: dict[str, Any] = {}
    for section, values in config.items():
        if isinstance(values, dict):
            result |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            result[section] = values
    return result


def mapping(value: Any) -> Row:
    """A dict as it is, {} for anything else."""
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    """A whole number above 0, else None."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_object(path: Path) -> Row:
    rows = _read_rows(_read_text(path).replace("\n", " "))
    return rows[0] if rows else {}


def _read_rows(text: str) -> list[Row]:
    """The JSON objects among the lines; a line cut by a kill is left out."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]
