"""A run's checkpoints (shell): what is saved of it, what a checkpoint must hold to go on from, and
the logs cut back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..core.finite import first_not_finite
from ..core.types import Rollout
from ..models.weights import like, load_trainable, trainable, whole
from ..recipes.schema import OptimizerConfig
from .bad_updates import check_weights
from .folder.checkpoint import (
    Checkpoint,
    load_latest,
    save_checkpoint,
    set_aside,
)
from .folder.config import CONFIG, keep_old, write_config
from .folder.optimizer_state import (
    check_state,
    load_optimizer,
    optimizer_numbers,
    optimizer_tensors,
)
from .folder.run_folder import LOGS, cut_log, sync_logs
from .rollouts.threshold_policy import Choices
from .state import Batch, Run

HEAD_OPTIMIZER = OptimizerConfig()  # of the threshold head: AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a checkpoint's run stood, every number checked."""

    step: int
    inner: int
    updates: int
    calls: int
    skipped: int
    elapsed: float
    num_ranks: int
    keep: float
    solved: dict[int, float]
    log_bytes: dict[str, int]


def save_run(run: Run) -> None:
    """Checkpoint everything that the rest of the run depends on. All ranks call; the main one
    writes.
    """
    run.check_place()
    check_weights(run)
    # on every rank alike, also if the disk is full: all of them decide by it whether to save at the
    # end
    run.saved = run.updates
    groups = {
        "model": trainable(run.denoiser.model),
        "ema": run.average,
        "optimizer": optimizer_tensors(run.denoiser.model, run.optimizer),
    }
    main = run.accelerator.is_main_process
    tensors = {
        group: {n: v.cpu() for n, t in named.items() for v in [whole(t)] if main}
        for group, named in groups.items()
    }
    if not main:
        return
    state: dict[str, Any] = {
        "step": run.step,
        "inner": run.inner,
        "updates": run.updates,
        "calls": run.calls,
        "skipped": run.skipped,
        "elapsed": run.elapsed,
        "keep": run.anchors.adapted,
        "solved": run.anchors.solved,
        "num_ranks": run.accelerator.num_processes,
        "optimizer": optimizer_numbers(run.denoiser.model, run.optimizer),
        "log_bytes": sync_logs(run.out),
    }
    if run.sampler is not None:
        tensors["threshold"] = dict(run.sampler.head.named_parameters())
        head = (run.sampler.head, run.sampler.optimizer)
        tensors["threshold_optimizer"] = optimizer_tensors(*head)
        state["threshold_optimizer"] = optimizer_numbers(*head)
    if run.batch is not None:
        tensors["batch"] = batch_tensors(run.batch)
        state["batch"] = {
            "metrics": run.batch.metrics,
            "inner_metrics": run.batch.inner_metrics,
            "counts": run.batch.counts,
            "gen_length": run.batch.rollout.gen_length,
            "temperature": run.batch.rollout.temperature,
            "exact": run.batch.rollout.exact,
        }
    save_checkpoint(
        run.out / "checkpoints", run.updates, tensors, state, keep=run.recipe.run.keep_checkpoints
    )


def load_run(run: Run) -> list[str]:
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


def _restore(run: Run, standing: Standing, checkpoint: Checkpoint) -> list[str]:
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
    state = checkpoint.state
    load_optimizer(run.denoiser.model, run.optimizer, tensors["optimizer"], state["optimizer"])
    if run.sampler is not None:
        load_trainable(run.sampler.head, tensors["threshold"])
        load_optimizer(
            run.sampler.head,
            run.sampler.optimizer,
            tensors["threshold_optimizer"],
            state["threshold_optimizer"],
        )
    for name in ("step", "inner", "updates", "calls", "skipped", "elapsed"):
        setattr(run, name, getattr(standing, name))
    run.anchors.adapted = standing.keep
    run.anchors.solved = standing.solved
    if "batch" in checkpoint.state:
        run.batch = restore_batch(tensors["batch"], checkpoint.state["batch"], run.denoiser.device)
    notes.append(f"resumed from {checkpoint.path.name} (step {run.step}, inner update {run.inner})")
    return notes


def _write_changes(run: Run) -> None:
    if run.changed:
        keep_old(run.out / CONFIG)
        write_config(run.recipe, run.out)
        # of the run as long as it was: eval.jsonl is cut back to before its last rows
        keep_old(run.out / "summary.json")


def fit(run: Run, checkpoint: Checkpoint) -> Standing:
    """The numbers of a checkpoint that fits this run in every tensor; ValueError (or KeyError,
    TypeError) if it does not.
    """
    state = checkpoint.state
    tensors = checkpoint.tensors
    check_tensors("model", dict(trainable(run.denoiser.model)), tensors)
    check_tensors("ema", run.average, tensors)
    check_optimizer_group("optimizer", run.recipe.optimizer, run.denoiser.model, checkpoint)
    if run.sampler is not None:
        check_tensors("threshold", dict(run.sampler.head.named_parameters()), tensors)
        check_optimizer_group("threshold_optimizer", HEAD_OPTIMIZER, run.sampler.head, checkpoint)
    standing = Standing(
        **{
            key: whole_number(state, key)
            for key in ("step", "inner", "updates", "calls", "num_ranks")
        },
        skipped=whole_number({"skipped": 0, **state}, "skipped"),  # older checkpoints have none
        elapsed=_real(state, "elapsed"),
        keep=_real(state, "keep"),
        solved={int(index): _real(state["solved"], index) for index in state.get("solved", {})},
        log_bytes={name: whole_number(state["log_bytes"], name) for name in LOGS},
    )
    if checkpoint.path.name != f"update-{standing.updates:06d}":
        raise ValueError(f"it holds update {standing.updates}")
    if standing.inner and "batch" not in state:
        raise ValueError("it stands inside a step and holds no batch")
    if "batch" in state:
        restore_batch(_group("batch", tensors), state["batch"], torch.device("cpu"))
    return standing


def _group(group: str, tensors: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    if group not in tensors:
        raise ValueError(f"it holds no {group}.safetensors")
    return tensors[group]


def check_tensors(
    group: str, expected: Mapping[str, Tensor], tensors: Mapping[str, dict[str, Tensor]]
) -> None:
    """ValueError unless a group of a checkpoint has the names and shapes of ``expected``."""
    found = _group(group, tensors)
    names = sorted(found.keys() ^ expected.keys())
    wrong = [
        f"{name} {tuple(found[name].shape)} (expected {tuple(tensor.shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if names or wrong:
        what = (
            f"other tensors ({', '.join(names[:3])})"
            if names
            else f"other shapes: {', '.join(wrong[:3])}"
        )
        raise ValueError(f"{group}.safetensors has {what} than the recipe's model")
    if (bad := first_not_finite(found)) is not None:  # older versions saved such
        raise ValueError(f"{group}.safetensors has {bad}, which is not finite")


def check_optimizer_group(
    group: str, config: OptimizerConfig, model: nn.Module, checkpoint: Checkpoint
) -> None:
    """ValueError unless a checkpoint's ``group`` is the state of ``model``'s optimiser."""
    tensors = _group(group, checkpoint.tensors)
    check_state(group, config, trainable(model), tensors, checkpoint.state[group])


def whole_number(state: Mapping[str, Any], key: str) -> int:
    """A count in a checkpoint's state; ValueError if it is something else."""
    value = state[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, expected a whole number of at least 0")
    return value


def _real(state: Mapping[str, Any], key: str) -> float:
    value = state[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, expected a number")
    return value


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """The open step as named tensors."""
    rollout = {
        f"rollout/{k}": v
        for f in fields(Rollout)
        if isinstance(v := getattr(batch.rollout, k := f.name), Tensor)
    }
    tensors = rollout | {
        "advantages": batch.advantages,
        "old_logps": batch.old_logps,
        "group_actions": batch.group_actions,
    }
    if batch.choices is not None:
        tensors |= {f"choices/{name}": value for name, value in batch.choices.tensors().items()}
    return tensors if batch.ref_logps is None else tensors | {"ref_logps": batch.ref_logps}


def restore_batch(tensors: dict[str, Tensor], state: dict[str, Any], device: torch.device) -> Batch:
    """The inverse of ``batch_tensors``, on ``device``."""
    prefix = "rollout/"
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    rollout: dict[str, Any] = {
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
    }
    rollout |= {key: state[key] for key in ("gen_length", "temperature", "exact")}
    choices = {
        k.removeprefix("choices/"): v for k, v in tensors.items() if k.startswith("choices/")
    }
    return Batch(
        rollout=Rollout(**rollout),
        advantages=tensors["advantages"],
        old_logps=tensors["old_logps"],
        ref_logps=tensors.get("ref_logps"),
        group_actions=tensors["group_actions"],
        choices=Choices(**choices) if choices else None,
        counts=state["counts"],
        metrics=state["metrics"],
        inner_metrics=state["inner_metrics"],
    )
