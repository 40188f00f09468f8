"""Bases of the shipped tasks: problems that are generated or read, under the rules of a protocol.

A protocol is what a task asks and how it judges. "strict" is ours; "d1" is the published one, for
comparison with published numbers (docs/tasks.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from unmaskrl.tasks.base import (
    PROMPT_STYLES,
    SPLITS,
    BaseTask,
    Example,
    Grade,
    check_choice,
    check_range,
)
from unmaskrl.tasks.sources import Row, Source, examples_of, notes_of


class Rules(Protocol):
    """What a task asks and how it judges under one protocol. Methods as in Task."""

    @property
    def reads_special_tokens(self) -> bool:
        """Whether evaluation judges completions with their special tokens."""
        ...

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """Chat messages."""
        ...

    def reference(self, example: Example) -> str | None:
        """A right completion."""
        ...

    def grade(self, example: Example, text: str) -> Grade:
        """Verdict and parts of one completion."""
        ...


class StrictRules:
    """What strict rules share."""

    reads_special_tokens = False

    def in_split(self, example: Example, split: str) -> Example:
        """The example as it is: prompts of training and evaluation are the same."""
        return example


class PublishedRules:
    """What published rules share: their evaluation reads end-of-turn tokens."""

    reads_special_tokens = True


AnyRules = TypeVar("AnyRules", bound=Rules, covariant=True)


@dataclass(frozen=True, kw_only=True)
class RuledTask(BaseTask, Generic[AnyRules]):
    """A task that asks and judges by the rules of its ``protocol``."""

    protocol: str = "strict"

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, tuple(self._protocols()))

    def _protocols(self) -> Mapping[str, AnyRules]:
        """The rules of each protocol, with the task's settings."""
        raise NotImplementedError

    @property
    def rules(self) -> AnyRules:
        """The rules that are set."""
        return self._protocols()[self.protocol]

    @property
    def reads_special_tokens(self) -> bool:
        """Whether evaluation judges completions with their special tokens."""
        return self.rules.reads_special_tokens

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """Chat messages; published rules have other ones in training than in evaluation."""
        return self.rules.prompt(example)

    def reference(self, example: Example) -> str | None:
        """A right completion in the layout that the prompt asks for; None where none is known."""
        return self.rules.reference(example)

    def grade(self, example: Example, text: str) -> Grade:
        """Verdict and parts of one completion."""
        return self.rules.grade(example, text)


@dataclass(frozen=True, kw_only=True)
class GeneratedTask(BaseTask):
    """Problems that are made from a ``seed``: so many for training, so many for each evaluation."""

    seed: int = 0
    train_size: int = 4096
    eval_size: int = 512
    prompt_style: str = "short"

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("train_size", self.train_size, 1)
        check_range("eval_size", self.eval_size, 1)
        check_choice("prompt_style", self.prompt_style, PROMPT_STYLES)

    def size_of(self, split: str) -> int:
        """How many problems a split has. Raises ValueError for an unknown split."""
        check_choice("split", split, SPLITS)
        return self.train_size if split == "train" else self.eval_size


@dataclass(frozen=True, kw_only=True)
class SourcedTask(BaseTask):
    """Problems that people wrote, from ``data``: a hub id (with ``config``), a JSONL file, or a
    folder.

    ``test_data`` is another source of the test problems.
    """

    data: str = ""
    test_data: str | None = None
    config: str | None = None

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError for data that cannot be read, naming file and
        line.
        """
        return examples_of(self._source(), split, self._fields, self._rewardable)

    @property
    def notes(self) -> list[str]:
        """What to tell of rows that were left out."""
        return notes_of(self._source())

    def _source(self) -> Source:
        return Source(
            task=self.name,
            data=self.data,
            test_data=self.test_data,
            config=self.config,
            column=self._problem_column(),
        )

    def _problem_column(self) -> str:
        raise NotImplementedError

    def _fields(self, row: Row, split: str) -> dict[str, Any]:
        """The fields of an example; ValueError for a row that is none."""
        raise NotImplementedError

    def _rewardable(self, example: Example) -> bool:
        """Whether any completion could be right: the judge is held against the row's own answer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WrittenTask(SourcedTask, RuledTask[Rules]):
    """Problems that people wrote, under the rules of a protocol."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that ``grade`` reads."""
        return (self._problem_column(), "answer")

    def _rewardable(self, example: Example) -> bool:
        """Whether the judge, or the reward of training, takes the row's own answer for right."""
        reference = self.reference(example)
        if reference is None:
            return False
        grade = self.grade(example, reference)
        return grade.correct or grade.parts["correct"] > 0
