"""What runs in the guard's worker for the task math: the only place that imports math-verify and sympy."""

from __future__ import annotations

import importlib
import logging
from typing import Any

# Before the guard's limits, which count memory and time from here.
_MATH: Any = importlib.import_module("math_verify")
_RANDOM: Any = importlib.import_module("sympy.core.random")
for _name in ("parser", "grader"):  # they warn, once a process, that they have no time limit: the guard has
    logging.getLogger(f"math_verify.{_name}").setLevel(logging.ERROR)


def verify_latex(gold: str, answer: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; whatever it raises is the guard's default."""
    _RANDOM.seed(0)  # it tests equality at random points, and verdicts must not depend on what came before
    config = [_MATH.LatexExtractionConfig(boxed_match_priority=0)]
    limits: Any = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": 0}
    sides = [_MATH.parse(f"\\boxed{{{side}}}", config, **limits) for side in (gold, answer)]
    return all(map(bool, sides)) and bool(_MATH.verify(*sides, timeout_seconds=None))
