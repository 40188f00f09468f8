"""State of a training run (shell): what is built from a recipe, what a checkpoint holds, what ranks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn

from .adapters import WithoutAdapters
from .build import COMPONENTS, make_estimator, make_loss
from .checkpoint import write_json
from .config import Recipe
from .denoiser import ModelDenoiser, read_json
from .estimators import Estimator
from .loading import open_model
from .lock import Lock
from .losses import PolicyLoss
from .probe import check_probe, masked_accuracy
from .reward_trial import try_rewards
from .rng import named_generator
from .rollouts import Anchors, Problems, make_task
from .run_config import CONFIG, check_changes, describe_changes, read_config, write_config
from .run_folder import check_folder, claim_folder, folder_of, hold_folder
from .sampler import Choices, Sampler
from .shard import Gathered, Lockstep, clip_gradients, finish_lockstep, is_split, shard_blocks
from .shell import set_threads
from .stopping import Abandoned, Stop
from .tasks import Task, TrainerState, TrlReward, load_function
from .tokenizer import encode_reference
from .types import Rollout
from .watched import watched
from .weights import frozen_copy, start_average, trainable

PROBE_PROBLEMS = 32
WAIT = timedelta(days=1)  # of ranks while one evaluates or saves; a rank that dies is noticed by the launcher, not by this


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
    lock: Lock | None = None  # the main process's, of the folder
    changed: list[str] = field(default_factory=list)  # settings that are not those of the stored run
    saved: int = -1  # updates at the last checkpoint that was read or (tried to be) written
    stop: Stop = field(default_factory=Stop)
    saved_at: float = field(default_factory=time.monotonic)
    unsaved: str = ""  # why the last attempt failed, if it did
    skipped: int = 0  # updates in a row that were not made because they are not finite
    largest: dict[str, float] = field(default_factory=dict)  # |advantage| and |ratio - 1| of the newest update

    def check_place(self) -> None:
        """ValueError if the folder is not this process's any more: deleted, moved, or taken over."""
        if self.lock is not None and not self.lock.is_held():
            raise ValueError(
                f"{self.out} was deleted, moved or taken by another process while this one trained (its {self.lock.path.name} "
                f"file is gone): stopped at step {self.step}, nothing more is written there"
            )

    @property
    def share_done(self) -> float:
        """How much of the run is over, by steps or, if train.minutes is set and further on, by time."""
        t = self.recipe.train
        return min(1.0, max(self.step / t.steps, self.elapsed / (60 * t.minutes) if t.minutes else 0.0))

    @property
    def out_of_time(self) -> bool:
        """Whether train.minutes are over (counted over all parts of a resumed run, evaluation apart)."""
        minutes = self.recipe.train.minutes
        return minutes is not None and self.elapsed >= 60 * minutes

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
        try:
            yield watched(self.frozen, self.stop)
        except Abandoned:
            self._answer_others()
            raise
        self._answer_others()

    def _answer_others(self) -> None:
        if isinstance(self.frozen, Lockstep):
            finish_lockstep(self.frozen)

    def droppable(self) -> AbstractContextManager[None]:
        """Work that a signal may cut short, because a resumed run repeats it alike. All ranks enter together."""
        return self.stop.droppable(self.most)

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
    """Build a run from its recipe; only when all of it could be built is its folder made (by ``force``: the old one moved).

    The main process holds the folder's lock when this returns (``Run.lock``).
    """
    patience = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    out, lock = folder_of(recipe.train.out, recipe.name, recipe.train.seed), None
    accelerator.project_configuration = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard"))
    if accelerator.is_main_process:  # the other ranks may look when the folder is already there
        check_folder(out, resume=resume, force=force)
        lock = hold_folder(out) if resume else None
    try:
        changed, notes = _check_stored(recipe, out) if resume else ([], [])
        run = _build_run(recipe, accelerator, out, resume=resume)
        if accelerator.is_main_process and not resume:
            lock, moved = claim_folder(out, force=force)
            notes += moved
            write_config(recipe, out)
        if accelerator.is_main_process:
            _choose_threads(recipe, out)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    run.lock, run.changed, run.notes = lock, changed, [*notes, *run.notes]
    accelerator.wait_for_everyone()
    run.threads = _choose_threads(recipe, out)
    return run


def _build_run(recipe: Recipe, accelerator: Accelerator, out: Path, *, resume: bool) -> Run:
    shard = _shard_mode(recipe, accelerator)
    if recipe.train.prompts_per_step % accelerator.num_processes:
        raise ValueError(
            f"train.prompts_per_step={recipe.train.prompts_per_step} on {accelerator.num_processes} processes: every process "
            "takes as many prompts, so set a multiple of their number"
        )
    denoiser, tokenizer, folder = open_model(recipe.model, accelerator.device, recipe.train.seed)
    task = make_task(recipe)
    problems = Problems(recipe, task, tokenizer, denoiser.max_length)
    functions = {name: load_function(name, "train.reward_functions") for name in recipe.train.reward_functions}
    state = TrainerState(global_step=0, max_steps=recipe.train.steps)
    tried = try_rewards(task, tokenizer, problems.examples[0], functions, state=state, run_name=recipe.name)
    notes = [*problems.notes, *tried, *([] if resume else probe_model(recipe, denoiser, problems))]
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
    return Run(
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
        functions=functions,
        optimizer=optimizer,
        sampler=Sampler.start(recipe, denoiser, folder),
        notes=notes,
    )


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


def _check_stored(recipe: Recipe, out: Path) -> tuple[list[str], list[str]]:
    """Changed settings of a run that goes on, and what to say of them; ValueError if one belongs to its past."""
    stored = read_config(out / CONFIG)
    changed = check_changes(recipe, stored, out / CONFIG)
    return changed, describe_changes(recipe, stored, changed)


def _choose_threads(recipe: Recipe, out: Path) -> int:
    """The measured number of threads, kept with the run: a resumed run must sum in the same order, unless told otherwise."""
    path, wanted = out / "threads.json", recipe.train.threads
    if path.exists():
        stored = read_json(path).get("threads")
        if isinstance(stored, bool) or not isinstance(stored, int) or stored < 1:
            raise ValueError(f"{path}: expected a number of threads, got {stored!r}; delete it")
        if wanted in (0, stored):
            return set_threads(stored)
    threads = set_threads(wanted)
    write_json(path, {"threads": threads})
    return threads
