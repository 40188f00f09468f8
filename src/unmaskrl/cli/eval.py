"""`unmaskrl eval`: one model, one task, any number of decode settings and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.item_log import ItemLog, versions
from ..evaluation.sweep import (
    Parts,
    Way,
    check_repeats,
    decode_missing,
    described_evaluation,
    entry,
    items_path,
    parse_seeds,
    parse_ways,
    pooled,
)
from ..reporting.tables import eval_table, ways_table
from ..training.rollouts.reward_trial import try_rewards
from ..utils.files import check_output, write_json
from ..utils.lock import holding
from ..utils.terminal import PlainConsole
from .common import check_counts, load_parts, task_of


def eval_command(args: argparse.Namespace) -> int:
    """unmaskrl eval."""
    check_counts(args)
    for option, path in (("--json", args.json), ("--items", args.items)):
        if path:
            check_output(path, option)
    seeds = [args.seed] if args.seeds is None else parse_seeds(args.seeds)
    denoiser, tokenizer, settings, task, head = load_parts(args)
    task = task_of(args, task)
    parts = Parts(denoiser, tokenizer, task, task.examples(args.split)[: args.size], head)
    for note in getattr(task, "notes", []):
        PlainConsole().print(note, highlight=False)
    if not parts.examples:
        raise ValueError(
            f"task {task.name} has no problems in its {args.split} split; choose another --split"
        )
    try_rewards(task, tokenizer, parts.examples[0])
    ways = parse_ways(args, settings)
    check_repeats(ways, len(seeds), args.samples)
    about = described_evaluation(args, parts, seeds)
    with holding(items_path(args)):
        return _evaluate(args, parts, ways, seeds, about)


def _evaluate(
    args: argparse.Namespace, parts: Parts, ways: list[Way], seeds: list[int], about: dict[str, Any]
) -> int:
    log = ItemLog.open(items_path(args), {**about, "configs": [way.described() for way in ways]})
    if log.rows:
        PlainConsole().print(
            f"going on with {log.path}: {len(log.rows)} completions are there", highlight=False
        )
    decode_missing(args, parts, ways, seeds, log)
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
        about |= {"seed": seeds[0], "versions": versions(), "device": str(parts.denoiser.device)}
        write_json(
            Path(args.json), about | (entries[0] if len(ways) == 1 else {"configs": entries})
        )
        if log.path is not None and not args.items:
            log.path.unlink()  # all of it is in the JSON file now
    return 0
