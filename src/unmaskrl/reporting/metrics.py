"""Every figure that a run logs, in one table: unit, meaning, how it merges, where it is drawn.

A key is written down once, here. The trainer reads how the figures of several ranks or of several
inner updates become one; the report and the progress display read charts, labels, healthy ranges;
docs/metrics.md is this table. A key that ends in ``*`` stands for all that begin so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
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
    chart: str = ""  # the name of a chart in curves.CHARTS
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


STEP = (
    Metric("step", "steps", "Steps done.", "same"),
    Metric("updates", "updates", "Optimiser updates done.", "same"),
    Metric(
        "seconds",
        "s",
        "Training time so far, evaluation apart, all parts of a resumed run.",
        "same",
    ),
    Metric(
        "loss",
        "-",
        "The policy loss. Near 0 at ratios near 1: it says little, watch the reward.",
        "sum",
        updates="mean",
    ),
    Metric(key="lr", unit="-", meaning="Learning rate.", ranks="same", updates="mean"),
    Metric(
        "grad_norm",
        "-",
        "Norm of the gradient before clipping.",
        "same",
        updates="mean",
        chart="grad",
        label="norm",
        healthy="steady; jumps by a factor of 10 mean that lr is too high",
        alarm=1e4,
    ),
    Metric(
        "updates/skipped",
        "updates",
        "Updates of the step that were left out because a number was not finite.",
        "same",
        updates="sum",
        healthy="0",
        alarm=0.0,
    ),
    Metric(
        "accuracy/rollout",
        "share",
        "Rollouts of the step that are right.",
        "mean",
        chart="accuracy",
        label="all",
    ),
    Metric(
        "accuracy/anchored",
        "share",
        "The same among rollouts that were given anchors.",
        "mean",
        chart="accuracy",
        label="anchored",
    ),
    Metric(
        "accuracy/blank",
        "share",
        "The same among rollouts from a blank canvas.",
        "mean",
        chart="accuracy",
        label="blank",
    ),
    Metric(
        "reward/mean",
        "reward",
        "Sum of the parts of the reward, mean over rollouts.",
        "mean",
        chart="reward",
        label="sum",
        healthy="rises",
    ),
    Metric(
        "reward/std",
        "reward",
        "Standard deviation of the reward over all rollouts of the step.",
        "mean",
    ),
    Metric(
        "reward/unscored",
        "share",
        "Completions to which every reward function returned None; they count as 0.",
        "mean",
        healthy="0",
        alarm=0.0,
    ),
    Metric("reward/*", "reward", "One part of the reward, by its name.", "mean", chart="reward"),
    Metric(
        "reward_log/*",
        "-",
        "What a reward function gave to log_metric; the main process's.",
        "same",
    ),
    Metric(
        "advantage/largest",
        "-",
        "The largest |advantage| of the step.",
        "same",
        healthy="below 10",
        high=10.0,
        alarm=1e3,
    ),
    Metric(
        "groups/live",
        "share",
        "Groups whose rewards differ. Only these have advantages, so only these teach.",
        "mean",
        chart="live",
        label="share",
        healthy="above 20%",
        low=0.2,
        high=1.0,
    ),
    Metric(
        "groups/used_rows",
        "rollouts",
        "Rollouts that the policy is trained on; without a KL term those with advantage.",
        "sum",
    ),
    Metric(
        "nfe/mean",
        "denoiser calls",
        "Denoiser calls per rollout.",
        "mean",
        chart="nfe",
        label="as run",
    ),
    Metric(
        "nfe/tokens_per_call",
        "tokens",
        "Tokens decoded per denoiser call, anchors not counted.",
        "mean",
        chart="per_call",
        label="mean",
    ),
    Metric(
        "rollout/length",
        "tokens",
        "Tokens of a completion up to its end, anchors included.",
        "mean",
        chart="tokens",
        label="length",
    ),
    Metric(
        "rollout/anchors",
        "tokens",
        "Anchors per rollout: tokens of a reference that were given.",
        "mean",
        chart="tokens",
        label="anchors",
    ),
    Metric(
        "rollout/exit_tokens",
        "tokens",
        "Tokens per rollout that the exit call filled in at once.",
        "mean",
        chart="tokens",
        label="exit call",
    ),
    Metric(
        "prior/keep",
        "share",
        "Share of the reference that an anchored rollout is given at this step.",
        "same",
    ),
    Metric("prior/share", "share", "Rollouts with anchors.", "mean"),
    Metric("prior/again", "rollouts", "Decoded again with anchors (prior.when).", "same"),
    Metric("prior/replaced", "rollouts", "Those of which that was used: it was right.", "same"),
    Metric(
        "calls/rollout",
        "row calls",
        "Denoiser calls of the step's rollouts and of prior/again, per row, all processes.",
        "same",
    ),
    Metric(
        "calls/score",
        "row calls",
        "The same for likelihoods: old and reference policy and all inner updates.",
        "same",
    ),
    Metric("calls/total", "row calls", "Both, since the run began.", "same"),
    Metric("seconds/rollout", "s", "Decoding.", "mean", chart="seconds", label="rollout"),
    Metric(
        "seconds/reward",
        "s",
        "Grading, and the variance profile if there is one.",
        "mean",
        chart="seconds",
        label="reward",
    ),
    Metric(
        "seconds/score",
        "s",
        "Likelihoods of the old and the reference policy.",
        "mean",
        chart="seconds",
        label="score",
    ),
    Metric(
        "seconds/update",
        "s",
        "Gradients and optimiser steps, all inner updates.",
        "mean",
        updates="sum",
        chart="seconds",
        label="update",
    ),
    Metric(
        "ratio/mean",
        "-",
        "Ratio of the policy to the old policy, mean over tokens.",
        "sum",
        updates="mean",
        chart="ratio",
        label="mean",
        healthy="0.9 to 1.1",
        low=0.9,
        high=1.1,
    ),
    Metric(
        "ratio/clip_frac",
        "share",
        "Tokens whose ratio the clip holds back; 0 at the first inner update.",
        "sum",
        updates="mean",
        chart="clip",
        label="tokens",
        healthy="below 20%",
        low=0.0,
        high=0.2,
    ),
    Metric(
        "ratio/max_dev",
        "-",
        "The largest |ratio - 1| of a token.",
        "max",
        updates="max",
        chart="max_dev",
        label="largest",
        healthy="below 10; above 1000 the gradient is that of a few tokens",
        low=0.0,
        high=10.0,
        alarm=1e3,
    ),
    Metric(
        "kl/ref",
        "nats per token",
        "KL to the reference model (k3); 0 without a reference.",
        "sum",
        updates="mean",
        chart="kl",
        label="to reference",
        healthy="grows slowly",
    ),
    Metric(
        "kl/old",
        "nats per token",
        "KL to the policy that the rollouts came from (k3).",
        "sum",
        updates="mean",
        chart="kl",
        label="to old policy",
        healthy="to the old policy below 0.1",
    ),
    Metric(
        "likelihood/behavior_per_token",
        "nats per token",
        "Log-probability of the sampled tokens when they were drawn.",
        "mean",
        chart="likelihood",
        label="mean",
        healthy="rises slowly; near 0 the policy no longer explores",
    ),
    Metric(
        "likelihood/variance",
        "nats^2",
        "Variance of a row's likelihood estimate over draws of its masks.",
        "mean",
        chart="variance",
        label="of a row",
        healthy="the lower the better",
    ),
    Metric(
        "likelihood/variance_per_token",
        "nats^2",
        "The same divided by the square of the row's action tokens, f.",
        "mean",
        chart="per_free",
        label="of a row",
        healthy="the lower the better",
    ),
    Metric(
        "health/behavior_gap",
        "nats",
        "Largest difference between a token's log-probability scored and as sampled.",
        "max",
        chart="gap",
        label="largest",
        healthy="below 0.001 in float32, below 0.5 in bfloat16",
    ),
    Metric(
        "health/first_log_ratio",
        "nats",
        "Largest |log-ratio| before the first update, where every ratio is 1; first step.",
        "same",
        updates="max",
        healthy="below 0.004 in float32, below 0.1 in bfloat16",
    ),
    Metric(
        "is/mean",
        "-",
        "Mean truncated importance weight (loss.is_cap).",
        "sum",
        updates="mean",
        chart="weights",
        label="mean",
        healthy="mean near 1, effective share above 0.5",
    ),
    Metric(
        "is/ess",
        "share",
        "Effective share of the tokens: mean^2 / mean square of the weights.",
        "same",
        updates="mean",
        chart="weights",
        label="effective",
        healthy="above 0.5",
        low=0.5,
        high=1.0,
    ),
    Metric(
        "is/truncated",
        "share",
        "Tokens whose weight is cut at the cap.",
        "sum",
        updates="mean",
        chart="weights",
        label="truncated",
        healthy="below 10%",
        low=0.0,
        high=0.1,
    ),
    Metric(
        "is/*",
        "-",
        "Mean weight by quarter of the row's calls (mean_q1 to mean_q4).",
        "sum",
        updates="mean",
        healthy="near 1 in each",
    ),
    Metric(
        "sampler/log10_gamma",
        "log10 nats",
        "Mean of the positive thresholds that the head chose.",
        "mean",
    ),
    Metric(
        "sampler/exact_share",
        "share",
        "Rollouts with threshold 0, one token per call.",
        "mean",
        chart="sampler",
        label="threshold 0",
    ),
    Metric(
        "sampler/fewest_calls",
        "share",
        "Rollouts with one call per block: the head's collapse.",
        "mean",
        chart="sampler",
        label="fewest calls",
        healthy="fewest calls below 95%",
        low=0.0,
        high=0.95,
        alarm=0.95,
    ),
    Metric("sampler/loss", "-", "Clipped policy loss of the head.", "sum", updates="mean"),
    Metric(
        "sampler/entropy",
        "nats",
        "Entropy of the head's choice.",
        "sum",
        updates="mean",
        healthy="above 0: it still explores",
    ),
    Metric(
        "sampler/ratio_dev", "-", "Mean |ratio - 1| of the head's choices.", "sum", updates="mean"
    ),
    Metric(
        "sampler/clip_frac",
        "share",
        "Choices whose ratio the clip holds back.",
        "sum",
        updates="mean",
        chart="sampler",
        label="clipped",
    ),
    Metric(
        "sampler/grad_norm",
        "-",
        "Norm of the head's gradient before clipping.",
        "same",
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

# metrics.jsonl of `unmaskrl sft`
SUPERVISED = (
    ("step", "steps", "Steps done."),
    ("seconds", "s", "Time spent in steps so far."),
    ("loss", "nats per token", "Cross-entropy of masked tokens, mean over the parts of the data."),
    ("loss/N_TASK", "nats per token", "The same of one part."),
    ("lr", "-", "Learning rate."),
    ("grad_norm", "-", "Norm of the gradient before clipping."),
    ("updates/skipped", "updates", "1 if the step's update was not finite and was skipped."),
)


def find(key: str) -> Metric | None:
    """The table's row of a logged key; None if it has none."""
    return next((metric for metric in STEP if metric.stands_for(key)), None)


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
