"""What every task shares: Example, Grade, the Task protocol, its bases, answer tags, JSONL rows."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

OPEN_TAG = "<answer>"
CLOSE_TAG = "</answer>"
SPLITS = ("train", "validation", "test")
PROMPT_STYLES = ("short", "instruct")
FORMAT_REWARD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One problem: ``fields`` holds its columns, as a JSONL row does (numbers and target, or
    puzzle, ...).
    """

    id: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grade:
    """The judgement of one completion: whether it is right, and the parts of its reward by name.

    Rewards are the sum of the parts. A part that is missing abstains.
    """

    correct: bool
    parts: dict[str, float]


TrlReward = Callable[..., list[float]]


class Task(Protocol):
    """A source of problems with a verifiable answer. Pure text: knows no tokenizer and no model.

    Four methods are a task's own: examples, prompt, reference and grade. ``BaseTask`` has the rest.
    ``unmaskrl.testing.check_task`` tries all of it.
    """

    @property
    def name(self) -> str:
        """What messages and files call it."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that every example has and that ``grade`` reads."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user is told about the problems, once they were made."""
        ...

    @property
    def reads_special_tokens(self) -> bool:
        """Whether evaluation judges completions with their special tokens (published judges do)."""
        ...

    def examples(self, split: str) -> list[Example]:
        """The problems of "train", "validation" or "test", the same in every process.

        No problem is in two splits. Raises ValueError for another split.
        """
        ...

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """Chat messages, each with ``role`` and ``content``."""
        ...

    def reference(self, example: Example) -> str | None:
        """A completion that ``grade`` calls right; None where none is known. Anchors come from it.

        Worked steps before the answer make anchors worth more.
        """
        ...

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the answers in a text; anchors leave them open."""
        ...

    def grade(self, example: Example, text: str) -> Grade:
        """The one judge of training and evaluation, called once per completion.

        ``text`` was written by a model: it may be empty, huge, or an attack. Pure: the same text
        gets the same grade.
        """
        ...


@runtime_checkable
class LazyTask(Task, Protocol):
    """A task that knows a lazy policy, for bases that have to be taught to think."""

    def lazy(self, example: Example) -> str:
        """The completion of a policy that keeps the layout and does not think."""
        ...


class BaseTask:
    """What most tasks share. A subclass writes name, examples, prompt, reference and grade."""

    name: ClassVar[str] = "task"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that ``grade`` reads; here: not told."""
        return ()

    @property
    def notes(self) -> list[str]:
        """What the user is told about the problems; here nothing."""
        return []

    @property
    def reads_special_tokens(self) -> bool:
        """Whether evaluation judges completions with their special tokens; here not."""
        return False

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        return answer_spans(text)

    def grade(self, example: Example, text: str) -> Grade:
        """Verdict and parts of one completion."""
        raise NotImplementedError(f"{type(self).__name__} has no grade(example, text)")

    def correct(self, example: Example, text: str) -> bool:
        """The verdict of ``grade`` alone."""
        return self.grade(example, text).correct


Answer = TypeVar("Answer")


class AnswerJudge(Generic[Answer]):
    """Grades the last ``<answer>...</answer>`` of a text: a subclass writes ``read`` and
    ``solves``.
    """

    def read(self, example: Example, body: str) -> Answer | None:
        """What the inside of the tags means; None if it is no answer."""
        raise NotImplementedError(f"{type(self).__name__} has no read(example, body)")

    def solves(self, example: Example, answer: Answer) -> bool:
        """Whether an answer is right."""
        raise NotImplementedError(f"{type(self).__name__} has no solves(example, answer)")

    def well_formed(self, body: str, answer: Answer | None) -> bool:
        """Whether the only answer of a text earns the format reward."""
        return answer is not None

    def grade(self, example: Example, text: str) -> Grade:
        """{"correct": 1 if right, "format": 0.1 for exactly one pair of tags that is well
        formed}.
        """
        body = last_answer(text)
        if body is None:
            return Grade(False, {"correct": 0.0, "format": 0.0})
        answer = self.read(example, body)
        correct = answer is not None and self.solves(example, answer)
        formed = only_answer(text) is not None and self.well_formed(body, answer)
        return Grade(correct, {"correct": float(correct), "format": FORMAT_REWARD * formed})


class AnswerTask(AnswerJudge[Answer], BaseTask):
    """A task whose answers stand in ``<answer>...</answer>``.

    A subclass writes examples, prompt, reference, read and solves.
    """


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
