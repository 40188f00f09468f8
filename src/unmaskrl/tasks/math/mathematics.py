r"""MATH (arXiv 2103.03874) and sets like it: problems whose answer is a LaTeX expression in
``\boxed{...}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    PROTOCOLS,
    Example,
    RewardPart,
    answer_spans,
    check_choice,
    last_answer,
    only_answer,
)
from unmaskrl.tasks.d1 import d1_math
from unmaskrl.tasks.math.answers import boxed_spans, final_answer, last_boxed, merged_spans
from unmaskrl.tasks.math.equivalence import check_installed, equivalent
from unmaskrl.tasks.math.units import words_of
from unmaskrl.tasks.sources import Row, Source, check_columns, examples_of, notes_of

_STRICT = (
    "{problem}\n\nWork it out step by step. Then write the final answer as \\boxed{{...}} inside "
    "<answer></answer>, "
    "for example <answer> \\boxed{{42}} </answer>."
)


@dataclass(frozen=True, kw_only=True)
class MathProblems:
    r"""Problems with columns ``problem`` and ``solution`` (worked, its answer in ``\boxed{}``) or
    ``answer`` (LaTeX) or both.

    ``data``, ``test_data``, ``config``, ``protocol`` as in GSM8K. Fields: the columns, answer (from
    the solution where the row has none), split, and kind (the difficulty, e.g. "level5") where the
    row has a level. Raises ValueError, also if math-verify is missing ("strict" needs it).
    """

    data: str = "ankner/math-500"
    test_data: str | None = None
    config: str | None = None
    protocol: str = "strict"

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        if self.protocol == "strict":
            check_installed()

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError for data that cannot be read, naming file and
        line.
        """
        return examples_of(self._source, split, _fields, self._rewardable)

    @property
    def notes(self) -> list[str]:
        """What to tell of rows that were left out."""
        return notes_of(self._source)

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The problem and what to do; under d1 training and evaluation have different prompts, as
        published.
        """
        problem = example.fields["problem"]
        if self.protocol == "strict":
            return [{"role": "user", "content": _STRICT.format_map({"problem": problem})}]
        return d1_math.published_prompt(example, problem, "math")

    def reference(self, example: Example) -> str | None:
        """The worked solution (if there is one) in the layout that the prompt asks for."""
        worked = (example.fields.get("solution") or "").strip()
        gold = example.fields["answer"]
        if self.protocol == "d1":
            return f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n\\boxed{{{gold}}}\n</answer>\n"
        return f"{worked}\n<answer> \\boxed{{{gold}}} </answer>".lstrip()

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        r"""Character spans (start, end) of the insides of the answer tags and of every balanced
        ``\boxed{...}``, merged.
        """
        return merged_spans([*answer_spans(text), *boxed_spans(text)])

    def correct(self, example: Example, text: str) -> bool:
        """Whether the last answer block means the gold answer; under d1, what its evaluation would
        say.
        """
        gold = example.fields["answer"]
        if self.protocol == "d1":
            return d1_math.math_correct_for_evaluation(gold, text)
        body = last_answer(text)
        return body is not None and equivalent(
            gold, final_answer(body), words_of(example.fields["problem"])
        )

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "math"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read."""
        return ("problem", "answer")

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1, "format": 0.1} for one answer block with a box; under d1 the two published
        parts.
        """
        if self.protocol == "strict":
            return {"correct": self._correct_reward, "format": _format_reward}
        return {"correct": _d1_correct, "format": lambda _, text: d1_math.math_format(text)}

    @property
    def _source(self) -> Source:
        return Source(
            task=self.name,
            data=self.data,
            test_data=self.test_data,
            config=self.config,
            column="problem",
        )

    def _rewardable(self, example: Example) -> bool:
        reference = self.reference(example)
        return reference is not None and (
            self.correct(example, reference) or self.rewards["correct"](example, reference) > 0
        )

    def _correct_reward(self, example: Example, text: str) -> float:
        return float(self.correct(example, text))


def _format_reward(_: Example, text: str) -> float:
    body = only_answer(text)
    return 0.0 if body is None or last_boxed(body) is None else FORMAT_REWARD


def _d1_correct(example: Example, text: str) -> float:
    return 2.0 * d1_math.math_correct_for_training(example.fields["answer"], text)


def _fields(row: Row, split: str) -> dict[str, Any]:
    answer = row.fields.get("answer")
    solution = row.fields.get("solution")
    if answer is None:
        check_columns(row.where, row.fields, "solution")
        answer = last_boxed(str(solution))
        if answer is None:
            raise ValueError(
                f"{row.where}: got a solution without a closed \\boxed{{...}} and no answer: add "
                "the answer"
            )
    if not str(answer).strip():
        raise ValueError(
            f"{row.where}: got an empty answer, expected LaTeX such as '42': add it or leave the "
            "row out"
        )
    digits = "".join(filter(str.isdigit, str(row.fields.get("level", ""))))
    kind = {"kind": f"level{digits}"} if digits else {}
    return {**row.fields, **kind, "answer": str(answer), "split": split}
