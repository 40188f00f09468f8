"""A task of your own: the first number of the answer has to be the largest of three.

The shipped base plays Countdown, so its prompts look like this one, and its answers are
expressions. Their first number is the largest one in about 3 of 10.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import permutations

from unmaskrl.tasks import AnswerTask, Example

# Problems are split by the sum of their numbers modulo 5: no problem is in two splits.
SPLITS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}


@dataclass(frozen=True, kw_only=True)
class Largest(AnswerTask[int]):
    """Three different numbers up to ``highest``, which recipes set as ``task.highest=30``."""

    name = "largest"
    highest: int = 20

    def examples(self, split: str) -> list[Example]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rows = [
            n for n in permutations(range(1, self.highest + 1), 3) if sum(n) % 5 in SPLITS[split]
        ]
        random.Random(0).shuffle(rows)  # evaluations take the first ones
        return [Example(id="-".join(map(str, row)), fields={"numbers": list(row)}) for row in rows]

    def prompt(self, example: Example) -> list[dict[str, str]]:
        numbers = example.fields["numbers"]
        words = ["numbers", *map(str, numbers), "target", str(max(numbers) + 1)]
        return [{"role": "user", "content": " ".join(words)}]

    def reference(self, example: Example) -> str | None:
        return f"<answer> {max(example.fields['numbers'])} </answer>"

    def read(self, example: Example, body: str) -> int | None:
        found = re.search(r"[0-9]{1,9}", body)
        return int(found[0]) if found else None

    def solves(self, example: Example, answer: int) -> bool:
        return answer == max(example.fields["numbers"])
