"""`unmaskrl frontier`: accuracy against denoiser calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.frontier import measure, parse_gammas, verdict
from ..reporting.frontier import frontier_png, frontier_table
from ..utils.files import write_json
from ..utils.terminal import PlainConsole
from .arguments import FrontierArguments
from .common import load_parts, request_of


def frontier_command(args: FrontierArguments) -> int:
    """unmaskrl frontier."""
    if args.size < 2:
        raise ValueError(f"--size must be at least 2 problems, got {args.size}")
    for out in filter(None, (args.json, args.plot)):
        if not Path(out).parent.is_dir():
            raise ValueError(f"{out}: the folder {Path(out).parent} does not exist; make it first")
    result: dict[str, Any] = {
        key: getattr(args, key)
        for key in ("task", "split", "size", "seed", "temperature", "top_k", "top_p")
    }
    result["models"] = []
    console = PlainConsole()
    changes = [word for word in args.overrides if "=" in word]
    more = [word for word in args.overrides if "=" not in word]
    gammas = parse_gammas(args.gammas) if args.gammas else None
    for model in (args.model, *more):
        own = replace(args, model=model, overrides=changes)
        request = request_of(own, load_parts(own), args.split, args.size)
        points = measure(request, name=model, gammas=gammas)
        result["models"].append({"model": model, "points": points, **verdict(points)})
        console.print(frontier_table(result["models"][-1]))
    if args.json:
        write_json(Path(args.json), result)
        console.print(f"wrote {args.json}", soft_wrap=True)
    if args.plot:
        frontier_png(result, Path(args.plot))
        console.print(f"wrote {args.plot}", soft_wrap=True)
    return 0
