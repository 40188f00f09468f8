"""What every task shares: Example, the Task protocol, answer tags and JSONL rows."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

OPEN_TAG = "<answer>"
CLOSE_TAG = "</answer>"
SPLITS = ("train", "validation", "test")
PROMPT_STYLES = ("short", "instruct")
PROTOCOLS = ("strict", "d1")
FORMAT_REWARD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One problem: ``fields`` holds its columns, as a JSONL row does (numbers and target, or
    puzzle, ...).
    """

    id: str
    fields: dict[str, Any]


RewardPart = Callable[[Example, str], float]
TrlReward = Callable[..., list[float]]


class Task(Protocol):
    """A source of problems with a verifiable answer. Pure text: knows no tokenizer and no model."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that every example has and that rewards read."""
        ...

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """The parts of the reward, summed by the trainer: {"correct": 0 or 1, "format": 0 or
        0.1}.
        """
        ...

    def examples(self, split: str) -> list[Example]:
        """The problems of "train", "validation" or "test", the same in every process."""
        ...

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """Chat messages."""
        ...

    def reference(self, example: Example) -> str | None:
        """A right completion: worked steps and the answer; None if the problem has no known
        solution.
        """
        ...

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        ...

    def correct(self, example: Example, text: str) -> bool:
        """Whether the last answer in ``text`` solves it; the one judge of training and
        evaluation.
        """
        ...


@runtime_checkable
class LazyTask(Task, Protocol):
    """A task that knows a lazy policy, for bases that have to be taught to think."""

    def lazy(self, example: Example) -> str:
        """The completion of a policy that keeps the layout and does not think."""
        ...


def last_answer(text: str) -> str | None:
    """The body of the last complete ``<answer>...</answer>``; None without one. Linear time on any
    text.
    """
    start = text.rfind(OPEN_TAG, 0, max(text.rfind(CLOSE_TAG), 0))
    if start < 0:
        return None
    start += len(OPEN_TAG)
    return text[start : text.find(CLOSE_TAG, start)]


def only_answer(text: str) -> str | None:
    """The body of the answer if ``text`` has exactly one opening and one closing tag in order; else
    None.
    """
    if text.count(OPEN_TAG) != 1 or text.count(CLOSE_TAG) != 1:
        return None
    return last_answer(text)


def answer_spans(text: str) -> list[tuple[int, int]]:
    """Character spans (start, end) of the inside of each ``<answer>...</answer>``, its blanks
    included.
    """
    spans = []
    start = text.find(OPEN_TAG)
    while start >= 0:
        start += len(OPEN_TAG)
        end = text.find(CLOSE_TAG, start)
        if end < 0:
            break
        spans.append((start, end))
        start = text.find(OPEN_TAG, end)
    return spans


def nearest(got: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known name, or the list of known names."""
    names = list(known)
    close = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def check_choice(label: str, got: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among ``known``. Raises ValueError."""
    if got not in known:
        raise ValueError(f"{label} {got!r} is not one of {', '.join(known)}: {nearest(got, known)}")


def check_range(label: str, got: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an integer in low..high. Raises ValueError."""
    fits = (
        isinstance(got, int)
        and not isinstance(got, bool)
        and got >= low
        and (high is None or got <= high)
    )
    if not fits:
        expected = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(
            f"{label} is {got!r}, expected an integer {expected}: set {label} accordingly"
        )


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process, on every machine and for every seed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def file_stamp(path: str) -> tuple[str, int, int]:
    """(path, modification time, size): a cache key for what is read from a file. Raises
    ValueError.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data {str(path)!r} is not a file: expected the path of a JSONL file")
    status = file.stat()
    return str(path), status.st_mtime_ns, status.st_size


def read_examples(
    path: str, from_row: Callable[[str, dict[str, Any]], Example]
) -> tuple[Example, ...]:
    """Turn each JSON object of a JSONL file into from_row("file:line", row), blank lines skipped.

    Raises ValueError for a line that is no JSON object (naming file and line) and for a file
    without rows.
    """
    with Path(path).open("rb") as file:
        lines = [
            (f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip()
        ]
    if not lines:
        raise ValueError(f"{path}: got an empty file, expected one JSON object per line")
    return tuple(from_row(where, _parse_row(where, line)) for where, line in lines)


def _parse_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: got {_excerpt(line)}, expected one JSON object per line"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {_excerpt(line)}, expected a JSON object such as {{...}}")
    return row


def _excerpt(line: bytes) -> str:
    return ascii(line.strip()[:60].decode("utf-8", "replace"))
