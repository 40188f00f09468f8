"""`unmaskrl eval`: one model, one task, any number of decode settings and seeds."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import EvalRequest
from ..evaluation.item_log import (
    ItemLog,
    described_model,
    described_problems,
    versions,
)
from ..evaluation.sweep import (
    Way,
    check_repeats,
    decode_missing,
    entry,
    parse_seeds,
    parse_ways,
    pooled,
)
from ..recipes.load import parse_overrides
from ..reporting.tables import eval_table, ways_table
from ..training.rollouts.reward_trial import try_rewards
from ..utils.files import check_output, write_json
from ..utils.lock import holding
from ..utils.terminal import PlainConsole
from .arguments import EvalArguments
from .common import check_counts, load_parts, request_of


def eval_command(args: EvalArguments) -> int:
    """unmaskrl eval."""
    check_counts(args)
    for option, path in (("--json", args.json), ("--items", args.items)):
        if path:
            check_output(path, option)
    seeds = [args.seed] if args.seeds is None else parse_seeds(args.seeds)
    parts = load_parts(args)
    request = request_of(args, parts, args.split, args.size)
    request = replace(request, samples=args.samples, batch_size=args.batch_size)
    task = request.task
    for note in task.notes:
        PlainConsole().print(note, highlight=False)
    if not request.examples:
        raise ValueError(
            f"task {task.name} has no problems in its {args.split} split; choose another --split"
        )
    try_rewards(task, request.tokenizer, request.examples[0])
    ways = parse_ways(args.decode or [], args.task, parts.settings, args.temperature)
    check_repeats(ways, len(seeds), args.samples)
    about = described_evaluation(args, request, seeds) | {"dtype": parts.dtype}
    with holding(items_path(args)):
        return _evaluate(args, request, ways, seeds, about)


def _evaluate(
    args: EvalArguments,
    request: EvalRequest,
    ways: list[Way],
    seeds: list[int],
    about: dict[str, Any],
) -> int:
    log = ItemLog.open(items_path(args), {**about, "configs": [way.described() for way in ways]})
    if log.rows:
        PlainConsole().print(
            f"going on with {log.path}: {len(log.rows)} completions are there", highlight=False
        )
    decode_missing(request, ways, seeds, log)
    results = [pooled(log, n, way, len(seeds), args.samples) for n, way in enumerate(ways)]
    entries = [entry(way, result, seeds) for way, result in zip(ways, results, strict=True)]
    title = f"{args.model} on {args.task} ({args.split})"
    PlainConsole().print(
        eval_table(title, results[0]) if len(ways) == 1 else ways_table(title, ways, entries)
    )
    if len(ways) == 1 and len(seeds) > 1:
        PlainConsole().print(
            f"over seeds {args.seeds}: standard deviation {100 * entries[0]['accuracy_sd']:.1f} "
            "points"
        )
    if args.json:
        about |= {"seed": seeds[0], "versions": versions(), "device": str(request.denoiser.device)}
        write_json(
            Path(args.json), about | (entries[0] if len(ways) == 1 else {"configs": entries})
        )
        if log.path is not None and not args.items:
            log.path.unlink()  # all of it is in the JSON file now
    for line in what_next(args, request.task.name):
        PlainConsole().print(line, soft_wrap=True)
    return 0


def what_next(args: EvalArguments, task: str) -> list[str]:
    """The files that an evaluation wrote, and how to look at one problem."""
    files = [name for name in (args.json, args.items) if name]
    command = ["unmaskrl", "sample", args.model, "--task", task]
    command += ["--data", args.data] if args.data else []
    return [
        *(f"wrote {name}" for name in files),
        f"next: {shlex.join([*command, '--index', '0'])}   (one problem, call by call)",
    ]


def described_evaluation(
    args: EvalArguments, request: EvalRequest, seeds: list[int]
) -> dict[str, Any]:
    """Everything but the decode settings that decides the completions and their grades."""
    task = {"name": args.task, **parse_overrides(args.overrides).get("task", {})} | (
        {"data": args.data} if args.data else {}
    )
    return {
        **described_model(args.model),
        "task": args.task,
        "task_settings": task,
        "split": args.split,
        "problems": described_problems(request.task, request.examples),
        "seeds": seeds,
        "samples": args.samples,
    }


def items_path(args: EvalArguments) -> Path | None:
    """Where finished completions are kept: --items, or beside the --json file until that is
    written.
    """
    if args.items:
        return Path(args.items)
    return Path(args.json).with_suffix(".items.jsonl") if args.json else None
