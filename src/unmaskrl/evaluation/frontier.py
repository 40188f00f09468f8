"""Accuracy against denoiser calls, for fixed quotas, fixed thresholds and the learned sampler.

The learned sampler has two controls: the best fixed gamma at equal calls (interpolated on the fixed
gammas' frontier), and its own gammas handed to the wrong prompts (shuffled): if it beats neither,
it learned a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress

from ..core.decoding import check_decode, whole_blocks
from ..core.rng import named_generator
from ..core.threshold_head import GAMMAS, ThresholdHead
from ..core.types import Rollout
from ..recipes.registry import selection_rule
from ..recipes.schema import DecodeConfig
from ..utils.terminal import PlainConsole
from .evaluate import EvalRequest, evaluate

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
KINDS = ("fixed steps", "fixed gamma", "threshold", "learned", "shuffled")
Setting = tuple[str, str, dict[str, Any], ThresholdHead | None]


def measure(
    request: EvalRequest, *, name: str, gammas: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """One point per way of decoding the request: kind, label, accuracy with its 95% interval, mean
    calls per completion.
    """
    head = request.head
    plain = request.settings.model_copy(update={"exit_at": None})
    if gammas is None:
        gammas = head.grid if head else GAMMAS
    ways = list(settings_of(plain, gammas, head))
    points = []
    drawn: list[float] = []
    with Progress(console=PlainConsole(), transient=True) as bar:
        line = bar.add_task(escape(name), total=len(ways) + 2 * (head is not None))
        for kind, label, changes, chooser in ways:
            gamma = changes.pop("gammas", None)
            if kind == "shuffled":
                order = torch.randperm(
                    len(drawn), generator=named_generator(request.seed, "shuffle")
                ).tolist()
                gamma = [drawn[i] for i in order]
            kept: list[Rollout] = []
            evaluated = evaluate(
                replace(
                    request, settings=settings_with(plain, changes), head=chooser, gammas=gamma
                ),
                on_rollout=kept.append,
            )
            if kind == "learned":
                drawn = torch.cat([r.gamma for r in kept])[
                    torch.cat([r.row_ids for r in kept]).argsort()
                ].tolist()
            low, high = evaluated.interval
            nfe = evaluated.summary()["nfe"]
            point = {
                "kind": kind,
                "label": label,
                "accuracy": evaluated.accuracy,
                "low": low,
                "high": high,
                "nfe": nfe,
            }
            points.append(point | ({"gammas": sorted(set(drawn))} if kind == "learned" else {}))
            bar.advance(line)
    return points


def parse_gammas(text: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--gammas: expected numbers such as 0,0.1,1, got {text!r}") from None


def settings_of(
    settings: DecodeConfig, gammas: Sequence[float], head: ThresholdHead | None
) -> Iterator[Setting]:
    """(kind, label, changes of the decode settings, head) of every point."""
    steps = settings.gen_length
    while steps >= len(whole_blocks(settings.gen_length, settings.block_length)):
        yield (
            "fixed steps",
            f"{steps} steps",
            {"select": "entropy", "steps": steps, "gamma": None},
            None,
        )
        steps //= 2
    for gamma in gammas:
        yield "fixed gamma", f"{gamma:g}", {"select": "eb", "gamma": gamma}, None
    for tau in THRESHOLDS:
        yield "threshold", f"{tau:g}", {"select": "confidence_threshold", "gamma": tau}, None
    if head is not None:
        yield "learned", "learned", {"select": "eb", "gamma": None}, head
        yield "shuffled", "shuffled", {"select": "eb", "gamma": None}, head


def settings_with(settings: DecodeConfig, changes: dict[str, Any]) -> DecodeConfig:
    """Changed settings, checked."""
    changed = settings.model_copy(update=changes)
    c = changed
    rule = selection_rule(c.select)
    check_decode(
        c.gen_length, c.block_length, c.steps, rule, c.temperature, c.exit_at, c.gamma, cut=True
    )
    return changed


def verdict(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learned sampler against the best fixed gamma at equal calls and against its shuffled
    self, in accuracy.
    """
    learned = next((p for p in points if p["kind"] == "learned"), None)
    if learned is None:
        return {}
    shuffled = next(p for p in points if p["kind"] == "shuffled")
    fixed = best_fixed(
        [(p["nfe"], p["accuracy"]) for p in points if p["kind"] == "fixed gamma"], learned["nfe"]
    )
    return {
        "fixed_at_equal_calls": fixed,
        "gain_over_fixed": learned["accuracy"] - fixed,
        "gain_over_shuffled": learned["accuracy"] - shuffled["accuracy"],
    }


def best_fixed(points: Sequence[tuple[float, float]], nfe: float) -> float:
    """Accuracy at ``nfe`` calls of the best mixture of two fixed gammas with that mean: the upper
    hull of (calls, accuracy).

    Outside the range of calls: the nearest end's best point.
    """
    inside = [a for n, a in points if n <= nfe]
    # never worse than a gamma that takes fewer calls
    best = max(inside) if inside else min(points)[1]
    for n1, a1 in points:
        for n2, a2 in points:
            if n1 < nfe < n2:
                best = max(best, a1 + (a2 - a1) * (nfe - n1) / (n2 - n1))
    return best
