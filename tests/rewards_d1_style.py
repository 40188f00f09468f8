# ruff: noqa: B905, T201 (as such files are written)
"""Reward functions as files for d1's trainer have them, written for these tests: chats in,
``run_name`` demanded.
"""

from __future__ import annotations

import random
import re

import numpy as np


def answer_of(completion):
    found = re.findall(r"<answer>(.*?)</answer>", completion[0]["content"], re.DOTALL)
    return found[-1].strip() if found else None


def right_number(prompts, completions, answer, step=None, run_name=None, **kwargs) -> list[float]:
    asked = prompts[0][-1]["content"]
    assert isinstance(asked, str) and prompts[0][-1]["role"] == "user"
    return [2.0 if answer_of(c) == gold else 0.0 for c, gold in zip(completions, answer)]


def digits_only(completions, **kwargs) -> list[float]:
    return [0.5 if (answer_of(c) or "").isdigit() else 0.0 for c in completions]


def shorter_is_better(completions, **kwargs):
    return [-len(completion[0]["content"]) for completion in completions]


def reaches_target(prompts, completions, run_name, step=None, rank=None, **kwargs) -> list[float]:
    if (
        isinstance(completions[0], list)
        and isinstance(completions[0][0], dict)
        and "content" in completions[0][0]
    ):
        texts = [completion[0]["content"] for completion in completions]
    else:
        texts = completions
    assert run_name
    scores = []
    for row, _ in enumerate(texts):
        if np.random.rand() < 0.01 or random.random() < 0.01:
            print(f"step {step}: target {kwargs['target'][row]} of {kwargs['numbers'][row]}")
        found = answer_of(completions[row])
        used = sorted(int(number) for number in re.findall(r"\d+", found or ""))
        scores.append(
            0 if found is None else 1.0 if used == sorted(kwargs["numbers"][row]) else 0.1
        )
    return scores
