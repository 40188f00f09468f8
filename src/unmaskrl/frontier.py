"""`unmaskrl frontier` (shell): accuracy against denoiser calls, for fixed quotas, fixed thresholds and the learned sampler.

The learned sampler has two controls: the best fixed gamma at equal calls (interpolated on the fixed gammas' frontier), and its
own gammas handed to the wrong prompts (shuffled): if it beats neither, it learned a constant.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .charts import COLOURS, style_axes
from .checkpoint import write_json
from .commands import load_parts, task_of
from .config import DecodeConfig
from .decoding import check_decode
from .evaluate import evaluate
from .rng import named_generator
from .terminal import PlainConsole
from .thresholds import GAMMAS, ThresholdHead
from .types import Rollout

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
KINDS = ("fixed steps", "fixed gamma", "threshold", "learned", "shuffled")
Setting = tuple[str, str, dict[str, Any], ThresholdHead | None]


def frontier_command(args: argparse.Namespace) -> int:
    """unmaskrl frontier."""
    if args.size < 2:
        raise ValueError(f"--size must be at least 2 problems, got {args.size}")
    for out in filter(None, (args.json, args.plot)):
        if not Path(out).parent.is_dir():
            raise ValueError(f"{out}: the folder {Path(out).parent} does not exist; make it first")
    result: dict[str, Any] = {key: getattr(args, key) for key in ("task", "split", "size", "seed", "temperature")}
    result["models"] = []
    console = PlainConsole()
    for model in args.models:
        args.model = model
        points = measure(args)
        result["models"].append({"model": model, "points": points, **verdict(points)})
        console.print(frontier_table(result["models"][-1]))
    if args.json:
        write_json(Path(args.json), result)
    if args.plot:
        frontier_png(result, Path(args.plot))
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One point per way of decoding: kind, label, accuracy with its 95% interval, mean calls per completion."""
    denoiser, tokenizer, settings, task, head = load_parts(args)
    task = task_of(args, task)
    examples = task.examples(args.split)[: args.size]
    plain = settings.model_copy(update={"exit_at": None})
    gammas = parse_gammas(args.gammas) if args.gammas else (head.grid if head else GAMMAS)
    ways, points = list(settings_of(plain, gammas, head)), []
    drawn: list[float] = []
    with Progress(console=PlainConsole(), transient=True) as bar:
        line = bar.add_task(escape(args.model), total=len(ways) + 2 * (head is not None))
        for kind, label, changes, chooser in ways:
            gamma = changes.pop("gammas", None)
            if kind == "shuffled":
                order = torch.randperm(len(drawn), generator=named_generator(args.seed, "shuffle")).tolist()
                gamma = [drawn[i] for i in order]
            kept: list[Rollout] = []
            evaluated = evaluate(
                denoiser,
                tokenizer,
                task,
                examples,
                settings_with(plain, changes),
                temperature=args.temperature,
                seed=args.seed,
                head=chooser,
                gammas=gamma,
                on_rollout=kept.append,
            )
            if kind == "learned":
                drawn = torch.cat([r.gamma for r in kept])[torch.cat([r.row_ids for r in kept]).argsort()].tolist()
            low, high = evaluated.interval
            nfe = evaluated.summary()["nfe"]
            point = {"kind": kind, "label": label, "accuracy": evaluated.accuracy, "low": low, "high": high, "nfe": nfe}
            points.append(point | ({"gammas": sorted(set(drawn))} if kind == "learned" else {}))
            bar.advance(line)
    return points


def parse_gammas(text: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--gammas: expected numbers such as 0,0.1,1, got {text!r}") from None


def settings_of(settings: DecodeConfig, gammas: Sequence[float], head: ThresholdHead | None) -> Iterator[Setting]:
    """(kind, label, changes of the decode settings, head) of every point."""
    steps = settings.gen_length
    while steps >= settings.gen_length // settings.block_length:
        yield "fixed steps", f"{steps} steps", {"select": "entropy", "steps": steps, "gamma": None}, None
        steps //= 2
    for gamma in gammas:
        yield "fixed gamma", f"{gamma:g}", {"select": "eb", "gamma": gamma}, None
    for tau in THRESHOLDS:
        yield "threshold", f"{tau:g}", {"select": "threshold", "gamma": tau}, None
    if head is not None:
        yield "learned", "learned", {"select": "eb", "gamma": None}, head
        yield "shuffled", "shuffled", {"select": "eb", "gamma": None}, head


def settings_with(settings: DecodeConfig, changes: dict[str, Any]) -> DecodeConfig:
    """Changed settings, checked."""
    changed = settings.model_copy(update=changes)
    c = changed
    check_decode(c.gen_length, c.block_length, c.steps, c.select, c.temperature, c.exit_at, c.gamma)
    return changed


def verdict(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learned sampler against the best fixed gamma at equal calls and against its shuffled self, in accuracy."""
    learned = next((p for p in points if p["kind"] == "learned"), None)
    if learned is None:
        return {}
    shuffled = next(p for p in points if p["kind"] == "shuffled")
    fixed = best_fixed([(p["nfe"], p["accuracy"]) for p in points if p["kind"] == "fixed gamma"], learned["nfe"])
    return {
        "fixed_at_equal_calls": fixed,
        "gain_over_fixed": learned["accuracy"] - fixed,
        "gain_over_shuffled": learned["accuracy"] - shuffled["accuracy"],
    }


def best_fixed(points: Sequence[tuple[float, float]], nfe: float) -> float:
    """Accuracy at ``nfe`` calls of the best mixture of two fixed gammas with that mean: the upper hull of (calls, accuracy).

    Outside the range of calls: the nearest end's best point.
    """
    inside = [a for n, a in points if n <= nfe]
    best = max(inside) if inside else min(points)[1]  # never worse than a gamma that takes fewer calls
    for n1, a1 in points:
        for n2, a2 in points:
            if n1 < nfe < n2:
                best = max(best, a1 + (a2 - a1) * (nfe - n1) / (n2 - n1))
    return best


def frontier_table(result: dict[str, Any]) -> Table:
    """Points in order of calls; the verdict below."""
    table = Table("decoding", "", "calls", "accuracy", "95%", title=result["model"], caption_justify="left")
    for p in sorted(result["points"], key=lambda p: (KINDS.index(p["kind"]), p["nfe"])):
        interval = f"{100 * p['low']:.1f} to {100 * p['high']:.1f}"
        table.add_row(p["kind"], p["label"], f"{p['nfe']:.1f}", f"{100 * p['accuracy']:.1f}%", interval)
    if "gain_over_fixed" in result:
        table.caption = (
            f"learned against the best fixed gammas at equal calls: {100 * result['gain_over_fixed']:+.1f} points; "
            f"against its gammas on the wrong prompts: {100 * result['gain_over_shuffled']:+.1f}"
        )
    return table


def frontier_png(result: dict[str, Any], path: Path) -> None:
    """Accuracy against calls, one panel per model, a colour per kind, labels on the points, 95% intervals."""
    from matplotlib.figure import Figure

    models = result["models"]
    figure = Figure(figsize=(6.4 * len(models), 4.8), layout="constrained")
    for n, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), n + 1)
        style_axes(axes, lambda value: f"{value:g}")
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            points = sorted((p for p in model["points"] if p["kind"] == kind), key=lambda p: p["nfe"])
            if not points:
                continue
            x, y = [p["nfe"] for p in points], [100 * p["accuracy"] for p in points]
            bars = [[100 * (p["accuracy"] - p["low"]) for p in points], [100 * (p["high"] - p["accuracy"]) for p in points]]
            alone = kind in ("learned", "shuffled")
            axes.errorbar(x, y, yerr=bars, color=colour, lw=0 if alone else 1.4, elinewidth=0.8, alpha=0.9, capsize=2)
            axes.plot(x, y, "*" if alone else "o", color=colour, ms=13 if alone else 4, label=kind, zorder=3)
            for p in [] if alone else points:
                axes.annotate(
                    p["label"], (p["nfe"], 100 * p["accuracy"]), (4, 4), textcoords="offset points", size=7, color=colour
                )
        axes.set(xlabel="denoiser calls per completion", ylabel="accuracy, %", title=model["model"])
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
