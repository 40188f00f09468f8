"""`unmaskrl eval` (shell): one model, one task, any number of decode settings and seeds; goes on where it was killed."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .checkpoint import write_json
from .commands import check_counts, checked_decode, eval_table, load_parts, task_of
from .config import DecodeConfig, parse_overrides
from .denoiser import ModelDenoiser
from .evaluate import EvalItem, EvalResult, evaluated_rows, is_random
from .item_log import ItemLog, described_model, described_problems, versions
from .lock import holding
from .reward_trial import try_rewards
from .shell import check_output
from .tasks import Example, Task
from .terminal import PlainConsole
from .thresholds import ThresholdHead


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding: what the user wrote, the whole settings, and the temperature."""

    label: str
    settings: DecodeConfig
    temperature: float

    def described(self) -> dict[str, Any]:
        """The settings with the temperature of this evaluation in the place of the rollouts'."""
        return {**self.settings.model_dump(), "temperature": self.temperature}


@dataclass(frozen=True, slots=True)
class Parts:
    """What every row of an evaluation needs."""

    denoiser: ModelDenoiser
    tokenizer: Any
    task: Task
    examples: list[Example]
    head: ThresholdHead | None


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
        raise ValueError(f"task {task.name} has no problems in its {args.split} split; choose another --split")
    try_rewards(task, tokenizer, parts.examples[0])
    ways = parse_ways(args, settings)
    check_repeats(ways, len(seeds), args.samples)
    about = described_evaluation(args, parts, seeds)
    with holding(items_path(args)):
        return _evaluate(args, parts, ways, seeds, about)


def _evaluate(args: argparse.Namespace, parts: Parts, ways: list[Way], seeds: list[int], about: dict[str, Any]) -> int:
    log = ItemLog.open(items_path(args), {**about, "configs": [way.described() for way in ways]})
    if log.rows:
        PlainConsole().print(f"going on with {log.path}: {len(log.rows)} completions are there", highlight=False)
    decode_missing(args, parts, ways, seeds, log)
    results = [pooled(log, n, way, len(seeds), args.samples) for n, way in enumerate(ways)]
    entries = [entry(way, result, seeds) for way, result in zip(ways, results, strict=True)]
    title = f"{args.model} on {args.task} ({args.split})"
    PlainConsole().print(eval_table(title, results[0]) if len(ways) == 1 else ways_table(title, ways, entries))
    if len(ways) == 1 and len(seeds) > 1:
        PlainConsole().print(f"over seeds {args.seeds}: standard deviation {100 * entries[0]['accuracy_sd']:.1f} points")
    if args.json:
        about |= {"seed": seeds[0], "versions": versions(), "device": str(parts.denoiser.device)}
        write_json(Path(args.json), about | (entries[0] if len(ways) == 1 else {"configs": entries}))
        if log.path is not None and not args.items:
            log.path.unlink()  # all of it is in the JSON file now
    return 0


def parse_seeds(text: str) -> list[int]:
    """Comma-separated, all different."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected whole numbers such as 0,1,2, got {text!r}") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: a seed repeats in {text!r}; give each once")
    return seeds


def parse_ways(args: argparse.Namespace, settings: DecodeConfig) -> list[Way]:
    """One way per --decode (its words changed in the model's settings); without any, the model's settings themselves."""
    ways = []
    for text in args.decode or []:
        words = [f"decode.{word.removeprefix('decode.')}" for word in text.replace(",", " ").split()]
        changes = parse_overrides(words).get("decode", {})
        temperature = changes.pop("temperature", args.temperature)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"--decode {text!r}: temperature must be a number of at least 0, got {temperature!r}")
        ways.append(
            Way(
                " ".join(text.split()) or "as stored",
                checked_decode(args.task, {**settings.model_dump(), **changes}),
                temperature,
            )
        )
    return ways or [Way("as stored", settings, args.temperature)]


def check_repeats(ways: Sequence[Way], num_seeds: int, samples: int) -> None:
    """Refuse to repeat what has one outcome, and settings that need a generator they do not have."""
    for way in ways:
        if is_random(way.settings, way.temperature):
            continue
        if samples > 1:
            raise ValueError(f"{samples} samples at temperature 0 are all the same; set a temperature above 0")
        if num_seeds > 1:
            raise ValueError(
                f"decoding ({way.label}) is greedy: all {num_seeds} seeds would give the same answers; "
                "give one seed, or set a temperature above 0"
            )


def described_evaluation(args: argparse.Namespace, parts: Parts, seeds: list[int]) -> dict[str, Any]:
    """Everything but the decode settings that decides the completions and their grades."""
    task = {"name": args.task, **parse_overrides(args.overrides).get("task", {})} | ({"data": args.data} if args.data else {})
    return {
        **described_model(args.model),
        "task": args.task,
        "task_settings": task,
        "split": args.split,
        "problems": described_problems(parts.task, parts.examples),
        "seeds": seeds,
        "samples": args.samples,
        "dtype": args.dtype,
    }


def items_path(args: argparse.Namespace) -> Path | None:
    """Where finished completions are kept: --items, or beside the --json file until that is written."""
    if args.items:
        return Path(args.items)
    return Path(args.json).with_suffix(".items.jsonl") if args.json else None


def decode_missing(args: argparse.Namespace, parts: Parts, ways: Sequence[Way], seeds: Sequence[int], log: ItemLog) -> None:
    """Decode what the log does not hold yet, and add it batch by batch."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    have = {(row["config"], row["seed"], row["row"]) for row in log.rows}
    with Progress(*columns, console=PlainConsole(), transient=True) as bar:
        total = len(ways) * len(seeds) * len(parts.examples) * args.samples
        line = bar.add_task("completions", total=total, completed=len(have))
        for n, way in enumerate(ways):
            for seed in seeds:
                batches = evaluated_rows(
                    parts.denoiser,
                    parts.tokenizer,
                    parts.task,
                    parts.examples,
                    way.settings,
                    temperature=way.temperature,
                    samples=args.samples,
                    seed=seed,
                    batch_size=args.batch_size,
                    head=parts.head,
                    done={row for config, s, row in have if (config, s) == (n, seed)},
                )
                for _, items in batches:
                    new = {row: item for row, item in items.items() if (n, seed, row) not in have}
                    log.append([{"config": n, "row": row, **asdict(item)} for row, item in new.items()])
                    bar.advance(line, len(new))


def pooled(log: ItemLog, config: int, way: Way, num_seeds: int, samples: int) -> EvalResult:
    """One result over all seeds: items problem by problem, the seeds' samples of each in a row."""
    rows = sorted(
        (row for row in log.rows if row["config"] == config), key=lambda r: (r["row"] // samples, r["seed"], r["row"])
    )
    items = [EvalItem(**{key: value for key, value in row.items() if key not in ("config", "row")}) for row in rows]
    return EvalResult(
        items=items, samples=samples * num_seeds, seconds=sum(item.seconds for item in items), decode=way.described()
    )


def entry(way: Way, result: EvalResult, seeds: Sequence[int]) -> dict[str, Any]:
    """The pooled summary, each seed's own figures, their standard deviation, and every item."""
    by_seed = []
    for seed in seeds:
        items = [item for item in result.items if item.seed == seed]
        own = EvalResult(items=items, samples=result.samples // len(seeds), seconds=0.0, decode={}).summary()
        by_seed.append({"seed": seed, **{key: own[key] for key in ("accuracy", "nfe", "tokens_per_call")}})
    summary = {"label": way.label, **result.summary()}
    if len(seeds) > 1:
        summary |= {"accuracy_sd": statistics.stdev(row["accuracy"] for row in by_seed), "by_seed": by_seed}
    return {**summary, "items": [asdict(item) for item in result.items]}


def ways_table(title: str, ways: Sequence[Way], entries: Sequence[dict[str, Any]]) -> Table:
    """A row per way of decoding."""
    several = "accuracy_sd" in entries[0]
    table = Table(
        "decode", "accuracy", "95%", *(["sd, seeds"] if several else []), "calls", "tokens/call", "seconds", title=title
    )
    for way, e in zip(ways, entries, strict=True):
        table.add_row(
            way.label,
            f"{100 * e['accuracy']:.1f}%",
            f"{100 * e['accuracy_low']:.1f} to {100 * e['accuracy_high']:.1f}",
            *([f"{100 * e['accuracy_sd']:.1f}"] if several else []),
            f"{e['nfe']:.1f}",
            f"{e['tokens_per_call']:.2f}",
            f"{e['seconds']:.1f}",
        )
    return table
