r"""MATH (arXiv 2103.03874) and sets like it: problems whose answer is a LaTeX expression in
``\boxed{...}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unmaskrl.tasks.base import AnswerJudge, Example, Grade, answer_spans
from unmaskrl.tasks.d1 import d1_math
from unmaskrl.tasks.math.answers import boxed_spans, final_answer, last_boxed, merged_spans
from unmaskrl.tasks.math.equivalence import check_installed, equivalent
from unmaskrl.tasks.math.units import words_of
from unmaskrl.tasks.protocols import PublishedRules, Rules, StrictRules, WrittenTask
from unmaskrl.tasks.sources import Row, check_columns

_STRICT = (
    "{problem}\n\nWork it out step by step. Then write the final answer as \\boxed{{...}} inside "
    "<answer></answer>, "
    "for example <answer> \\boxed{{42}} </answer>."
)


class StrictMath(AnswerJudge[str], StrictRules):
    """Our rules: the last answer block means the gold answer."""

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The problem and what to do."""
        problem = example.fields["problem"]
        return [{"role": "user", "content": _STRICT.format_map({"problem": problem})}]

    def reference(self, example: Example) -> str | None:
        """The worked solution (if there is one), then the answer in box and tags."""
        gold = example.fields["answer"]
        return f"{_worked(example)}\n<answer> \\boxed{{{gold}}} </answer>".lstrip()

    def read(self, example: Example, body: str) -> str | None:
        """The body itself: what it means is for ``equivalent`` to say."""
        return body

    def solves(self, example: Example, answer: str) -> bool:
        """Whether the body, or its box, means the gold answer."""
        words = words_of(example.fields["problem"])
        return equivalent(example.fields["answer"], final_answer(answer), words)

    def well_formed(self, body: str, answer: str | None) -> bool:
        """Whether the body has a box."""
        return last_boxed(body) is not None


class PublishedMath(PublishedRules):
    """d1's rules: the two parts of its training reward, the verdict of its evaluation."""

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The prompt of training, or the other one of evaluation."""
        return d1_math.published_prompt(example, example.fields["problem"], "math")

    def reference(self, example: Example) -> str | None:
        """The worked solution and the box in the published format."""
        box = f"\\boxed{{{example.fields['answer']}}}"
        worked = _worked(example)
        return f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n{box}\n</answer>\n"

    def grade(self, example: Example, text: str) -> Grade:
        """The reward of training and the verdict of evaluation."""
        gold = example.fields["answer"]
        trained = d1_math.math_correct_for_training(gold, text)
        return Grade(
            d1_math.math_correct_for_evaluation(gold, text),
            {"correct": 2.0 * trained, "format": d1_math.math_format(text)},
        )


def _worked(example: Example) -> str:
    return (example.fields.get("solution") or "").strip()


@dataclass(frozen=True, kw_only=True)
class MathProblems(WrittenTask):
    r"""Problems with columns ``problem`` and ``solution`` (worked, its answer in ``\boxed{}``) or
    ``answer`` (LaTeX) or both.

    ``data``, ``test_data``, ``config``, ``protocol`` as in GSM8K. Fields: the columns, answer (from
    the solution where the row has none), split, and kind (the difficulty, e.g. "level5") where the
    row has a level. Raises ValueError, also if math-verify is missing ("strict" needs it).
    """

    name = "math"

    data: str = "ankner/math-500"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rules, StrictMath):
            check_installed()

    def _protocols(self) -> dict[str, Rules]:
        return {"strict": StrictMath(), "d1": PublishedMath()}

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        r"""Character spans (start, end) of the insides of the answer tags and of every balanced
        ``\boxed{...}``, merged.
        """
        return merged_spans([*answer_spans(text), *boxed_spans(text)])

    def _problem_column(self) -> str:
        return "problem"

    def _fields(self, row: Row, split: str) -> dict[str, Any]:
        answer = row.fields.get("answer")
        solution = row.fields.get("solution")
        if answer is None:
            check_columns(row.where, row.fields, "solution")
            answer = last_boxed(str(solution))
            if answer is None:
                raise ValueError(
                    f"{row.where}: got a solution without a closed \\boxed{{...}} and no "
                    "answer: add the answer"
                )
        if not str(answer).strip():
            raise ValueError(
                f"{row.where}: got an empty answer, expected LaTeX such as '42': add it or "
                "leave the row out"
            )
        digits = "".join(filter(str.isdigit, str(row.fields.get("level", ""))))
        kind = {"kind": f"level{digits}"} if digits else {}
        return {**row.fields, **kind, "answer": str(answer), "split": split}
