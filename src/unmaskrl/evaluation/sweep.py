"""One model, one task, any number of decode settings and seeds; goes on where it was killed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..recipes.load import parse_overrides
from ..recipes.schema import DecodeConfig
from ..utils.terminal import PlainConsole
from .decode_settings import checked_decode
from .evaluate import EvalItem, EvalRequest, EvalResult, evaluated_rows, is_random
from .item_log import ItemLog


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding: what the user wrote, the whole settings, and the temperature."""

    label: str
    settings: DecodeConfig
    temperature: float

    def described(self) -> dict[str, Any]:
        """The settings with the temperature of this evaluation in the place of the rollouts'."""
        return {**self.settings.model_dump(), "temperature": self.temperature}


def parse_seeds(text: str) -> list[int]:
    """Comma-separated, all different."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected whole numbers such as 0,1,2, got {text!r}") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: a seed repeats in {text!r}; give each once")
    return seeds


def parse_ways(
    texts: Sequence[str], task: str, settings: DecodeConfig, default_temperature: float
) -> list[Way]:
    """One way per --decode (its words changed in the model's settings); without any, the model's
    settings themselves.
    """
    ways = []
    for text in texts:
        words = [
            f"decode.{word.removeprefix('decode.')}" for word in text.replace(",", " ").split()
        ]
        changes = parse_overrides(words).get("decode", {})
        temperature = changes.pop("temperature", default_temperature)
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, int | float)
            or not 0 <= temperature < math.inf
        ):
            raise ValueError(
                f"--decode {text!r}: temperature must be a number of at least 0, got "
                f"{temperature!r}"
            )
        ways.append(
            Way(
                " ".join(text.split()) or "as stored",
                checked_decode(task, {**settings.model_dump(), **changes}),
                temperature,
            )
        )
    return ways or [Way("as stored", settings, default_temperature)]


def check_repeats(ways: Sequence[Way], num_seeds: int, samples: int) -> None:
    """Refuse to repeat what has one outcome, and settings that need a generator they do not
    have.
    """
    for way in ways:
        if is_random(way.settings, way.temperature):
            continue
        if samples > 1:
            raise ValueError(
                f"{samples} samples at temperature 0 are all the same; set a temperature above 0"
            )
        if num_seeds > 1:
            raise ValueError(
                f"decoding ({way.label}) is greedy: all {num_seeds} seeds would give the same "
                "answers; "
                "give one seed, or set a temperature above 0"
            )


def decode_missing(
    request: EvalRequest, ways: Sequence[Way], seeds: Sequence[int], log: ItemLog
) -> None:
    """Decode what the log does not hold yet, way by way and seed by seed, and add it batch by
    batch.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    have = {(row["config"], row["seed"], row["row"]) for row in log.rows}
    with Progress(*columns, console=PlainConsole(), transient=True) as bar:
        total = len(ways) * len(seeds) * len(request.examples) * request.samples
        line = bar.add_task("completions", total=total, completed=len(have))
        for n, way in enumerate(ways):
            for seed in seeds:
                batches = evaluated_rows(
                    replace(request, settings=way.settings, temperature=way.temperature, seed=seed),
                    done={row for config, s, row in have if (config, s) == (n, seed)},
                )
                for _, items in batches:
                    new = {row: item for row, item in items.items() if (n, seed, row) not in have}
                    log.append(
                        [{"config": n, "row": row, **asdict(item)} for row, item in new.items()]
                    )
                    bar.advance(line, len(new))


def pooled(log: ItemLog, config: int, way: Way, num_seeds: int, samples: int) -> EvalResult:
    """One result over all seeds: items problem by problem, the seeds' samples of each in a row."""
    rows = sorted(
        (row for row in log.rows if row["config"] == config),
        key=lambda r: (r["row"] // samples, r["seed"], r["row"]),
    )
    items = [
        EvalItem(**{key: value for key, value in row.items() if key not in ("config", "row")})
        for row in rows
    ]
    return EvalResult(
        items=items,
        samples=samples * num_seeds,
        seconds=sum(item.seconds for item in items),
        decode=way.described(),
    )


def entry(way: Way, result: EvalResult, seeds: Sequence[int]) -> dict[str, Any]:
    """The pooled summary, each seed's own figures, their standard deviation, and every item."""
    by_seed = []
    for seed in seeds:
        items = [item for item in result.items if item.seed == seed]
        own = EvalResult(
            items=items, samples=result.samples // len(seeds), seconds=0.0, decode={}
        ).summary()
        by_seed.append(
            {"seed": seed, **{key: own[key] for key in ("accuracy", "nfe", "tokens_per_call")}}
        )
    summary = {"label": way.label, **result.summary()}
    if len(seeds) > 1:
        summary |= {
            "accuracy_sd": statistics.stdev(row["accuracy"] for row in by_seed),
            "by_seed": by_seed,
        }
    return {**summary, "items": [asdict(item) for item in result.items]}
