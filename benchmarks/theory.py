"""Every figure of docs/theory.md: exact ones by enumeration, the drift of log-ratios on the shipped
model.

    python -m benchmarks.theory           # all of it, about a minute and a half; writes
        benchmarks/theory.json and the page
    python -m benchmarks.theory --page    # the page's tables from the JSON

Tests check the page against the JSON, and the JSON's exact part against a new computation. Seeds
are in the functions.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.exact import (
    conditional_logps,
    drawn_in_all,
    elbo_outcomes,
    exit_outcomes,
    growth,
    moments,
    score,
    single_draw_outcomes,
    truncated_outcomes,
)
from benchmarks.theory_page import PAGE, RESULTS, Figures, fill
from unmaskrl.core.decoding import planned_calls

NUM_TOKENS = 3
LENGTH = 6
JOINTS = 4
ALL = range(LENGTH)
DENOISERS = (("consistent", 0.0), ("inconsistent", 0.7))  # name, tilt of the conditionals


def main() -> None:
    """Compute what is asked for and rewrite the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="only rewrite the page from the JSON")
    if not parser.parse_args().page:
        from benchmarks.drift import drift_figures

        figures = {
            "command": "python -m benchmarks.theory",
            **exact_figures(),
            "drift": drift_figures(),
        }
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), json.loads(RESULTS.read_text())))


def exact_figures() -> Figures:
    """Everything that needs no model: seconds."""
    return {
        "calls": call_figures(),
        "forwards": forward_figures(),
        "spatial": spatial_figures(),
        "masks": mask_figures(),
        "normaliser": normaliser_figures(),
        "temporal": temporal_figures(),
        "exit": exit_figures(),
    }


# Calls: LLaDA's setting in the paper, 256 tokens, blocks of 32, 128 steps.
GEN = 256
BLOCK = 32
STEPS = 128


def spread_anchors(count: int, reference: int) -> list[int]:
    """Open tokens per block when ``count`` anchors are spread evenly over the first ``reference``
    positions.
    """
    anchors = {k * reference // count for k in range(count)}
    return [
        sum(c not in anchors for c in range(start, start + BLOCK)) for start in range(0, GEN, BLOCK)
    ]


def published_calls(open_per_block: Sequence[int], exit_at: float | None) -> int:
    """The schedule of STP's code: every block takes its share of the steps; the exit counts anchors
    as decided.
    """
    per_block = STEPS * BLOCK // GEN
    calls = 0
    decided = GEN - sum(open_per_block)
    cut = GEN if exit_at is None else int(exit_at * GEN)
    for n in open_per_block:
        for i in range(per_block):
            decided = decided + n // per_block + (i < n % per_block)
            calls = calls + 1
            if decided > cut:
                return calls + 1
    return calls


def claim_free(gamma: float, left: float) -> float:
    """T1a before rounding: the exit counted on the free tokens."""
    return (1 - gamma) * (1 - left) * STEPS


def claim_all(gamma: float, left: float) -> float:
    """T1b before rounding: the exit counted on all positions, anchors included."""
    return max(0.0, 1 - left - gamma) * STEPS


def call_figures() -> list[Figures]:
    """Denoiser calls of one row, with a reference answer of 192 tokens."""
    rows = []
    for keep, exit_at in itertools.product((0, 10, 29), (None, 0.95, 0.9)):
        counts = spread_anchors(keep, 192) if keep else [BLOCK] * (GEN // BLOCK)
        gamma = keep / GEN
        left = 0.0 if exit_at is None else 1 - exit_at
        one_more = exit_at is not None
        rows.append(
            {
                "anchors": keep,
                "exit_at": exit_at,
                "ours": planned_calls(counts, GEN, STEPS, exit_at),
                "T1a": -int(-claim_free(gamma, left) // 1) + one_more,
                "T1b": -int(-claim_all(gamma, left) // 1) + one_more,
                "published code": published_calls(counts, exit_at),
            }
        )
    return rows


def forward_figures() -> list[Figures]:
    """Sequence-forwards per group of 6 and rollout batch: mu = 4, backward = 2 forwards; K masks
    per likelihood.
    """

    def row(method: str, nfe: int, num_mc: int) -> Figures:
        rollout = 6 * nfe
        frozen = 2 * 4 * num_mc * 6
        trained = 3 * 4 * num_mc * 6
        return {
            "method": method,
            "calls": nfe,
            "rollout": rollout,
            "likelihoods": frozen + trained,
        } | {"total": rollout + frozen + trained}

    calls = {(r["anchors"], r["exit_at"]): r for r in call_figures()}
    few = calls[10, 0.95]
    many = calls[29, 0.95]
    return [
        row("Diffu-GRPO (one mask)", STEPS, 1),
        row("ELBO-GRPO (three masks)", STEPS, 3),
        row("STP, schedule of the published code", few["published code"], 3),
        row("STP, T1b, 10 anchors", few["T1b"], 3),
        row("STP, T1b, 29 anchors", many["T1b"], 3),
        row("STP, our decoder, 10 anchors", few["ours"], 3),
        row("STP, our decoder, 29 anchors", many["ours"], 3),
    ]


def joints(seed: int, noise: float = 0.0) -> Iterable[tuple[Tensor, Tensor]]:
    """Random joints over 3**6 completions (standard normal log-weights): probabilities and table of
    conditionals.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(JOINTS):
        weights = torch.randn(NUM_TOKENS**LENGTH, generator=generator, dtype=torch.float64)
        tilt = noise * torch.randn(
            2**LENGTH, LENGTH, NUM_TOKENS, generator=generator, dtype=torch.float64
        )
        yield weights.softmax(-1), conditional_logps(weights, NUM_TOKENS, LENGTH, tilt)


def without(dropped: Iterable[int]) -> list[int]:
    """The other positions."""
    return [i for i in ALL if i not in set(dropped)]


def summary(ratios: list[Tensor], probs: list[Tensor]) -> Figures:
    """Mean ratio, share above 1 (all completions alike, and as likely as the joint makes them),
    largest ratio.
    """
    ratio = torch.stack(ratios)
    weight = torch.stack(probs)
    rose = (ratio > 1 + 1e-9).double()
    return {
        "mean": float(ratio.mean()),
        "rose": float(rose.mean()),
        "rose weighted": float((rose * weight).sum() / weight.sum()),
        "max": float(ratio.max()),
        "cases": ratio.numel(),
    }


def spatial_figures() -> list[Figures]:
    """Var X_F / Var X_C for every choice of anchors, every completion of random joints."""
    rows = []
    for name, noise in DENOISERS:
        for count in range(1, LENGTH - 1):
            ratios = []
            weights = []
            for probs, table in joints(0, noise):
                full = moments(elbo_outcomes(table, ALL))[1]
                for anchors in itertools.combinations(ALL, count):
                    ratios.append(moments(elbo_outcomes(table, without(anchors)))[1] / full)
                    weights.append(probs)
            rows.append({"denoiser": name, "anchors": count, **summary(ratios, weights)})
    return rows


def mask_figures() -> list[Figures]:
    """Masks drawn in all tokens against masks drawn in the free ones; variance over Var X_F, two
    anchors.
    """
    rows = []
    for name, hide in (("anchors never hidden", False), ("anchors hidden as drawn", True)):
        ratios = []
        weights = []
        shifts = []
        for probs, table in joints(0):
            for anchors in itertools.combinations(ALL, 2):
                mean, base = moments(elbo_outcomes(table, without(anchors)))
                other, spread = moments(drawn_in_all(table, without(anchors), anchors, hide=hide))
                ratios.append(spread / base)
                weights.append(probs)
                shifts.append((other - mean).abs().max())
        rows.append(
            {"masks": name, **summary(ratios, weights), "shift": float(torch.stack(shifts).max())}
        )
    return rows


def normaliser_figures() -> list[Figures]:
    """64 context-free iid losses, the k most confident fixed: share of draws in which the variance
    fell, by normaliser.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    uniform = torch.rand(2000, 64, generator=generator, dtype=torch.float64)
    losses = {
        "exponential": -uniform.log(),
        "log-normal": torch.special.ndtri(uniform).exp(),
        "uniform": uniform,
    }
    for name, drawn in losses.items():
        cost = drawn.sort(-1).values
        for anchors in (3, 16):
            free = cost[:, anchors:]
            before, after = (
                growth(c.shape[1]) * ((c - c.mean(-1, keepdim=True)) ** 2).sum(-1)
                for c in (cost, free)
            )
            ratio = after / before
            per_token = ratio * (64 / free.shape[1]) ** 2
            rows.append(
                {
                    "losses": name,
                    "anchors": anchors,
                    "total": float(ratio.mean()),
                    "total rose": float((ratio > 1).double().mean()),
                }
                | {
                    "per token": float(per_token.mean()),
                    "per token rose": float((per_token > 1).double().mean()),
                }
            )
    return rows


def temporal_figures() -> list[Figures]:
    """Variance of estimators of the pruned ELBO over that of the full one, e tokens in the exit
    call, no anchors.
    """
    estimators: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
        "truncated (exit term dropped)": lambda t, e: [moments(truncated_outcomes(t, ALL, e))[1]],
        "truncated and a draw of the exit set": lambda t, e: [
            moments(truncated_outcomes(t, ALL, e))[1] + moments(exit_outcomes(t, ALL, e))[1]
        ],
        "one draw for both": lambda t, e: [moments(single_draw_outcomes(t, ALL, e))[1]],
        "ours: the rollout's exit set, own view": lambda t, e: [
            moments(elbo_outcomes(t, without(last), last))[1]
            for last in itertools.combinations(ALL, e)
        ],
    }
    rows = []
    for denoiser, noise in DENOISERS:
        for e in (1, 2, 3):
            for name, variances in estimators.items():
                ratios = []
                weights = []
                for probs, table in joints(0, noise):
                    full = moments(elbo_outcomes(table, ALL))[1]
                    for variance in variances(table, e):
                        ratios.append(variance / full)
                        weights.append(probs)
                figures = summary(ratios, weights)
                rows.append({"denoiser": denoiser, "exit tokens": e, "estimator": name, **figures})
    return rows


def exit_figures() -> list[Figures]:
    """L_full - L_pruned in nats over all exit sets: its mean for text of the joint and for text of
    the exit call itself.
    """
    rows = []
    for name, noise in DENOISERS:
        for e in (2, 3):
            by_joint = []
            by_exit = []
            low = []
            for probs, table in joints(0, noise):
                for last in itertools.combinations(ALL, e):
                    # anchors: all that came before
                    gap = moments(elbo_outcomes(table, last))[0] - score(table, last, last)
                    by_joint.append((probs * gap).sum())
                    by_exit.append((exit_law(probs, score(table, last, last), last) * gap).sum())
                    low.append(gap.min())
            values = [torch.stack(v) for v in (by_joint, by_exit, low)]
            rows.append(
                {
                    "denoiser": name,
                    "exit tokens": e,
                    "joint": float(values[0].mean()),
                    "joint least": float(values[0].min()),
                }
                | {
                    "exit call": float(values[1].mean()),
                    "exit call most": float(values[1].max()),
                    "least": float(values[2].min()),
                }
            )
    return rows


def exit_law(probs: Tensor, last_logps: Tensor, last: Sequence[int]) -> Tensor:
    """Probabilities of completions whose other tokens come from the joint and whose exit tokens are
    drawn side by side.
    """
    grid = probs.reshape([NUM_TOKENS] * LENGTH)
    return (grid.sum(tuple(last), keepdim=True).expand(grid.shape)).flatten() * last_logps.exp()


if __name__ == "__main__":
    main()
