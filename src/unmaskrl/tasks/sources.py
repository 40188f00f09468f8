"""Rows of real data: a JSONL file, a folder of them, or a data set of the Hugging Face hub, in
disjoint splits.

Nothing is both trained and evaluated on: a row's split depends on a hash of its problem alone (or
is what the source or a column says), and rows of train or validation whose problem occurs in a
later split are left out.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unmaskrl.tasks.base import (
    SPLITS,
    Example,
    check_choice,
    file_stamp,
    nearest,
    read_examples,
    stable_hash,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Stamp = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands ("file:line", "hub-id/split:row"), a stable id, its columns, and
    whether it is the user's.
    """

    where: str
    id: str
    fields: dict[str, Any]
    own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a task's rows come from; ``column`` holds the problem, ``split_column`` names the split
    of a row.
    """

    task: str
    data: str
    column: str
    test_data: str | None = None
    config: str | None = None
    split_column: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"task {self.task} has no data: set task.data to a JSONL file")
        if self.test_data is not None and self.split_column is not None:
            raise ValueError(
                "test_data and split_column both say what the test problems are: set one of them"
            )

    def rows(self, split: str) -> tuple[Row, ...]:
        """The rows of a split in hash order, so that the first n are a random sample. Raises
        ValueError.
        """
        stamps = tuple(stamp for data in (self.data, self.test_data) for stamp in _stamps(data))
        return _splits(self, stamps)[split]


def check_columns(where: str, fields: dict[str, Any], *names: str) -> None:
    """Refuse a row without a column, or with null in it. Raises ValueError."""
    for name in names:
        if name in fields and fields[name] is None:
            raise ValueError(
                f"{where}: got null in column {name!r}: give it a value or leave the row out"
            )
        if name not in fields:
            raise ValueError(f"{where}: got no column {name!r}: {nearest(name, fields)}")


def _stamps(data: str | None) -> list[Stamp]:
    """What tells a changed file from the one that was read; nothing for a hub id."""
    if data is None or _is_hub_id(data):
        return []
    return [file_stamp(str(file)) for file in _local_files(data).values()]


def _is_hub_id(data: str) -> bool:
    return (
        not Path(data).exists()
        and Path(data).suffix not in (".jsonl", ".json")
        and _HUB_ID.fullmatch(data) is not None
    )


def _local_files(data: str) -> dict[str, Path]:
    """Split (or "all") -> file."""
    folder = Path(data)
    if not folder.is_dir():
        return {"all": folder}
    files = {
        split: folder / f"{split}.jsonl"
        for split in SPLITS
        if (folder / f"{split}.jsonl").is_file()
    }
    if not files:
        raise ValueError(
            f"data {data!r} is a folder without train.jsonl, validation.jsonl or test.jsonl: add "
            "them"
        )
    return files


@lru_cache(maxsize=8)
def _splits(source: Source, _stamps: tuple[Stamp, ...]) -> dict[str, tuple[Row, ...]]:
    parts = _read(source, source.data)
    if source.test_data is not None:
        tests = _read(source, source.test_data)
        # A file of its own, or the test part of a source that has one.
        parts["test"] = tests.get("test") or tests.get("all") or []
        if not parts["test"]:
            raise ValueError(
                f"test_data {source.test_data!r} has no split test (it has {', '.join(tests)}): "
                "give another"
            )
    splits = _assign(source, parts)
    for split in ("validation", "train"):
        later = {
            _key(source, row)
            for other in SPLITS[SPLITS.index(split) + 1 :]
            for row in splits[other]
        }
        splits[split] = [row for row in splits[split] if _key(source, row) not in later]
    _check_sizes(source, splits)
    return {split: _ordered(source, rows) for split, rows in splits.items()}


def _read(source: Source, data: str) -> dict[str, list[Row]]:
    """Split (or "all") -> rows as they stand there."""
    if _is_hub_id(data):
        parts = _read_hub(data, source.config)
    else:
        parts = {
            split: read_examples(str(file), _plain) for split, file in _local_files(data).items()
        }
    own = not _is_hub_id(data)
    rows = {
        split: [Row(e.id, "", e.fields, own) for e in examples] for split, examples in parts.items()
    }
    for row in (row for part in rows.values() for row in part):
        check_columns(row.where, row.fields, source.column)
    return rows


def _plain(where: str, row: dict[str, Any]) -> Example:
    return Example(id=where, fields=row)


def _read_hub(name: str, config: str | None) -> dict[str, tuple[Example, ...]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data {name!r} is a data set of the hub, which needs the package datasets: "
            "pip install 'unmaskrl[tasks]', or give a local JSONL file"
        ) from None
    try:
        with _quiet_hub():
            loaded = datasets.load_dataset(name, config)
    # offline, no such id, no such config: as many exceptions as ways to fail
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(
            f"data {name!r} cannot be loaded from the hub ({reason}); check the id and the "
            "network, or give a JSONL file"
        ) from None
    if not set(loaded) & set(SPLITS):
        raise ValueError(
            f"data {name!r} has the splits {', '.join(map(str, loaded))}, expected train, "
            "validation or test"
        )
    return {
        str(split): tuple(
            Example(id=f"{name}/{split}:{n}", fields=dict(row)) for n, row in enumerate(rows)
        )
        for split, rows in loaded.items()
        if split in SPLITS
    }


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub client's lines on each retry: what fails in the end is said once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _assign(source: Source, parts: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows per split: as the source names them; rows of no named split, and of train where another
    one is missing, by hash.
    """
    splits: dict[str, list[Row]] = {
        "train": [],
        **{split: list(parts.get(split, [])) for split in SPLITS[1:]},
    }
    given = [split for split in SPLITS[1:] if splits[split]]
    for row in (*parts.get("all", []), *parts.get("train", [])):
        split = _split_of(source, row)
        splits["train" if source.split_column is None and split in given else split].append(row)
    return splits


def _split_of(source: Source, row: Row) -> str:
    """What ``split_column`` says, else 80 / 10 / 10 % by the hash of the problem."""
    if source.split_column is not None:
        check_columns(row.where, row.fields, source.split_column)
        split = row.fields[source.split_column]
        if split not in SPLITS:
            raise ValueError(
                f"{row.where}: got {source.split_column} {split!r}, expected one of "
                f"{', '.join(SPLITS)}"
            )
        return split
    bucket = stable_hash(f"{source.task}/{_key(source, row)}") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def _key(source: Source, row: Row) -> str:
    problem = row.fields[source.column]
    text = problem if isinstance(problem, str) else json.dumps(problem, sort_keys=True, default=str)
    return " ".join(text.split()).casefold()


def _check_sizes(source: Source, splits: dict[str, list[Row]]) -> None:
    sizes = {split: len(rows) for split, rows in splits.items()}
    # A source of test problems alone is one to evaluate on.
    if (sizes["train"] or source.split_column) and not all(sizes.values()):
        counts = ", ".join(f"{count} {split}" for split, count in sizes.items())
        raise ValueError(
            f"data {source.data!r} gives {counts} rows, expected some in each split: give more "
            "rows, test_data, or a "
            "file per split (train.jsonl, validation.jsonl, test.jsonl in a folder)"
        )


def _ordered(source: Source, rows: list[Row]) -> tuple[Row, ...]:
    hashed = sorted(
        ((stable_hash(f"order/{_key(source, row)}"), row) for row in rows), key=lambda item: item[0]
    )
    seen: Counter[int] = Counter()
    result = []
    for value, row in hashed:
        seen[value] += 1
        again = f"-{seen[value]}" if seen[value] > 1 else ""
        result.append(Row(row.where, f"{source.task}-{value:016x}{again}", row.fields, row.own))
    return tuple(result)


_LEFT_OUT: dict[Source, str] = {}


def notes_of(source: Source) -> list[str]:
    """What to tell of the rows of the hub that were left out when the examples were made."""
    return [_LEFT_OUT[source]] if source in _LEFT_OUT else []


def examples_of(
    source: Source,
    split: str,
    from_row: Callable[[Row, str], dict[str, Any]],
    rewardable: Callable[[Example], bool],
) -> list[Example]:
    """The examples of a split, their fields made by from_row(row, split). Raises ValueError if
    there are none.

    Every split is made, so that a bad row is found before a run begins and not at its first
    validation. A row is bad if from_row raises ValueError, or if it is not ``rewardable``: no
    completion could ever be right. One of a file is refused; rows of the hub, which nobody can mend
    here, are left out and counted (notes_of), unless half of them are bad.
    """
    made: dict[str, list[Example]] = {name: [] for name in SPLITS}
    bad: list[str] = []
    for name in SPLITS:
        for row in source.rows(name):
            try:
                made[name].append(_example(row, name, from_row, rewardable))
            except ValueError as error:
                if row.own:
                    raise
                bad.append(str(error))
    total = len(bad) + sum(map(len, made.values()))
    if 2 * len(bad) > total:
        raise ValueError(
            f"{bad[0]} ({len(bad)} of {total} rows are like this: is this data set one for task "
            f"{source.task}?)"
        )
    if bad:
        _LEFT_OUT[source] = (
            f"{len(bad)} of {total} rows of {source.data} can never be right and are left out; "
            f"first: {bad[0]}"
        )
    check_choice("split", split, SPLITS)
    if not made[split]:
        raise ValueError(
            f"data {source.data!r} has no {split} problems: give data that has them, and this as "
            "test_data"
        )
    return made[split]


def _example(
    row: Row,
    split: str,
    from_row: Callable[[Row, str], dict[str, Any]],
    rewardable: Callable[[Example], bool],
) -> Example:
    example = Example(id=row.id, fields=from_row(row, split))
    if not rewardable(example):
        answer = ascii(str(example.fields.get("answer", "")))
        raise ValueError(
            f"{row.where}: the judge calls the row's own answer {answer[:80]} wrong, so no "
            "completion could be right"
        )
    return example
