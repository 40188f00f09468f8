"""A JSONL file that a long evaluation fills and can go on with after it was killed.

The first line holds the settings that decide the rows; a file of other settings is refused. A line
that a kill cut in the middle is dropped, and what it stood for is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.adapter_folder import base_of
from ..models.hub import asset, checkpoint_folder
from ..tasks import Example, Task
from ..utils.files import append_text, json_text, sync
from ..utils.torch_setup import installed

_END = 16 * 2**20  # bytes


@dataclass(slots=True)
class ItemLog:
    """Rows that are done, in the order of the file; without a path they live in memory only."""

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    head: dict[str, Any] | None = None  # the first line, until it is written

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any]) -> ItemLog:
        """A new log, or the whole rows of one with the same settings. ValueError if the file is
        something else.
        """
        if path is None:
            return cls(None)
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")
        # as JSON gives it back: tuples are lists
        head = json.loads(json_text({"settings": settings}))
        if not path.exists() or not (lines := _whole_lines(path)):
            # written with the first rows: a command that fails before leaves no file
            return cls(path, head=head)
        first, *rows = lines
        if first.keys() != head.keys():
            raise ValueError(f"{path} is no log of an unfinished evaluation; name another file")
        stored = first["settings"]
        different = [
            key for key in head["settings"] | stored if stored.get(key) != head["settings"].get(key)
        ]
        if different:
            raise ValueError(
                f"{path} belongs to other settings (different: {', '.join(different)}); "
                "go on with those, or delete it to start anew"
            )
        return cls(path, rows)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, on the disk before this returns."""
        self.rows.extend(rows)
        if self.path is not None:
            head = [] if self.head is None else [self.head]
            append_text(self.path, "".join(json_text(row) + "\n" for row in [*head, *rows]))
            sync(self.path)
            self.head = None


def described_model(path: str) -> dict[str, str]:
    """A checkpoint's name, and a digest of its weights: a folder that was trained again is another
    model.

    Of each file the size and both ends count: reading 16 GB would take longer than many an
    evaluation.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size - _END)):
                stream.seek(start)
                digest.update(stream.read(_END))
    return {"model": path, "weights": digest.hexdigest()}


def _weight_files(path: str) -> list[Path]:
    """A model's weights; an adapter's, and those of its base."""
    folder = checkpoint_folder(asset(path))
    base = base_of(folder)
    return [*sorted(folder.glob("*.safetensors")), *(_weight_files(base.path) if base else [])]


def described_problems(task: Task, examples: Iterable[Example]) -> str:
    """A digest of problems and prompts: the same for the same list, whatever file or settings it
    came from.
    """
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(
            json.dumps(
                [example.id, example.fields, task.prompt(example)], sort_keys=True, default=str
            ).encode()
        )
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return installed("unmaskrl", "torch", "transformers")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Every row of the file; a last line that is not whole is cut off the file."""
    data = path.read_bytes()
    rows = []
    good = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if number < len(lines) - 1:  # only the end can be the work of a kill
                raise ValueError(
                    f"{path}:{number} is no JSON object; delete the file to start anew"
                ) from None
            break
        rows.append(row)
        good += len(line) + 1
    if good < len(data):
        with path.open("r+b") as file:
            file.truncate(good)
    return rows
