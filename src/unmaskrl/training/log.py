"""What a run writes down: metrics.jsonl, eval.jsonl, samples.jsonl, summary.json, and the
trackers.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import torch

from ..core.advantages import groups_with_spread
from ..core.rng import named_generator
from ..core.types import Rollout
from ..core.variance import step_metrics
from ..evaluation.evaluate import EvalResult
from ..models.tokenizer import decode_texts, sample_row
from ..reporting.merging import over_updates
from ..reporting.metrics import find
from ..tasks import Example
from ..tasks.base import last_answer
from ..utils.files import append_jsonl, read_jsonl, write_json
from ..utils.torch_setup import installed
from .rollouts.open_step import Batch
from .rollouts.problems import Rewarded
from .rollouts.threshold_policy import sampler_metrics
from .state import Run, Training
from .trackers import track, track_samples

_VARIANCE_ROWS = 4
LOGGED = "reward_log/"  # what reward functions gave to log_metric


def rollout_metrics(run: Run, done: Rewarded) -> dict[str, float | None]:
    """Rewards, success with and without anchors, calls and lengths of one step's rollouts (this
    rank's).
    """
    rollout = done.rollout
    rewards = done.rewards
    actions = rollout.action_mask.sum()
    live = groups_with_spread(rewards, rollout.group_ids.cpu()).float().mean()
    metrics: dict[str, float | None] = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": _mean_of(values) for name, values in done.parts.items()},
        "reward/unscored": done.unscored,
        "accuracy/rollout": float(done.correct.float().mean()),
        "accuracy/anchored": _mean(done.correct[done.anchored]),
        "accuracy/blank": _mean(done.correct[~done.anchored]),
        "groups/live": float(live),
        "nfe/mean": float(rollout.nfe.float().mean()),
        "nfe/tokens_per_call": float(actions / rollout.nfe.sum().clamp(min=1)),
        "rollout/length": float(rollout.completion_mask.sum(-1).float().mean()),
        "rollout/anchors": float(rollout.anchor_mask.sum(-1).float().mean()),
        "rollout/exit_tokens": float(rollout.exit_mask.sum(-1).float().mean()),
        "prior/keep": run.anchors.keep(run.share_done)
        if run.recipe.prior.name == "anchors"
        else 0.0,
        "prior/share": float(done.anchored.float().mean()),
        "likelihood/behavior_per_token": float(
            (rollout.behavior_logps * rollout.action_mask).sum() / actions.clamp(min=1)
        ),
        "prior/again": run.total(float(done.asked_again)),
        "prior/replaced": run.total(float(done.replaced)),
        "calls/rollout": run.total(float(rollout.nfe.sum() + done.dropped_calls)),
    }
    if run.sampler is not None:
        metrics |= sampler_metrics(rollout, run.recipe.decode.block_length)
    metrics |= {f"{LOGGED}{name}": value for name, value in done.logged.items()}
    return metrics | likelihood_variance(run, rollout)


def log_samples(run: Run, done: Rewarded) -> None:
    """A few rollouts of a step that is evaluated, in samples.jsonl."""
    if run.step % run.recipe.eval.every == 0 and run.accelerator.is_main_process:
        rows = [
            _train_sample(run, done, i)
            for i in range(0, len(done.texts), run.recipe.train.group_size)
        ][:2]
        _keep_samples(run, rows)


def likelihood_variance(run: Run, rollout: Rollout) -> dict[str, float | None]:
    """Variance of the likelihood over ``run.variance_draws`` draws of masks, on one rollout of
    each of a few groups.

    The masks have a generator of their own and the calls are not counted: profiling changes nothing
    but the log (its time is in seconds/reward and, if train.minutes is set, is taken from the run).
    Estimators that look at advantages see none.
    """
    t = run.recipe.train
    draws = run.recipe.run.variance_draws
    if draws == 0:
        return {}
    with run.inference() as policy:
        return step_metrics(
            policy,
            rollout.rows(
                torch.arange(0, len(rollout.ids), t.group_size, device=rollout.ids.device)[
                    :_VARIANCE_ROWS
                ]
            ),
            run.method.estimator,
            num_draws=draws,
            generator=named_generator(run.recipe.run.seed, "variance", run.step),
            max_canvases=run.max_canvases,
        )


def log_step(run: Run, batch: Batch) -> dict[str, Any]:
    """One line of metrics.jsonl: the rollout's metrics and those of the inner updates, merged by
    the table of metrics.
    """
    inner = batch.inner_metrics
    keys = dict.fromkeys(key for row in inner for key in row)
    # null where every update of the step was skipped
    merged: dict[str, Any] = {**dict.fromkeys(("loss", "grad_norm")), **batch.metrics}
    merged |= {key: over_updates(key, [row[key] for row in inner if key in row]) for key in keys}
    # ranks may log different names, so the main process's are taken
    logged = {key: merged.pop(key) for key in list(merged) if key.startswith(LOGGED)}
    # what an update reports is reduced already, but for each rank's own clock
    apart = (*batch.metrics, "seconds/update")
    merged |= run.merge_over_ranks({key: merged[key] for key in merged if key in apart})
    merged |= logged
    run.calls += int(merged["calls/rollout"] + merged["calls/score"])
    row = {"step": run.step, "updates": run.updates, "seconds": run.elapsed}
    row |= {**merged, "calls/total": run.calls}
    write_row(run, row)
    return row


def write_row(run: Training, row: dict[str, Any]) -> None:
    """Put a step's row into metrics.jsonl and the trackers."""
    run.check_place()
    if run.accelerator.is_main_process:
        append_jsonl(run.out / "metrics.jsonl", [row])
    track(run, row, int(row["step"]))


def alarms(row: dict[str, Any]) -> list[str]:
    """What a reader of this step's metrics should not miss."""
    notes = []
    if is_alarming(row, "sampler/fewest_calls"):
        notes.append(
            f"the sampler takes one call per block on {100 * row['sampler/fewest_calls']:.0f}% of "
            f"the rollouts (right: {100 * row['accuracy/rollout']:.0f}%); if that is not wanted, "
            "lower sampler.alpha or the largest gamma"
        )
    if is_alarming(row, "reward/unscored"):
        share = 100 * row["reward/unscored"]
        notes.append(
            f"every reward function returned None for {share:.0f}% of this step's completions: "
            "they count as 0"
        )
    if is_alarming(row, "ratio/max_dev"):
        notes.append(
            f"a ratio is off by {row['ratio/max_dev']:.0e}: this step's gradient is that of a few "
            "tokens; lower optimizer.lr, or "
            "use loss.name=sequence_clip"
        )
    if is_alarming(row, "updates/skipped"):
        notes.append(
            f"{row['updates/skipped']:.0f} updates of this step were skipped: their loss or "
            "gradient was not finite"
        )
    if is_alarming(row, "advantage/largest"):
        notes.append(
            f"an advantage is {row['advantage/largest']:.0e}: make the rewards smaller, or use "
            "advantage.name=group_mean_std"
        )
    if is_alarming(row, "grad_norm"):
        notes.append(
            f"the gradient's norm is {row['grad_norm']:.0e} before clipping: only its direction "
            "counts; lower optimizer.lr"
        )
    bad = [
        name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        notes.append(f"not finite in this step's metrics: {', '.join(bad)}")
    return notes


def is_alarming(row: dict[str, Any], key: str) -> bool:
    """Whether a figure of a step is above the table's alarm."""
    metric = find(key)
    assert metric is not None and metric.alarm is not None, f"{key} has no alarm"
    return (row.get(key) or 0.0) > metric.alarm


def log_eval(
    run: Run,
    split: str,
    weights: str,
    result: EvalResult,
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """One line of eval.jsonl and, for the test set, a few decodings in samples.jsonl."""
    row = {"step": run.step, "split": split, "weights": weights, **result.summary()}
    append_jsonl(run.out / "eval.jsonl", [row])
    if split == "test":
        where = {
            row: (rollout, i)
            for rollout in rollouts
            for i, row in enumerate(rollout.row_ids.tolist())
        }
        _keep_samples(
            run,
            [
                sample_row(
                    *where[n],
                    run.tokenizer,
                    step=run.step,
                    split=f"test-{weights}",
                    example_id=examples[n].id,
                    prompt_text=_prompt_text(run, *where[n]),
                    completion_text=result.items[n].text,
                    reward=sum(filter(None, result.items[n].parts.values()), 0.0),
                    correct=result.items[n].correct,
                    parts=result.items[n].parts,
                    gold=_gold(run, examples[n]),
                )
                for n in range(min(4, len(examples)))
            ],
        )
    track(run, {f"eval/{split}-{weights}": row["accuracy"]}, run.step)
    return row


def write_summary(run: Run, wall_minutes: float) -> dict[str, Any]:
    """Before and after, and what it took; also written to summary.json.

    ``minutes`` are training (all parts of a resumed run, no evaluation), ``wall_minutes``
    everything this process did.
    """
    rows = [row for row in read_jsonl(run.out / "eval.jsonl") if row["split"] == "test"]
    summary = {
        "name": run.recipe.name,
        "seed": run.recipe.run.seed,
        "before": next((r for r in rows if r["weights"] == "base"), None),
        "after": {r["weights"]: r for r in rows if r["weights"] != "base"},
        "steps": run.step,
        "updates": run.updates,
        "calls": run.calls,
        "minutes": run.elapsed / 60,
        "wall_minutes": wall_minutes,
        "device": str(run.denoiser.device),
        "threads": run.threads,
        "platform": platform.platform(),
        "versions": installed("unmaskrl", "torch", "transformers", "accelerate"),
        "report": str(run.out / "report.html"),
    }
    if run.accelerator.is_main_process:
        write_json(run.out / "summary.json", summary)
    return summary


def _keep_samples(run: Run, rows: list[dict[str, Any]]) -> None:
    append_jsonl(run.out / "samples.jsonl", rows)
    track_samples(run, rows, run.step)


def _train_sample(run: Run, done: Rewarded, index: int) -> dict[str, Any]:
    extra = {
        column: _plain(values[index])
        for column, values in done.extra.items()
        if len(values) == len(done.texts)
    }
    row = sample_row(
        done.rollout,
        index,
        run.tokenizer,
        step=run.step,
        split="train",
        example_id=done.examples[index].id,
        prompt_text=_prompt_text(run, done.rollout, index),
        completion_text=done.texts[index],
        reward=float(done.rewards[index]),
        correct=bool(done.correct[index]),
        parts={name: values[index] for name, values in done.parts.items()},
        gold=_gold(run, done.examples[index]),
    )
    return row | {"extra": extra} if extra else row


def _gold(run: Run, example: Example) -> str | None:
    """The answer of the problem's reference, or all of a reference that marks none."""
    reference = run.task.reference(example)
    return reference and (last_answer(reference) or reference)


def _plain(value: object) -> str | float | bool | None:
    """A value that JSON can hold."""
    if (
        value is None
        or isinstance(value, str | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return str(value)


def _prompt_text(run: Run, rollout: Rollout, index: int) -> str:
    return decode_texts(run.tokenizer, [rollout.ids[index][rollout.prompt_mask[index]].tolist()])[0]


def _mean_of(scores: Sequence[float | None]) -> float | None:
    """Mean over the rows to which a reward function gave a score."""
    given = [score for score in scores if score is not None]
    return sum(given) / len(given) if given else None


def _mean(values: torch.Tensor) -> float | None:
    return float(values.float().mean()) if len(values) else None
