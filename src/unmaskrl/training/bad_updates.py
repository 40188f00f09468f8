"""What stops a run, or skips an update, because a number is not finite.

Every verdict is one of all ranks: it is taken from values that are reduced over them, or reduced
itself, so that they stop (or skip) together. Rewards and advantages are looked at once per step,
loss and gradient norm (the threshold head's too) before the optimisers step, weights and their
moments before a checkpoint or a model is written; decoding looks at its own logits.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from ..core.finite import NotFiniteError, first_not_finite
from .folder.checkpoint import checkpoint_paths
from .rollouts.problems import Rewarded
from .state import Run, Training

JUDGED = ("loss", "grad_norm", "sampler/loss", "sampler/grad_norm")


def check_rewards(run: Run, done: Rewarded, advantages: Tensor) -> float:
    """The largest |advantage| over all ranks; NotFiniteError on every rank if a reward or an
    advantage is not finite.

    Both in the dtype that they are used in: a reward of 1e39 is a finite number in Python and
    infinite in float32.
    """
    reward = run.most(_largest(done.rewards))
    advantage = run.most(_largest(advantages))
    run.largest["advantage"] = advantage
    if math.isfinite(reward) and math.isfinite(advantage):
        return advantage
    what = "advantages" if math.isfinite(reward) else "rewards"
    given = {
        name: [abs(value) for value in values if value is not None]
        for name, values in done.parts.items()
    }
    size, name = max((max(values, default=0.0), name) for name, values in given.items())
    kind = str(done.rewards.dtype).removeprefix("torch.")
    raise NotFiniteError(
        f"{what} are not finite in {kind} (largest |reward| {reward:.3g}, here of {name!r}: "
        f"{size:.3g}); "
        "make the reward's range smaller"
    )


def refused(run: Training, row: dict[str, float]) -> str | None:
    """None if an update may be made; if not, the line that says so, or NotFiniteError where no
    grace is left.

    ``row``: its metrics, reduced over ranks. ``train.skip_bad_updates`` of them in a row are
    skipped.
    """
    run.largest["ratio"] = row.get("ratio/max_dev", 0.0)
    bad = [f"{name} is {row[name]}" for name in JUDGED if not math.isfinite(row.get(name, 0.0))]
    run.skipped = run.skipped + 1 if bad else 0
    if not bad:
        return None
    grace = run.recipe.train.skip_bad_updates
    inner = f"inner update {run.inner + 1}: " if isinstance(run, Run) else ""
    where = f"{inner}{', '.join(bad)}"
    if run.skipped > grace:
        after = f" after {grace} skipped in a row" if grace else ""
        raise NotFiniteError(
            f"{where}{after}; lower optimizer.lr"
            + (", or look at rewards and advantages" if isinstance(run, Run) else "")
        )
    count = f"{run.skipped} of train.skip_bad_updates={grace} in a row"
    return ", ".join([f"step {run.step + 1}, {where}: skipped ({count})", *_largest_of(run)])


def check_weights(run: Training) -> None:
    """NotFiniteError on every rank if a weight, its average or a moment is not finite on any; all
    ranks call.

    Reads every number once, on the device that holds it: next to nothing beside writing them.
    """
    name = first_not_finite(
        {
            f"{group} {name}": value
            for group, named in run.groups().items()
            for name, value in named.items()
            if group != "batch" or name in ("advantages", "old_logps", "ref_logps")
        }
    )
    if run.most(float(name is not None)):
        raise NotFiniteError(
            f"{name or 'a tensor of another process'} is not finite, nothing is saved; lower "
            "optimizer.lr (it is "
            f"{run.recipe.optimizer.lr:g})"
        )


def explained(run: Training, error: NotFiniteError) -> NotFiniteError:
    """The one line that a run ends with: where it stood, what was not finite, what was large, what
    is left to go on from.
    """
    inside = run.step < run.recipe.train.steps
    where = f"step {run.step + 1}" if inside else f"after step {run.step}"
    text = str(error).splitlines()[0]
    return NotFiniteError("; ".join([f"{where}: {text}", *_largest_of(run), last_good(run.out)]))


def last_good(out: Path) -> str:
    """The newest checkpoint of a run folder, in words; nothing that is not finite is saved."""
    newest = checkpoint_paths(out / "checkpoints")[-1:]
    return f"last good checkpoint: {newest[0] if newest else 'none yet'}"


def _largest_of(run: Training) -> list[str]:
    """What was large in the newest update of RL; nothing of supervised training."""
    if not isinstance(run, Run):
        return []
    seen = {
        name: f"{run.largest[name]:.3g}" if name in run.largest else "not known yet"
        for name in ("advantage", "ratio")
    }
    return [f"largest |advantage| {seen['advantage']}, largest |ratio - 1| {seen['ratio']}"]


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0  # NaN if one is
