"""GSM8K: grade-school word problems (arXiv 2110.14168) whose answer is one number, from the hub or
a JSONL file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from unmaskrl.tasks.base import AnswerJudge, Example, Grade
from unmaskrl.tasks.d1 import d1_math
from unmaskrl.tasks.math.answers import final_answer, gold_text, parse_number
from unmaskrl.tasks.math.units import words_of
from unmaskrl.tasks.protocols import PublishedRules, Rules, StrictRules, WrittenTask
from unmaskrl.tasks.sources import Row, check_columns

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_STRICT = (
    "{question}\n\nWork it out step by step. Then write the final number, and nothing else, inside "
    "<answer></answer>, "
    "for example <answer> 42 </answer>."
)


def worked_text(answer: str) -> str:
    """The worked solution in an answer column without calculator annotations (``<<2*3=6>>``); empty
    if there is none.
    """
    return _ANNOTATION.sub("", answer.split("####")[0]).strip() if "####" in answer else ""


class StrictGSM8K(AnswerJudge[Fraction], StrictRules):
    """Our rules: the number in the last answer block is the gold one."""

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The question and what to do."""
        question = example.fields["question"]
        return [{"role": "user", "content": _STRICT.format_map({"question": question})}]

    def reference(self, example: Example) -> str | None:
        """The worked solution, then the number in its tags."""
        answer = example.fields["answer"]
        return f"{worked_text(answer)}\n<answer> {gold_text(answer)} </answer>".lstrip()

    def read(self, example: Example, body: str) -> Fraction | None:
        """The number of an answer's body; a unit is one only if the question has the word."""
        return parse_number(final_answer(body), units=words_of(example.fields["question"]))

    def solves(self, example: Example, answer: Fraction) -> bool:
        """Whether the number is the gold one."""
        return answer == parse_number(gold_text(example.fields["answer"]))


# The parts of d1's reward that look at the text alone.
_PUBLISHED_FORMATS: dict[str, Callable[[str], float]] = {
    "integer": lambda text: 0.5 * d1_math.tagged(text).isdigit(),
    "strict_format": d1_math.strict_format,
    "soft_format": d1_math.soft_format,
    "xml_count": d1_math.xml_count,
}


class PublishedGSM8K(PublishedRules):
    """d1's rules: the five parts of its training reward, the verdict of its evaluation."""

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The prompt of training, or the other one of evaluation."""
        return d1_math.published_prompt(example, example.fields["question"], "gsm8k")

    def reference(self, example: Example) -> str | None:
        """The worked solution and the number in the published format."""
        answer = example.fields["answer"]
        worked = worked_text(answer)
        return f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n{gold_text(answer)}\n</answer>\n"

    def grade(self, example: Example, text: str) -> Grade:
        """The reward of training and the verdict of evaluation."""
        answer = gold_text(example.fields["answer"])
        gold = d1_math.gsm8k_gold(f"#### {answer}")
        parts = {"correct": 2.0 * (d1_math.tagged(text) == answer)}
        parts |= {name: part(text) for name, part in _PUBLISHED_FORMATS.items()}
        return Grade(gold is not None and d1_math.gsm8k_answer(text) == gold, parts)


@dataclass(frozen=True, kw_only=True)
class GSM8K(WrittenTask):
    """Word problems with columns ``question`` and ``answer`` (a worked solution that ends in
    ``#### 42``, or the number).

    ``data``: a hub id (with ``config``), a JSONL file, or a folder with train.jsonl,
    validation.jsonl, test.jsonl; ``test_data``: another source of the test problems. ``protocol``:
    "strict", or "d1" for the published prompts, rewards and parsers with their quirks
    (docs/tasks.md). Fields: the columns, and split. Raises ValueError.
    """

    name = "gsm8k"

    data: str = "openai/gsm8k"
    config: str | None = "main"

    def _protocols(self) -> dict[str, Rules]:
        return {"strict": StrictGSM8K(), "d1": PublishedGSM8K()}

    def _problem_column(self) -> str:
        return "question"

    def _fields(self, row: Row, split: str) -> dict[str, Any]:
        check_columns(row.where, row.fields, "answer")
        answer = str(row.fields["answer"])
        if parse_number(gold_text(answer)) is None:
            raise ValueError(
                f"{row.where}: got answer {answer[-60:]!a}, expected one that ends in '#### 42'"
            )
        return {**row.fields, "answer": answer, "split": split}
