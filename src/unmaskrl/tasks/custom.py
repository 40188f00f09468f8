"""Tasks of the user's own: rows of a JSONL file (or of the hub), judged by a reward function or a
built-in verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from math import isfinite
from typing import Any

from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    Example,
    RewardPart,
    answer_spans,
    check_choice,
    last_answer,
    only_answer,
)
from unmaskrl.tasks.functions import load_function
from unmaskrl.tasks.math.answers import (
    boxed_spans,
    final_answer,
    gold_text,
    merged_spans,
    parse_number,
)
from unmaskrl.tasks.math.equivalence import check_installed, equivalent
from unmaskrl.tasks.rewards import CallContext, Grades, Parts, call_functions, grade_by_row
from unmaskrl.tasks.sources import Row, Source, check_columns, examples_of, notes_of


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
class Jsonl:
    """Problems of your own: ``prompt_column`` holds a text or chat messages, other columns are what
    rewards read.

    Judged either by ``reward``, one or several 'package.module:function' of TRL's contract
    (``correct`` means that the first gives at least ``correct_at``), or by a ``verifier`` ("exact",
    "number", "math") that compares the last <answer>...</answer> with ``answer_column``.
    ``reference_column`` holds right completions for anchors. Splits: ``test_data``,
    ``split_column``, a folder, or by hash (docs/tasks.md). Fields: the row's columns. Raises
    ValueError.
    """

    data: str = ""
    test_data: str | None = None
    config: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    reference_column: str | None = None
    split_column: str | None = None
    system: str | None = None
    reward: str | Sequence[str] | None = None
    verifier: str | None = None
    correct_at: float = 1.0

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.verifier is None):
            raise ValueError(
                "expected either reward (package.module:function) or verifier "
                f"({', '.join(VERIFIERS)}), "
                f"got {'neither' if self.reward is None else 'both'}: set one of them"
            )
        if self.verifier is not None:
            check_choice("verifier", self.verifier, tuple(VERIFIERS))
        if self.verifier == "math":
            check_installed()
        self._source()
        for name in self._functions():
            load_function(name, "task.reward")

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError for data that cannot be read, naming file and
        line.
        """
        return examples_of(self._source(), split, self._fields, self._rewardable)

    @property
    def notes(self) -> list[str]:
        """What to tell of rows that were left out."""
        return notes_of(self._source())

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

    def correct(self, example: Example, text: str) -> bool:
        """What the verifier says of the last answer; or whether the first reward function gives
        ``correct_at``.
        """
        if self.verifier is None:
            return self.grade([example], [text], CallContext()).correct[0]
        body = last_answer(text)
        return body is not None and VERIFIERS[self.verifier](self._gold(example), body)

    def grade(
        self, examples: Sequence[Example], texts: Sequence[str], context: CallContext
    ) -> Grades:
        """Parts and verdicts of a batch: one call per reward function. Where the first abstains,
        nothing is right.
        """
        names = tuple(dict.fromkeys(self._functions()))
        if not names:
            return grade_by_row(self, examples, texts)
        parts = self._call(names, examples, texts, context)
        return Grades(
            parts=parts, correct=[s is not None and s >= self.correct_at for s in parts[names[0]]]
        )

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "jsonl"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read for certain; functions may read others."""
        return (self.prompt_column, self.answer_column) if self.verifier else (self.prompt_column,)

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1, "format": 0.1} of a verifier; one part per reward function, by its
        name.
        """
        if self.verifier is not None:
            return {
                "correct": lambda example, text: float(self.correct(example, text)),
                "format": _format_reward,
            }
        return {name: partial(self._score, name) for name in self._functions()}

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
        return bool(gold.strip()) and body is not None and VERIFIERS[self.verifier](gold, body)

    def _functions(self) -> tuple[str, ...]:
        return (self.reward,) if isinstance(self.reward, str) else tuple(self.reward or ())

    def _source(self) -> Source:
        return Source(
            task=self.name,
            data=self.data,
            test_data=self.test_data,
            config=self.config,
            column=self.prompt_column,
            split_column=self.split_column,
        )

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

    def _score(self, name: str, example: Example, text: str) -> float:
        """One reward of one completion. ``grade`` gives those of a batch in one call."""
        return self._call((name,), [example], [text], CallContext())[name][0] or 0.0

    def _call(
        self,
        names: Sequence[str],
        examples: Sequence[Example],
        texts: Sequence[str],
        context: CallContext,
    ) -> Parts:
        functions = {name: load_function(name, "task.reward") for name in names}
        return call_functions(self, functions, examples, texts, context)


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
            for m in prompt
        )
    )


def _format_reward(_: Example, text: str) -> float:
    return 0.0 if only_answer(text) is None else FORMAT_REWARD
