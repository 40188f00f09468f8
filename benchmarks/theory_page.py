"""The tables of docs/theory.md from benchmarks/theory.json: each stands between ``<!-- name -->``
and ``<!-- /name -->``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "theory.md"
RESULTS = ROOT / "benchmarks" / "theory.json"
Figures = dict[str, Any]


def fill(text: str, figures: Figures) -> str:
    """``text`` with every marked table replaced by the one from the figures."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(
                f"{PAGE.name} has no table {name!r}; put <!-- {name} --> and <!-- /{name} --> "
                "where it belongs"
            )
        rows = table(figures[name])
        text = pattern.sub(lambda m, rows=rows: m.group(1) + rows + m.group(2), text)
    return text


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def share(value: float) -> str:
    """A share in percent; never 0 or 100 by rounding."""
    text = f"{100 * value:.1f}%"
    return (
        text
        if value in (0, 1) or text not in ("0.0%", "100.0%")
        else ("< 0.1%" if value < 0.5 else "> 99.9%")
    )


def ratio_cells(r: Figures) -> list[str]:
    """Mean, shares that rose, largest."""
    return [f"{r['mean']:.3f}", share(r["rose"]), share(r["rose weighted"]), f"{r['max']:.2f}"]


RATIO_HEAD = ["mean ratio", "rose", "rose, weighted by p(y)", "largest ratio"]


KINDS = [
    f"{name} {kind}" for name in ("token", "mean", "sum") for kind in ("independent", "shared")
]
PAIRS = (
    ("free tokens", "all tokens"),
    ("free tokens, exit", "all tokens, exit"),
    ("free tokens, exit", "free tokens"),
)


def drift_table(drift: Figures) -> str:
    """Variance of log-ratios by likelihood and number of updates, and the likelihoods row against
    row.
    """
    rows = [
        [r["likelihood"], r["updates"], *(with_error(r[k]) for k in KINDS), f"{r['drift']:.3f}"]
        for r in drift["table"]
    ]
    head = [
        "likelihood",
        "updates",
        *(k.replace("independent", "ind.") for k in KINDS),
        "log-ratio",
    ]
    found = {(r["likelihood"], r["updates"]): r for r in drift["table"]}
    pairs = []
    for one, other in PAIRS:
        for updates, kind in ((0, "independent"), (3, "independent"), (3, "shared")):
            new = found[one, updates]
            old = found[other, updates]
            cells = []
            for name in ("token", "mean", "sum"):
                a = new[f"{name} {kind}"]
                b = old[f"{name} {kind}"]
                fell = sum(x < y for x, y in zip(a, b, strict=True))
                cells.append(f"{statistics.mean(a) / statistics.mean(b):.2f} ({fell} of {len(a)})")
            pairs.append([f"{one} / {other}", updates, kind, *cells])
    inflation = statistics.mean(
        r["inflation"] / (statistics.mean(r["mean independent"]) / 2) for r in drift["table"]
    )
    free = drift["tokens"]["free tokens"]
    full = drift["tokens"]["all tokens"]
    note = (
        f"\n{drift['rows']} rows, {drift['draws']} draws of masks each; {full:.1f} tokens per "
        f"row, {free:.1f} of them free, "
    )
    note += (
        f"{drift['exit_tokens']:.1f} of these in the exit call. Standard errors are over rows.\n\n"
    )
    last = (
        "\nMeasured log E[w_hat] - log w of the row mean (independent masks), over v / 2: "
        f"{inflation:.2f} on average.\n"
    )
    return (
        markdown(head, rows)
        + note
        + markdown(["likelihoods", "updates", "masks", "token", "mean", "sum"], pairs)
        + last
    )


def with_error(values: Sequence[float]) -> str:
    """Mean and standard error, to two digits of the mean."""
    mean = statistics.mean(values)
    if mean == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(mean)))
    return f"{mean:.{digits}f} +- {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


TABLES: dict[str, Callable[[Any], str]] = {
    "calls": lambda rows: markdown(
        ["anchors", "exit_at", "our decoder", "T1a", "T1b", "schedule of the published code"],
        [
            [r["anchors"], r["exit_at"] or "-", r["ours"], r["T1a"], r["T1b"], r["published code"]]
            for r in rows
        ],
    ),
    "forwards": lambda rows: markdown(
        ["method", "calls per row", "rollout", "likelihoods", "total", "against ELBO-GRPO"],
        [[*(r[k] for k in r), f"{100 * (rows[1]['total'] / r['total'] - 1):+.1f}%"] for r in rows],
    ),
    "spatial": lambda rows: markdown(
        ["denoiser", "anchors of 6", *RATIO_HEAD],
        [[r["denoiser"], r["anchors"], *ratio_cells(r)] for r in rows],
    ),
    "masks": lambda rows: markdown(
        ["masks of all tokens", *RATIO_HEAD, "largest shift of the mean (nats)"],
        [
            [r["masks"], *ratio_cells(r), f"{r['shift']:.2g}" if r["shift"] > 1e-9 else "0"]
            for r in rows
        ],
    ),
    "normaliser": lambda rows: markdown(
        [
            "iid losses",
            "fixed of 64",
            "total: mean ratio",
            "total: rose",
            "per free token: mean ratio",
            "per free token: rose",
        ],
        [
            [
                r["losses"],
                r["anchors"],
                f"{r['total']:.3f}",
                share(r["total rose"]),
                f"{r['per token']:.3f}",
                share(r["per token rose"]),
            ]
            for r in rows
        ],
    ),
    "temporal": lambda rows: markdown(
        ["denoiser", "exit tokens of 6", "estimator", *RATIO_HEAD],
        [[r["denoiser"], r["exit tokens"], r["estimator"], *ratio_cells(r)] for r in rows],
    ),
    "exit": lambda rows: markdown(
        [
            "denoiser",
            "exit tokens",
            "y from the joint: mean",
            "least of an exit set",
            "y from the exit call: mean",
            "most of an exit set",
            "least of a single y",
        ],
        [[r["denoiser"], r["exit tokens"], *(f"{r[k]:+.3f}" for k in list(r)[2:])] for r in rows],
    ),
    "drift": drift_table,
}
