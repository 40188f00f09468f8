"""A run's checkpoints: what is saved of it, what it goes on from, and the logs cut back to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.weights import like, load_trainable, trainable, whole
from .bad_updates import check_weights
from .folder.checkpoint import Checkpoint, load_latest, save_checkpoint, set_aside
from .folder.config import keep_old, write_config
from .folder.fitting import check_optimizer_group, check_tensors, real_number, whole_number
from .folder.optimizer_state import load_optimizer, optimizer_numbers
from .folder.run_folder import CONFIG, LOGS, cut_log, sync_logs
from .state import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a checkpoint's run stood, every number checked."""

    step: int
    inner: int
    updates: int
    skipped: int
    elapsed: float
    num_ranks: int
    log_bytes: dict[str, int]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Standing:
        """Of a checkpoint's state."""
        counts = ("step", "inner", "updates", "num_ranks")
        return cls(
            **{key: whole_number(state, key) for key in counts},
            skipped=whole_number({"skipped": 0, **state}, "skipped"),  # older ones have none
            elapsed=real_number(state, "elapsed"),
            log_bytes={name: whole_number(state["log_bytes"], name) for name in LOGS},
        )


def save_run(run: Training) -> None:
    """Checkpoint everything that the rest of the run depends on. All ranks call; the main one
    writes.
    """
    run.check_place()
    check_weights(run)
    # on every rank alike, also if the disk is full: all of them decide by it whether to save at the
    # end
    run.saved = run.updates
    main = run.accelerator.is_main_process
    tensors = {
        group: {n: v.cpu() for n, t in named.items() for v in [whole(t)] if main}
        for group, named in run.groups().items()
    }
    if not main:
        return
    state: dict[str, Any] = {
        "step": run.step,
        "inner": run.inner,
        "updates": run.updates,
        "skipped": run.skipped,
        "elapsed": run.elapsed,
        "num_ranks": run.accelerator.num_processes,
        "optimizer": optimizer_numbers(run.denoiser.model, run.optimizer),
        "log_bytes": sync_logs(run.out),
        **run.numbers(),
    }
    save_checkpoint(
        run.out / "checkpoints", run.updates, tensors, state, keep=run.recipe.run.keep_checkpoints
    )


def load_run(run: Training) -> list[str]:
    """Put the run where its newest usable checkpoint stands and cut the logs back to it; returns
    what to tell.

    Nothing in the folder is changed before all of that is known to work: damaged checkpoints are
    then set aside, and a recipe with other free settings takes the place of config.yaml, which is
    kept.
    """
    found = load_latest(run.out / "checkpoints", lambda checkpoint: fit(run, checkpoint))
    standing = found.value
    checkpoint = found.checkpoint
    notes = list(found.notes)
    if standing is None or checkpoint is None:
        notes.append("no checkpoint yet: starting from the beginning")
    else:
        notes += _restore(run, standing, checkpoint)
    if run.most(float(run.updates)) != run.updates:
        raise ValueError(
            f"ranks read different checkpoints in {run.out / 'checkpoints'}: is it one folder on "
            "one disk?"
        )
    run.saved = run.updates if standing else -1
    if run.accelerator.is_main_process:
        notes += set_aside(found.damaged)
        for name in LOGS:
            notes += cut_log(run.out / name, standing.log_bytes[name] if standing else 0)
        _write_changes(run)
    run.accelerator.wait_for_everyone()
    return notes


def _restore(run: Training, standing: Standing, checkpoint: Checkpoint) -> list[str]:
    tensors = checkpoint.tensors
    notes = []
    if standing.step > run.recipe.train.steps:
        raise ValueError(
            f"train.steps={run.recipe.train.steps}: {checkpoint.path} stands at step "
            f"{standing.step} already; set at least that"
        )
    ranks = run.accelerator.num_processes
    if standing.num_ranks != ranks:
        if "batch" in checkpoint.state:
            raise ValueError(
                f"{checkpoint.path} was written inside a step by {standing.num_ranks} process, "
                f"this is {ranks}: "
                "resume with the same number"
            )
        notes.append(
            f"{checkpoint.path.name} was written by {standing.num_ranks} processes, this is "
            f"{ranks}: sums round differently"
        )
    load_trainable(run.denoiser.model, tensors["model"])
    run.average = {name: like(value, run.average[name]) for name, value in tensors["ema"].items()}
    numbers = checkpoint.state["optimizer"]
    load_optimizer(run.denoiser.model, run.optimizer, tensors["optimizer"], numbers)
    for name in ("step", "inner", "updates", "skipped", "elapsed"):
        setattr(run, name, getattr(standing, name))
    run.restore_own(checkpoint)
    notes.append(f"resumed from {checkpoint.path.name} (step {run.step}, inner update {run.inner})")
    return notes


def _write_changes(run: Training) -> None:
    if run.changed:
        keep_old(run.out / CONFIG)
        write_config(run.recipe, run.out)
        # of the run as long as it was: eval.jsonl is cut back to before its last rows
        keep_old(run.out / "summary.json")


def fit(run: Training, checkpoint: Checkpoint) -> Standing:
    """The numbers of a checkpoint that fits this run in every tensor; ValueError (or KeyError,
    TypeError) if it does not.
    """
    tensors = checkpoint.tensors
    check_tensors("model", dict(trainable(run.denoiser.model)), tensors)
    check_tensors("ema", run.average, tensors)
    check_optimizer_group("optimizer", run.recipe.optimizer, run.denoiser.model, checkpoint)
    standing = Standing.of(checkpoint.state)
    if checkpoint.path.name != f"update-{standing.updates:06d}":
        raise ValueError(f"it holds update {standing.updates}")
    run.check_own(checkpoint)
    return standing
