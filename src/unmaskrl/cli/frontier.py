"""`unmaskrl frontier`: accuracy against denoiser calls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.frontier import measure, verdict
from ..evaluation.sweep import Parts
from ..reporting.frontier import frontier_png, frontier_table
from ..utils.files import write_json
from ..utils.terminal import PlainConsole
from .common import load_parts, task_of


def frontier_command(args: argparse.Namespace) -> int:
    """unmaskrl frontier."""
    if args.size < 2:
        raise ValueError(f"--size must be at least 2 problems, got {args.size}")
    for out in filter(None, (args.json, args.plot)):
        if not Path(out).parent.is_dir():
            raise ValueError(f"{out}: the folder {Path(out).parent} does not exist; make it first")
    result: dict[str, Any] = {
        key: getattr(args, key) for key in ("task", "split", "size", "seed", "temperature")
    }
    result["models"] = []
    console = PlainConsole()
    for model in args.models:
        args.model = model
        denoiser, tokenizer, settings, task, head = load_parts(args)
        task = task_of(args, task)
        examples = task.examples(args.split)[: args.size]
        points = measure(args, Parts(denoiser, tokenizer, task, examples, head), settings)
        result["models"].append({"model": model, "points": points, **verdict(points)})
        console.print(frontier_table(result["models"][-1]))
    if args.json:
        write_json(Path(args.json), result)
    if args.plot:
        frontier_png(result, Path(args.plot))
    return 0
