"""GSM8K: grade-school word problems (arXiv 2110.14168) whose answer is one number, from the hub or
a JSONL file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
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
from unmaskrl.tasks.math.answers import final_answer, gold_text, parse_number
from unmaskrl.tasks.math.units import words_of
from unmaskrl.tasks.sources import Row, Source, check_columns, examples_of, notes_of

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


@dataclass(frozen=True, kw_only=True)
class GSM8K:
    """Word problems with columns ``question`` and ``answer`` (a worked solution that ends in
    ``#### 42``, or the number).

    ``data``: a hub id (with ``config``), a JSONL file, or a folder with train.jsonl,
    validation.jsonl, test.jsonl; ``test_data``: another source of the test problems. ``protocol``:
    "strict", or "d1" for the published prompts, rewards and parsers with their quirks
    (docs/tasks.md). Fields: the columns, and split. Raises ValueError.
    """

    data: str = "openai/gsm8k"
    test_data: str | None = None
    config: str | None = "main"
    protocol: str = "strict"

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)

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
        """The question and what to do; under d1 training and evaluation have different prompts, as
        published.
        """
        question = example.fields["question"]
        if self.protocol == "strict":
            return [{"role": "user", "content": _STRICT.format_map({"question": question})}]
        return d1_math.published_prompt(example, question, "gsm8k")

    def reference(self, example: Example) -> str | None:
        """The worked solution in the layout that the prompt asks for."""
        answer = example.fields["answer"]
        worked = worked_text(answer)
        gold = gold_text(answer)
        if self.protocol == "d1":
            return f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n{gold}\n</answer>\n"
        return f"{worked}\n<answer> {gold} </answer>".lstrip()

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        return answer_spans(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the number in the last answer block is the gold one; under d1, what its
        evaluation would say.
        """
        if self.protocol == "d1":
            gold = d1_math.gsm8k_gold(f"#### {gold_text(example.fields['answer'])}")
            return gold is not None and d1_math.gsm8k_answer(text) == gold
        value = _value(example, last_answer(text))
        return value is not None and value == parse_number(gold_text(example.fields["answer"]))

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "gsm8k"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read."""
        return ("question", "answer")

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1, "format": 0.1} for one answer block with a number; under d1 the five
        published parts.
        """
        if self.protocol == "strict":
            return {"correct": self._correct_reward, "format": self._format_reward}
        return {
            "correct": _d1_correct,
            "integer": lambda _, text: 0.5 * d1_math.tagged(text).isdigit(),
            "strict_format": lambda _, text: d1_math.strict_format(text),
            "soft_format": lambda _, text: d1_math.soft_format(text),
            "xml_count": lambda _, text: d1_math.xml_count(text),
        }

    @property
    def _source(self) -> Source:
        return Source(
            task=self.name,
            data=self.data,
            test_data=self.test_data,
            config=self.config,
            column="question",
        )

    def _rewardable(self, example: Example) -> bool:
        reference = self.reference(example)
        return reference is not None and (
            self.correct(example, reference) or self.rewards["correct"](example, reference) > 0
        )

    def _correct_reward(self, example: Example, text: str) -> float:
        return float(self.correct(example, text))

    def _format_reward(self, example: Example, text: str) -> float:
        return 0.0 if _value(example, only_answer(text)) is None else FORMAT_REWARD


def _fields(row: Row, split: str) -> dict[str, Any]:
    check_columns(row.where, row.fields, "answer")
    answer = str(row.fields["answer"])
    if parse_number(gold_text(answer)) is None:
        raise ValueError(
            f"{row.where}: got answer {answer[-60:]!a}, expected one that ends in '#### 42'"
        )
    return {**row.fields, "answer": answer, "split": split}


def _value(example: Example, body: str | None) -> Fraction | None:
    """The number of an answer's body; a unit is one only if the question has the word."""
    return (
        None
        if body is None
        else parse_number(final_answer(body), units=words_of(example.fields["question"]))
    )


def _d1_correct(example: Example, text: str) -> float:
    return 2.0 * (d1_math.tagged(text) == gold_text(example.fields["answer"]))
