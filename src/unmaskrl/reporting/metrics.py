"""Every figure that a run logs, in one table: unit, meaning, how it merges, where it is drawn.

A key is written down once, here. The trainer reads how the figures of several ranks or of several
inner updates become one; the report and the progress display read charts, labels, healthy ranges;
docs/metrics.md is this table. A key that ends in ``*`` stands for all that begin so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One key of metrics.jsonl.

    ``ranks``: how the figures of several processes become one. ``sum``: each holds its part of the
    total (for a mean: its terms over the global count). ``mean``, ``max``: of the figures that
    there are. ``same``: it is reduced where it is measured. ``updates``: how those of the inner
    updates of a step become one (mean, sum or max); empty for what is measured once per step.
    """

    key: str
    unit: str
    meaning: str
    ranks: str
    updates: str = ""
    chart: str = ""  # the name of a chart in CHARTS
    label: str = ""  # of its line there
    healthy: str = ""
    low: float | None = None  # the healthy range as numbers, where it is one
    high: float | None = None
    alarm: float | None = None  # above it a run says so

    def stands_for(self, key: str) -> bool:
        """Whether a logged key is this one, or one of those that it stands for."""
        if self.key.endswith("*"):
            return key.startswith(self.key[:-1])
        return key == self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A chart of the report: its section, its title, and whether it shows shares (0 to 100%)."""

    section: str
    title: str
    is_share: bool = False
    floor: float | None = None  # the y axis includes it
    stacked: bool = False


CHARTS = {
    "accuracy": Plan(section="Learning", title="Rollout accuracy", is_share=True, floor=0.0),
    "reward": Plan(section="Learning", title="Reward per rollout, mean", floor=0.0),
    "nfe": Plan(section="Cost", title="Denoiser calls per rollout (NFE)", floor=0.0),
    "per_call": Plan(section="Cost", title="Tokens per denoiser call", floor=0.0),
    "tokens": Plan(section="Cost", title="Tokens per rollout", floor=0.0),
    "seconds": Plan(section="Cost", title="Seconds per step", floor=0.0, stacked=True),
    "live": Plan(section="Health", title="Groups with reward spread", is_share=True, floor=0.0),
    "ratio": Plan(section="Health", title="Probability ratio, mean"),
    "clip": Plan(section="Health", title="Ratio clipped", is_share=True, floor=0.0),
    "max_dev": Plan(section="Health", title="Ratio, largest deviation from 1", floor=0.0),
    "kl": Plan(section="Health", title="KL divergence (nats per token)"),
    "likelihood": Plan(section="Health", title="Log-likelihood as sampled (nats per token)"),
    "variance": Plan(section="Health", title="Variance of the likelihood (nats^2)", floor=0.0),
    "per_free": Plan(section="Health", title="Variance of the likelihood / f^2", floor=0.0),
    "gap": Plan(section="Health", title="Scored against sampled (nats)", floor=0.0),
    "grad": Plan(section="Health", title="Gradient norm before clipping", floor=0.0),
    "weights": Plan(section="Health", title="Importance weights", floor=0.0),
    "sampler": Plan(section="Health", title="Learned sampler", is_share=True, floor=0.0),
}

STEP = (
    Metric(key="step", unit="steps", meaning="Steps done.", ranks="same"),
    Metric(key="updates", unit="updates", meaning="Optimiser updates done.", ranks="same"),
    Metric(
        key="seconds",
        unit="s",
        meaning="Training time so far, evaluation apart, all parts of a resumed run.",
        ranks="same",
    ),
    Metric(
        key="loss",
        unit="-",
        meaning="The policy loss. Near 0 at ratios near 1: it says little, watch the reward.",
        ranks="sum",
        updates="mean",
    ),
    Metric(key="lr", unit="-", meaning="Learning rate.", ranks="same", updates="mean"),
    Metric(
        key="grad_norm",
        unit="-",
        meaning="Norm of the gradient before clipping.",
        ranks="same",
        updates="mean",
        chart="grad",
        label="norm",
        healthy="steady; jumps by a factor of 10 mean that lr is too high",
        alarm=1e4,
    ),
    Metric(
        key="updates/skipped",
        unit="updates",
        meaning="Updates of the step that were left out because a number was not finite.",
        ranks="same",
        updates="sum",
        healthy="0",
        alarm=0.0,
    ),
    Metric(
        key="accuracy/rollout",
        unit="share",
        meaning="Rollouts of the step that are right.",
        ranks="mean",
        chart="accuracy",
        label="all",
    ),
    Metric(
        key="accuracy/anchored",
        unit="share",
        meaning="The same among rollouts that were given anchors.",
        ranks="mean",
        chart="accuracy",
        label="anchored",
    ),
    Metric(
        key="accuracy/blank",
        unit="share",
        meaning="The same among rollouts from a blank canvas.",
        ranks="mean",
        chart="accuracy",
        label="blank",
    ),
    Metric(
        key="reward/mean",
        unit="reward",
        meaning="Sum of the parts of the reward, mean over rollouts.",
        ranks="mean",
        chart="reward",
        label="sum",
        healthy="rises",
    ),
    Metric(
        key="reward/std",
        unit="reward",
        meaning="Standard deviation of the reward over all rollouts of the step.",
        ranks="mean",
    ),
    Metric(
        key="reward/unscored",
        unit="share",
        meaning="Completions to which every reward function returned None; they count as 0.",
        ranks="mean",
        healthy="0",
        alarm=0.0,
    ),
    Metric(
        key="reward/*",
        unit="reward",
        meaning="One part of the reward, by its name.",
        ranks="mean",
        chart="reward",
    ),
    Metric(
        key="reward_log/*",
        unit="-",
        meaning="What a reward function gave to log_metric; the main process's.",
        ranks="same",
    ),
    Metric(
        key="advantage/largest",
        unit="-",
        meaning="The largest |advantage| of the step.",
        ranks="same",
        healthy="below 10",
        high=10.0,
        alarm=1e3,
    ),
    Metric(
        key="groups/live",
        unit="share",
        meaning="Groups whose rewards differ. Only these have advantages, so only these teach.",
        ranks="mean",
        chart="live",
        label="share",
        healthy="above 20%",
        low=0.2,
        high=1.0,
    ),
    Metric(
        key="groups/used_rows",
        unit="rollouts",
        meaning="Rollouts that the policy is trained on; without a KL term those with advantage.",
        ranks="sum",
    ),
    Metric(
        key="nfe/mean",
        unit="denoiser calls",
        meaning="Denoiser calls per rollout.",
        ranks="mean",
        chart="nfe",
        label="as run",
    ),
    Metric(
        key="nfe/tokens_per_call",
        unit="tokens",
        meaning="Tokens decoded per denoiser call, anchors not counted.",
        ranks="mean",
        chart="per_call",
        label="mean",
    ),
    Metric(
        key="rollout/length",
        unit="tokens",
        meaning="Tokens of a completion up to its end, anchors included.",
        ranks="mean",
        chart="tokens",
        label="length",
    ),
    Metric(
        key="rollout/anchors",
        unit="tokens",
        meaning="Anchors per rollout: tokens of a reference that were given.",
        ranks="mean",
        chart="tokens",
        label="anchors",
    ),
    Metric(
        key="rollout/exit_tokens",
        unit="tokens",
        meaning="Tokens per rollout that the exit call filled in at once.",
        ranks="mean",
        chart="tokens",
        label="exit call",
    ),
    Metric(
        key="prior/keep",
        unit="share",
        meaning="Share of the reference that an anchored rollout is given at this step.",
        ranks="same",
    ),
    Metric(key="prior/share", unit="share", meaning="Rollouts with anchors.", ranks="mean"),
    Metric(
        key="calls/rollout",
        unit="row calls",
        meaning="Denoiser calls of the step's rollouts, counted per row, all processes.",
        ranks="same",
    ),
    Metric(
        key="calls/score",
        unit="row calls",
        meaning="The same for likelihoods: old and reference policy and all inner updates.",
        ranks="same",
    ),
    Metric(
        key="calls/total",
        unit="row calls",
        meaning="Both, since the run began.",
        ranks="same",
    ),
    Metric(
        key="seconds/rollout",
        unit="s",
        meaning="Decoding.",
        ranks="mean",
        chart="seconds",
        label="rollout",
    ),
    Metric(
        key="seconds/reward",
        unit="s",
        meaning="Grading, and the variance profile if there is one.",
        ranks="mean",
        chart="seconds",
        label="reward",
    ),
    Metric(
        key="seconds/score",
        unit="s",
        meaning="Likelihoods of the old and the reference policy.",
        ranks="mean",
        chart="seconds",
        label="score",
    ),
    Metric(
        key="seconds/update",
        unit="s",
        meaning="Gradients and optimiser steps, all inner updates.",
        ranks="mean",
        updates="sum",
        chart="seconds",
        label="update",
    ),
    Metric(
        key="ratio/mean",
        unit="-",
        meaning="Ratio of the policy to the old policy, mean over tokens.",
        ranks="sum",
        updates="mean",
        chart="ratio",
        label="mean",
        healthy="0.9 to 1.1",
        low=0.9,
        high=1.1,
    ),
    Metric(
        key="ratio/clip_frac",
        unit="share",
        meaning="Tokens whose ratio the clip holds back; 0 at the first inner update.",
        ranks="sum",
        updates="mean",
        chart="clip",
        label="tokens",
        healthy="below 20%",
        low=0.0,
        high=0.2,
    ),
    Metric(
        key="ratio/max_dev",
        unit="-",
        meaning="The largest |ratio - 1| of a token.",
        ranks="max",
        updates="max",
        chart="max_dev",
        label="largest",
        healthy="below 10; above 1000 the gradient is that of a few tokens",
        low=0.0,
        high=10.0,
        alarm=1e3,
    ),
    Metric(
        key="kl/ref",
        unit="nats per token",
        meaning="KL to the reference model (k3); 0 without a reference.",
        ranks="sum",
        updates="mean",
        chart="kl",
        label="to reference",
        healthy="grows slowly",
    ),
    Metric(
        key="kl/old",
        unit="nats per token",
        meaning="KL to the policy that the rollouts came from (k3).",
        ranks="sum",
        updates="mean",
        chart="kl",
        label="to old policy",
        healthy="to the old policy below 0.1",
    ),
    Metric(
        key="likelihood/behavior_per_token",
        unit="nats per token",
        meaning="Log-probability of the sampled tokens when they were drawn.",
        ranks="mean",
        chart="likelihood",
        label="mean",
        healthy="rises slowly; near 0 the policy no longer explores",
    ),
    Metric(
        key="likelihood/variance",
        unit="nats^2",
        meaning="Variance of a row's likelihood estimate over draws of its masks.",
        ranks="mean",
        chart="variance",
        label="of a row",
        healthy="the lower the better",
    ),
    Metric(
        key="likelihood/variance_per_token",
        unit="nats^2",
        meaning="The same divided by the square of the row's action tokens, f.",
        ranks="mean",
        chart="per_free",
        label="of a row",
        healthy="the lower the better",
    ),
    Metric(
        key="health/behavior_gap",
        unit="nats",
        meaning="Largest difference between a token's log-probability scored and as sampled.",
        ranks="max",
        chart="gap",
        label="largest",
        healthy="below 0.001 in float32, below 0.5 in bfloat16",
    ),
    Metric(
        key="health/first_log_ratio",
        unit="nats",
        meaning="Largest |log-ratio| before the first update, where every ratio is 1; first step.",
        ranks="same",
        updates="max",
        healthy="below 0.004 in float32, below 0.1 in bfloat16",
    ),
    Metric(
        key="is/mean",
        unit="-",
        meaning="Mean truncated importance weight (loss.is_cap).",
        ranks="sum",
        updates="mean",
        chart="weights",
        label="mean",
        healthy="mean near 1, effective share above 0.5",
    ),
    Metric(
        key="is/ess",
        unit="share",
        meaning="Effective share of the tokens: mean^2 / mean square of the weights.",
        ranks="same",
        updates="mean",
        chart="weights",
        label="effective",
        healthy="above 0.5",
        low=0.5,
        high=1.0,
    ),
    Metric(
        key="is/truncated",
        unit="share",
        meaning="Tokens whose weight is cut at the cap.",
        ranks="sum",
        updates="mean",
        chart="weights",
        label="truncated",
        healthy="below 10%",
        low=0.0,
        high=0.1,
    ),
    Metric(
        key="is/*",
        unit="-",
        meaning="Mean weight by quarter of the row's calls (mean_q1 to mean_q4).",
        ranks="sum",
        updates="mean",
        healthy="near 1 in each",
    ),
    Metric(
        key="sampler/log10_gamma",
        unit="log10 nats",
        meaning="Mean of the positive thresholds that the head chose.",
        ranks="mean",
    ),
    Metric(
        key="sampler/exact_share",
        unit="share",
        meaning="Rollouts with threshold 0, one token per call.",
        ranks="mean",
        chart="sampler",
        label="threshold 0",
    ),
    Metric(
        key="sampler/fewest_calls",
        unit="share",
        meaning="Rollouts with one call per block: the head's collapse.",
        ranks="mean",
        chart="sampler",
        label="fewest calls",
        healthy="fewest calls below 95%",
        low=0.0,
        high=0.95,
        alarm=0.95,
    ),
    Metric(
        key="sampler/loss",
        unit="-",
        meaning="Clipped policy loss of the head.",
        ranks="sum",
        updates="mean",
    ),
    Metric(
        key="sampler/entropy",
        unit="nats",
        meaning="Entropy of the head's choice.",
        ranks="sum",
        updates="mean",
        healthy="above 0: it still explores",
    ),
    Metric(
        key="sampler/ratio_dev",
        unit="-",
        meaning="Mean |ratio - 1| of the head's choices.",
        ranks="sum",
        updates="mean",
    ),
    Metric(
        key="sampler/clip_frac",
        unit="share",
        meaning="Choices whose ratio the clip holds back.",
        ranks="sum",
        updates="mean",
        chart="sampler",
        label="clipped",
    ),
    Metric(
        key="sampler/grad_norm",
        unit="-",
        meaning="Norm of the head's gradient before clipping.",
        ranks="same",
        updates="mean",
    ),
)

# eval.jsonl: (key, unit, meaning). The main process decodes and counts, nothing is merged.
EVALUATION = (
    ("step", "steps", "Where the run stood."),
    ("split", "-", "`validation` while it trains, `test` before and after."),
    ("weights", "-", "`base`: before training; `raw`: as trained; `ema`: averaged."),
    ("accuracy", "share", "Completions that are right, greedy and without anchors."),
    ("accuracy_low", "share", "Lower end of the 95% Wilson interval (draw of problems only)."),
    ("accuracy_high", "share", "Its upper end."),
    ("accuracy_KIND", "share", "Accuracy among problems of one kind, where the task has kinds."),
    ("share_KIND", "share", "Share of the problems that are of it."),
    ("num_problems", "problems", "Problems that were decoded."),
    ("num_dropped", "problems", "Problems left out because their prompts are too long."),
    ("samples", "completions", "Completions per problem."),
    ("pass@K", "share", "Problems solved by at least one of K completions, unbiased."),
    ("nfe", "denoiser calls", "Denoiser calls per completion."),
    ("tokens_per_call", "tokens", "Tokens per denoiser call."),
    ("seconds", "s", "Time to decode all of them."),
    ("decode", "-", "The settings they were decoded with."),
)

# log.jsonl of `unmaskrl sft`
SUPERVISED = (
    ("step", "steps", "Steps done."),
    ("loss", "nats per token", "Cross-entropy of masked tokens, mean over the parts of the data."),
    ("loss/N_TASK", "nats per token", "The same of one part."),
    ("lr", "-", "Learning rate."),
    ("grad_norm", "-", "Norm of the gradient before clipping."),
)

# What a loss from outside returns: like our own, local sums over the step's global counts.
_FOREIGN = Metric(key="*", unit="-", meaning="", ranks="sum", updates="mean")


def find(key: str) -> Metric | None:
    """The table's row of a logged key; None if it has none."""
    return next((metric for metric in STEP if metric.stands_for(key)), None)


def over_ranks(key: str, values: Sequence[float]) -> float:
    """One figure from those of all ranks, NaN where any that counts is NaN. Own key: sum."""
    rule = (find(key) or _FOREIGN).ranks
    if rule == "max":
        return math.nan if any(map(math.isnan, values)) else max(values)
    if rule == "same":
        return values[0]
    total = sum(values)
    return total / len(values) if rule == "mean" else total


def over_updates(key: str, values: Sequence[float]) -> float:
    """One figure of a step from those of its inner updates."""
    rule = (find(key) or _FOREIGN).updates or "mean"
    if rule == "max":
        return max(values)
    return sum(values) if rule == "sum" else sum(values) / len(values)


def labelled(chart: str) -> dict[str, str]:
    """Keys of a chart and the labels of their lines, in order; without those that stand for
    several.
    """
    return {m.key: m.label for m in STEP if m.chart == chart and not m.key.endswith("*")}


def is_part(key: str) -> bool:
    """Whether a logged key is one part of the reward."""
    metric = find(key)
    return metric is not None and metric.key == "reward/*"


PHASES = labelled("seconds")  # of a step: key of its seconds -> name
