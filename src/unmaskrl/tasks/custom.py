"""Tasks of the user's own: rows of a JSONL file (or of the hub), judged by a reward function or a
built-in verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import isfinite
from typing import Any

from unmaskrl.tasks.base import (
    AnswerTask,
    Example,
    Grade,
    TrlReward,
    answer_spans,
    check_choice,
    last_answer,
)
from unmaskrl.tasks.functions import Rewards, named_rewards
from unmaskrl.tasks.math.answers import (
    boxed_spans,
    final_answer,
    gold_text,
    merged_spans,
    parse_number,
)
from unmaskrl.tasks.math.equivalence import check_installed, equivalent
from unmaskrl.tasks.protocols import SourcedTask
from unmaskrl.tasks.rewards import CallContext, Grades, call_functions, grade_by_row
from unmaskrl.tasks.sources import Row, Source, check_columns


def same_text(gold: str, body: str) -> bool:
    """Equality up to blanks and line ends."""
    return gold.split() == body.split()


def same_number(gold: str, body: str) -> bool:
    """Equality as exact rationals; a box in the body is opened."""
    value = parse_number(final_answer(body))
    return value is not None and value == parse_number(gold)


def same_expression(gold: str, body: str) -> bool:
    """Equality as LaTeX answers; a box in the body is opened."""
    return equivalent(gold, final_answer(body))


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "number": same_number,
    "math": same_expression,
}


@dataclass(frozen=True, kw_only=True)
class Jsonl(SourcedTask, AnswerTask[str]):
    """Problems of your own: ``prompt_column`` holds a text or chat messages, other columns are what
    rewards read.

    Judged either by ``reward``, one or several functions of TRL's contract (as callables, or as
    'package.module:function' or 'file.py:function'; ``correct`` means that the first gives at least
    ``correct_at``), or by a ``verifier`` ("exact", "number", "math") that compares the last
    <answer>...</answer> with ``answer_column``.
    ``reference_column`` holds right completions for anchors. Splits: ``test_data``,
    ``split_column``, a folder, or by hash (docs/tasks.md). Fields: the row's columns. Raises
    ValueError.
    """

    name = "jsonl"

    prompt_column: str = "prompt"
    answer_column: str = "answer"
    reference_column: str | None = None
    split_column: str | None = None
    system: str | None = None
    reward: Rewards | None = None
    verifier: str | None = None
    correct_at: float = 1.0

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.verifier is None):
            raise ValueError(
                "expected either reward (package.module:function or file.py:function) or verifier "
                f"({', '.join(VERIFIERS)}), "
                f"got {'neither' if self.reward is None else 'both'}: set one of them"
            )
        if self.verifier is not None:
            check_choice("verifier", self.verifier, tuple(VERIFIERS))
        if self.verifier == "math":
            check_installed()
        self._source()
        self._functions()

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The row's prompt, after the ``system`` message if there is one."""
        prompt = example.fields[self.prompt_column]
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def reward_prompt(self, example: Example) -> str | list[dict[str, str]]:
        """What reward functions get: the row's text as it is, or chat messages where the row has
        them or ``system`` is set.
        """
        prompt = example.fields[self.prompt_column]
        return prompt if isinstance(prompt, str) and not self.system else self.prompt(example)

    def reference(self, example: Example) -> str | None:
        """The row's reference; for a verifier without such a column, the bare answer in its
        tags.
        """
        if self.reference_column is not None:
            return example.fields.get(self.reference_column)
        return f"<answer> {self._gold(example)} </answer>" if self.verifier else None

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags and of balanced boxes,
        merged.
        """
        return merged_spans([*answer_spans(text), *boxed_spans(text)])

    def read(self, example: Example, body: str) -> str | None:
        """The body itself: what it means is for the verifier to say."""
        return body

    def solves(self, example: Example, answer: str) -> bool:
        """What the verifier says of the last answer."""
        return self._verifier(self._gold(example), answer)

    def grade(self, example: Example, text: str) -> Grade:
        """{"correct": 1, "format": 0.1} of a verifier; of reward functions a part each, by its
        name.
        """
        if self.verifier is not None:
            return super().grade(example, text)
        grades = self.grade_batch([example], [text], CallContext())
        parts = {name: scores[0] for name, scores in grades.parts.items()}
        return Grade(
            grades.correct[0], {name: score for name, score in parts.items() if score is not None}
        )

    def grade_batch(
        self, examples: Sequence[Example], texts: Sequence[str], context: CallContext
    ) -> Grades:
        """Grades of a batch: one call per reward function. Where the first abstains, nothing is
        right.
        """
        functions = self._functions()
        if not functions:
            return grade_by_row(self, examples, texts)
        parts = call_functions(self, functions, examples, texts, context)
        first = parts[next(iter(functions))]
        return Grades(parts=parts, correct=[s is not None and s >= self.correct_at for s in first])

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read for certain; functions may read others."""
        return (self.prompt_column, self.answer_column) if self.verifier else (self.prompt_column,)

    @property
    def _verifier(self) -> Callable[[str, str], bool]:
        return VERIFIERS[self.verifier or ""]

    def _gold(self, example: Example) -> str:
        """The answer as a text; for ``number`` without an exponent, and what follows GSM8K's mark
        ``####``.
        """
        value = example.fields[self.answer_column]
        if self.verifier != "number":
            return str(value)
        return (
            f"{Decimal(repr(value)):f}"
            if isinstance(value, float) and isfinite(value)
            else gold_text(str(value))
        )

    def _rewardable(self, example: Example) -> bool:
        """Whether the verifier takes the row's own answer for right; what reward functions say is
        theirs.
        """
        if self.verifier is None:
            return True
        gold = self._gold(example)
        body = last_answer(f"<answer> {gold} </answer>")
        return bool(gold.strip()) and body is not None and self._verifier(gold, body)

    def _functions(self) -> dict[str, TrlReward]:
        return {} if self.reward is None else named_rewards(self.reward, "task.reward")

    def _problem_column(self) -> str:
        return self.prompt_column

    def _source(self) -> Source:
        return replace(super()._source(), split_column=self.split_column)

    def _fields(self, row: Row, _: str) -> dict[str, Any]:
        if self.verifier is not None:
            check_columns(row.where, row.fields, self.answer_column)
        for name in ("prompts", "completions"):
            if name in row.fields:
                raise ValueError(
                    f"{row.where}: got a column {name!r}, which rewards are given by the trainer: "
                    "rename it"
                )
        prompt = row.fields[self.prompt_column]
        if not isinstance(prompt, str) and not _is_chat(prompt):
            got = ascii(prompt)[:60]
            raise ValueError(
                f"{row.where}: got {self.prompt_column} {got}, expected a text or a list of chat "
                "messages"
            )
        return row.fields


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
            for m in prompt
        )
    )
