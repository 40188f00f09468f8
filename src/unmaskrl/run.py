"""State of a training run (shell): what is built from a recipe, what a checkpoint holds, what ranks share."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn

from .adapters import WithoutAdapters
from .build import COMPONENTS, make_estimator, make_loss
from .checkpoint import load_latest, load_optimizer, optimizer_tensors, save_checkpoint, write_json
from .config import Recipe, build_recipe
from .denoiser import ModelDenoiser
from .estimators import Estimator
from .loading import open_model
from .losses import PolicyLoss
from .probe import check_probe, masked_accuracy
from .rng import named_generator
from .rollouts import Anchors, Problems, make_task
from .sampler import Choices, Sampler
from .shard import Gathered, Lockstep, clip_gradients, finish_lockstep, is_split, shard_blocks
from .shell import file_size, run_folder, set_threads, truncate_file
from .tasks import Task, TrlReward, load_function
from .tokenizer import encode_reference
from .types import Rollout
from .weights import frozen_copy, like, load_trainable, start_average, trainable, whole

PROBE_PROBLEMS = 32
WAIT = timedelta(days=1)  # of ranks while one evaluates or saves; a rank that dies is noticed by the launcher, not by this
LOGS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")


@dataclass(slots=True, kw_only=True)
class Batch:
    """The step in progress: rows that are trained on, their likelihoods per inner update, metrics so far."""

    rollout: Rollout
    advantages: Tensor
    old_logps: Tensor  # (num_iterations, B, L)
    ref_logps: Tensor | None
    group_actions: Tensor  # (B,): action tokens of each row's group
    counts: dict[str, float]  # of the whole step over all ranks, left-out rows included; and of what is scored
    choices: Choices | None
    metrics: dict[str, float | None]
    inner_metrics: list[dict[str, float]]


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything a step needs. ``step``, ``inner``, ``updates`` say where the run stands; ``batch`` is the open step."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    denoiser: ModelDenoiser  # what is trained
    frozen: ModelDenoiser  # the same weights for passes without gradient, inside ``inference``
    gathered: Gathered | None
    average: dict[str, Tensor]
    reference: ModelDenoiser | None
    tokenizer: Any
    tokenizer_folder: Path | None  # None: the byte tokenizer
    task: Task
    problems: Problems
    anchors: Anchors
    estimator: Estimator
    advantage: Callable[[Tensor, Tensor], Tensor]
    loss: PolicyLoss
    functions: dict[str, TrlReward]
    optimizer: torch.optim.Optimizer
    sampler: Sampler | None
    threads: int = 1
    step: int = 0
    inner: int = 0
    updates: int = 0
    calls: int = 0
    elapsed: float = 0.0
    batch: Batch | None = None
    trackers: bool = field(default=False)
    notes: list[str] = field(default_factory=list)

    @property
    def share_done(self) -> float:
        """How much of the run is over, by steps or, if train.minutes is set and further on, by time."""
        t = self.recipe.train
        return min(1.0, max(self.step / t.steps, self.elapsed / (60 * t.minutes) if t.minutes else 0.0))

    @property
    def trains_policy(self) -> bool:
        """Whether the policy's weights learn at this point of the run (threshold.mode)."""
        mode = self.recipe.threshold.mode
        return mode != "sampler" and not (mode == "sequential" and self.sampler and self.sampler.trains(self.share_done))

    @property
    def sharded(self) -> bool:
        """Whether a pass through the model is a call that all ranks must make alike."""
        return self.frozen is not self.denoiser

    @contextmanager
    def inference(self) -> Iterator[ModelDenoiser]:
        """The policy for passes without gradient. All ranks enter together; inside, only the denoiser may communicate."""
        if self.gathered is not None:
            self.gathered.refresh()
        yield self.frozen
        if isinstance(self.frozen, Lockstep):
            finish_lockstep(self.frozen)

    def most(self, value: float) -> float:
        """Maximum of a number over ranks."""
        return float(self._gather(torch.tensor([[value]], dtype=torch.float64)).max())

    def total(self, value: float) -> float:
        """Sum of a number over ranks."""
        return float(self.reduce(torch.tensor(value, dtype=torch.float64)))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over ranks."""
        if self.accelerator.num_processes == 1:
            return tensor
        accelerator: Any = self.accelerator  # typed for nested containers, which these are not
        return accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)  # NCCL takes no tensor on the CPU

    def reduce_metrics(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Local sums over global counts add up over ranks; maxima stay maxima."""
        gathered = self._gather(torch.tensor([[float(value) for value in metrics.values()]], dtype=torch.float64))
        return {
            key: float(values.max() if key.endswith("max_dev") else values.sum())
            for key, values in zip(metrics, gathered.unbind(1), strict=True)
        }

    def mean_over_ranks(self, metrics: dict[str, float | None]) -> dict[str, float | None]:
        """Means of the ranks' figures; None where no rank has one. Totals, the same everywhere, stay what they are."""
        if self.accelerator.num_processes == 1:
            return metrics
        own = torch.tensor([[float("nan") if v is None else float(v) for v in metrics.values()]], dtype=torch.float64)
        means = self._gather(own).nanmean(0).tolist()
        return {k: None if math.isnan(v) else v for k, v in zip(metrics, means, strict=True)}

    def _gather(self, own: Tensor) -> Tensor:
        """A (1, N) tensor of every rank, (ranks, N), on the CPU."""
        accelerator: Any = self.accelerator
        return own if accelerator.num_processes == 1 else accelerator.gather(own.to(accelerator.device)).cpu()

    def sum_gradients(self, module: nn.Module, max_norm: float) -> float:
        """Sum gradients over ranks, clip, and return their norm before clipping."""
        parameters = list(trainable(module).values())
        for parameter in parameters if self.accelerator.num_processes > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not is_split(parameter):  # split ones were summed in the backward pass
                parameter.grad = self.reduce(parameter.grad)
        if any(map(is_split, parameters)):
            return clip_gradients(parameters, max_norm, self.total)
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))


def start_run(recipe: Recipe, *, resume: bool, force: bool) -> Run:
    """Build a run from its recipe; only when all of it could be built is its folder written (or, by ``force``, replaced)."""
    patience = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    shard = _shard_mode(recipe, accelerator)
    if recipe.train.prompts_per_step % accelerator.num_processes:
        raise ValueError(
            f"train.prompts_per_step={recipe.train.prompts_per_step} on {accelerator.num_processes} processes: every process "
            "takes as many prompts, so set a multiple of their number"
        )
    alone = accelerator.is_main_process  # the other ranks may look when the folder is already there
    out = run_folder(recipe.train.out, recipe.name, recipe.train.seed, resume=resume and alone, force=force or not alone)
    accelerator.project_configuration = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard"))
    if resume:
        _compare_config(recipe, out)
    denoiser, tokenizer, folder = open_model(recipe.model, accelerator.device, recipe.train.seed)
    task = make_task(recipe)
    problems = Problems(recipe, task, tokenizer, denoiser.max_length)
    notes = [*problems.notes, *([] if resume else probe_model(recipe, denoiser, problems))]
    loss = make_loss(recipe)
    gathered = Gathered(denoiser.model, frozen_copy(denoiser)) if shard != "none" and recipe.train.gather_rollout else None
    frozen = gathered.plain if gathered else Lockstep.of(denoiser) if shard != "none" else denoiser
    base = denoiser
    if loss.uses_ref or "most_predictable" in recipe.prior.select:  # something looks at the model as it was
        base = WithoutAdapters.of(frozen, inner=frozen) if recipe.model.lora else frozen_copy(denoiser)
    if shard != "none":
        shard_blocks(denoiser.model, shard)
    t, learning = recipe.train, trainable(denoiser.model)
    optimizer = torch.optim.AdamW(learning.values(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    run = Run(
        recipe=recipe,
        out=out,
        accelerator=accelerator,
        denoiser=denoiser,
        frozen=frozen,
        gathered=gathered,
        average=start_average(denoiser.model) if t.ema else {},
        reference=base if loss.uses_ref else None,
        tokenizer=tokenizer,
        tokenizer_folder=folder,
        task=task,
        problems=problems,
        anchors=Anchors(recipe, problems, base),
        estimator=make_estimator(recipe),
        advantage=COMPONENTS["advantage"][recipe.advantage["name"]],
        loss=loss,
        functions={name: load_function(name, "train.reward_functions") for name in recipe.train.reward_functions},
        optimizer=optimizer,
        sampler=Sampler.start(recipe, denoiser, folder),
        notes=notes,
    )
    if accelerator.is_main_process:
        if force and not resume and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            (out / "config.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        _choose_threads(recipe, out)
    accelerator.wait_for_everyone()
    run.threads = _choose_threads(recipe, out)
    return run


def probe_model(recipe: Recipe, denoiser: ModelDenoiser, problems: Problems) -> list[str]:
    """Ask a loaded model for masked tokens of some training problems; a warning, or ValueError if its logits look shifted."""
    if not recipe.train.probe or recipe.model.random_init is not None:
        return []
    count = min(PROBE_PROBLEMS, len(problems.examples))
    texts = [problems.task.reference(example) for example in problems.examples[:count]]
    known = [i for i, text in enumerate(texts) if text is not None]
    prompts = [problems.prompt(i) for i in known]
    references = [encode_reference(problems.tokenizer, texts[i] or "", [])[0] for i in known]
    probe = masked_accuracy(denoiser, prompts, references, named_generator(recipe.train.seed, "probe"))
    note = check_probe(probe)
    return [] if note is None else [f"model.path {recipe.model.path}: {note}"]


def save_run(run: Run) -> None:
    """Checkpoint everything that the rest of the run depends on. All ranks call; the main one writes."""
    groups = {
        "model": trainable(run.denoiser.model),
        "ema": run.average,
        "optimizer": optimizer_tensors(run.denoiser.model, run.optimizer),
    }
    main = run.accelerator.is_main_process
    tensors = {group: {n: v.cpu() for n, t in named.items() for v in [whole(t)] if main} for group, named in groups.items()}
    if not main:
        return
    state: dict[str, Any] = {
        "step": run.step,
        "inner": run.inner,
        "updates": run.updates,
        "calls": run.calls,
        "elapsed": run.elapsed,
        "keep": run.anchors.adapted,
        "solved": run.anchors.solved,
        "num_ranks": run.accelerator.num_processes,
        "log_bytes": {name: file_size(run.out / name) for name in LOGS},
    }
    if run.sampler is not None:
        tensors["threshold"] = dict(run.sampler.head.named_parameters())
        tensors["threshold_optimizer"] = optimizer_tensors(run.sampler.head, run.sampler.optimizer)
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
    save_checkpoint(run.out / "checkpoints", run.updates, tensors, state, keep=run.recipe.train.keep_checkpoints)


def load_run(run: Run) -> list[str]:
    """Put the run where its newest whole checkpoint stands and cut the logs back to it; returns what to tell."""
    checkpoint, notes = load_latest(run.out / "checkpoints")
    if checkpoint is None:
        cut_logs(run, dict.fromkeys(LOGS, 0))
        return [*notes, "no checkpoint yet: starting from the beginning"]
    state, tensors = checkpoint.state, checkpoint.tensors
    ranks = run.accelerator.num_processes
    if state["num_ranks"] != ranks:
        if "batch" in state:
            raise ValueError(
                f"{checkpoint.path} was written inside a step by {state['num_ranks']} process, this is {ranks}: "
                "resume with the same number"
            )
        notes.append(
            f"{checkpoint.path.name} was written by {state['num_ranks']} processes, this is {ranks}: sums round differently"
        )
    load_trainable(run.denoiser.model, tensors["model"])
    run.average = {name: like(value, run.average[name]) for name, value in tensors["ema"].items()}
    load_optimizer(run.denoiser.model, run.optimizer, tensors["optimizer"])
    if run.sampler is not None:
        load_trainable(run.sampler.head, tensors["threshold"])
        load_optimizer(run.sampler.head, run.sampler.optimizer, tensors["threshold_optimizer"])
    for name in ("step", "inner", "updates", "calls", "elapsed"):
        setattr(run, name, state[name])
    run.anchors.adapted = state["keep"]
    run.anchors.solved = {int(index): share for index, share in state.get("solved", {}).items()}
    run.batch = restore_batch(tensors["batch"], state["batch"], run.denoiser.device) if "batch" in state else None
    cut_logs(run, state["log_bytes"])
    return [*notes, f"resumed from {checkpoint.path.name} (step {run.step}, inner update {run.inner})"]


def cut_logs(run: Run, sizes: dict[str, int]) -> None:
    """By the main process alone: another, if late, would cut off what it has written since."""
    for name, size in sizes.items() if run.accelerator.is_main_process else ():
        truncate_file(run.out / name, size)


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """The open step as named tensors."""
    rollout = {f"rollout/{k}": v for f in fields(Rollout) if isinstance(v := getattr(batch.rollout, k := f.name), Tensor)}
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
    prefix, tensors = "rollout/", {name: tensor.to(device) for name, tensor in tensors.items()}
    rollout: dict[str, Any] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rollout |= {key: state[key] for key in ("gen_length", "temperature", "exact")}
    choices = {k.removeprefix("choices/"): v for k, v in tensors.items() if k.startswith("choices/")}
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


def _shard_mode(recipe: Recipe, accelerator: Accelerator) -> str:
    """train.shard, or what accelerate's own FSDP settings ask for."""
    mode, kind = recipe.train.shard, accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "accelerate is configured for DeepSpeed, whose engine owns the optimiser step that this loop does itself; "
            "train.shard=zero2 splits the same tensors: launch with configs/accelerate/zero2.yaml"
        )
    if kind == DistributedType.FSDP and mode == "none":
        plugin = accelerator.state.fsdp_plugin
        mode = "fsdp" if plugin is None or plugin.reshard_after_forward else "zero2"
    if mode != "none" and accelerator.num_processes == 1:
        raise ValueError(f"train.shard={mode} splits weights over processes and there is one; start with `accelerate launch`")
    return mode


def _compare_config(recipe: Recipe, out: Path) -> None:
    """On resume, refuse a recipe that is not the stored one; how weights are split changes rounding only."""
    path, data = out / "config.yaml", recipe.model_dump(mode="json")
    # settings that came after the run was started have their defaults in it
    stored = build_recipe(yaml.safe_load(path.read_text())).model_dump(mode="json") if path.exists() else data
    different = [
        f"{section}.{key}" if key else section
        for section, values in data.items()
        for key in (values if isinstance(values, dict) else [""])
        if key not in ("shard", "gather_rollout")
        and (values[key] if key else values) != (stored.get(section, {}).get(key) if key else stored.get(section))
    ]
    if different:
        raise ValueError(f"--resume: {', '.join(different)} differ from {path}; use the settings of the stored run")


def _choose_threads(recipe: Recipe, out: Path) -> int:
    """The measured number of threads, kept with the run: a resumed run must sum in the same order."""
    path = out / "threads.json"
    if path.exists():
        return set_threads(json.loads(path.read_text())["threads"])
    threads = set_threads(recipe.train.threads)
    write_json(path, {"threads": threads})
    return threads
