"""A reward of your own, beside what the task gives: a part of a point for a near miss."""

from __future__ import annotations

import re
from typing import Any

from unmaskrl.tasks import completion_text


def near(
    completions: list[list[dict[str, str]]], numbers: list[list[int]], **columns: Any
) -> list[float]:
    """0.3 times (the answer's first number / the largest of the three); 0 if it is none of them.

    ``numbers`` is a field of the problems, ``columns`` has the others: a list, one per completion.
    """
    scores = []
    for completion, three in zip(completions, numbers, strict=True):
        _, tag, answer = completion_text(completion).rpartition("<answer>")
        found = re.search(r"[0-9]{1,9}", answer) if tag else None
        number = int(found[0]) if found else 0
        scores.append(0.3 * number / max(three) if number in three else 0.0)
    return scores
