"""What a training run knows while it runs, and what its ranks share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.rollouts import Placed, Rollouts
from ..models.denoiser import ModelDenoiser
from ..models.loading import write_tokenizer
from ..models.weights import load_trainable, trainable
from ..recipes.memory import AUTO_ON_CPU
from ..recipes.registry import Method
from ..recipes.schema import AUTO, OptimizerConfig
from ..reporting.merging import over_ranks
from ..reporting.progress import Progress
from ..tasks import Task, TrlReward
from ..utils.lock import Lock
from ..utils.stopping import Abandoned, Lost, Stop
from .folder.checkpoint import Checkpoint
from .folder.fitting import (
    check_optimizer_group,
    check_tensors,
    group_of,
    real_number,
    whole_number,
)
from .folder.optimizer_state import load_optimizer, optimizer_numbers, optimizer_tensors
from .ranks.shard import Gathered, Lockstep, clip_gradients, finish_lockstep, is_split
from .ranks.watched import watched
from .rollouts.anchors import Anchors
from .rollouts.engine import start_engine
from .rollouts.open_step import Batch, batch_state, batch_tensors, restore_batch
from .rollouts.problems import Problems
from .rollouts.threshold_policy import Sampler

SERVED = "served"  # the folder of weights for a server
HEAD_OPTIMIZER = OptimizerConfig()  # of the threshold head: AdamW
Groups = dict[str, dict[str, Tensor]]  # what a checkpoint holds: a file of tensors per group


@dataclass(slots=True, kw_only=True)
class Training:
    """What every kind of run has: weights, their optimiser, a folder, ranks, and where it stands.

    ``step``, ``inner`` and ``updates`` say where; ``inner`` is 0 outside of an open step.
    """

    recipe: Any  # Recipe or SFTRecipe
    out: Path
    accelerator: Accelerator
    denoiser: ModelDenoiser  # what is trained
    average: dict[str, Tensor]
    tokenizer: Any
    tokenizer_folder: Path | None  # None: the byte tokenizer
    optimizer: torch.optim.Optimizer
    threads: int = 1
    step: int = 0
    inner: int = 0
    updates: int = 0
    elapsed: float = 0.0
    trackers: bool = field(default=False)
    notes: list[str] = field(default_factory=list)
    lock: Lock | None = None  # the main process's, of the folder
    # settings that are not those of the stored run
    changed: list[str] = field(default_factory=list)
    saved: int = -1  # updates at the last checkpoint that was read or (tried to be) written
    stop: Stop = field(default_factory=Stop)
    progress: Progress = field(default_factory=Progress)  # silent, unless somebody looks
    saved_at: float = field(default_factory=time.monotonic)
    unsaved: str = ""  # why the last attempt failed, if it did
    skipped: int = 0  # updates in a row that were not made because they are not finite
    # |advantage| and |ratio - 1| of the newest update
    largest: dict[str, float] = field(default_factory=dict)

    def groups(self) -> Groups:
        """All tensors that the rest of the run depends on. Sharded ones are this rank's part."""
        return {
            "model": dict(trainable(self.denoiser.model)),
            "ema": self.average,
            "optimizer": optimizer_tensors(self.denoiser.model, self.optimizer),
        }

    def numbers(self) -> dict[str, Any]:
        """All else that it depends on, for this kind of run."""
        return {}

    def check_own(self, checkpoint: Checkpoint) -> None:
        """ValueError (or KeyError, TypeError) if a checkpoint lacks what this kind of run needs."""

    def restore_own(self, checkpoint: Checkpoint) -> None:
        """Take over what ``check_own`` has checked."""

    def write_tokenizer(self, folder: Path) -> None:
        """Put the model's tokenizer beside its weights."""
        write_tokenizer(self.tokenizer_folder, folder)

    def check_place(self) -> None:
        """ValueError if the folder is not this process's any more: deleted, moved, or taken
        over.
        """
        if self.lock is not None and not self.lock.is_held():
            raise ValueError(
                f"{self.out} was deleted, moved or taken by another process while this one trained "
                f"(its {self.lock.path.name} "
                f"file is gone): stopped at step {self.step}, nothing more is written there"
            )

    def droppable(self) -> AbstractContextManager[None]:
        """Work that a signal may cut short, because a resumed run repeats it alike. All ranks enter
        together.
        """
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
        # NCCL takes no tensor on the CPU
        return accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)

    def reduce_metrics(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """One figure per key from each rank's part of it, as the table of metrics says."""
        gathered = self._gather(
            torch.tensor([[float(value) for value in metrics.values()]], dtype=torch.float64)
        )
        columns = gathered.T.tolist()
        return {key: over_ranks(key, values) for key, values in zip(metrics, columns, strict=True)}

    def merge_over_ranks(self, metrics: dict[str, float | None]) -> dict[str, float | None]:
        """The same for figures that a rank may lack: of those that there are, None if there is
        none.
        """
        if self.accelerator.num_processes == 1:
            return metrics
        own = torch.tensor(
            [[float("nan") if v is None else float(v) for v in metrics.values()]],
            dtype=torch.float64,
        )
        merged: dict[str, float | None] = {}
        for key, values in zip(metrics, self._gather(own).T.tolist(), strict=True):
            known = [value for value in values if not math.isnan(value)]
            merged[key] = over_ranks(key, known) if known else None
        return merged

    def _gather(self, own: Tensor) -> Tensor:
        """A (1, N) tensor of every rank, (ranks, N), on the CPU."""
        accelerator: Any = self.accelerator
        return (
            own
            if accelerator.num_processes == 1
            else accelerator.gather(own.to(accelerator.device)).cpu()
        )

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


@dataclass(slots=True, kw_only=True)
class Run(Training):
    """A run of RL; ``batch`` is the open step."""

    frozen: ModelDenoiser  # the same weights for passes without gradient, inside ``inference``
    gathered: Gathered | None
    rollouts: Rollouts = field(init=False)  # used inside ``inference``
    reference: ModelDenoiser | None
    task: Task
    problems: Problems
    anchors: Anchors
    method: Method
    functions: dict[str, TrlReward]
    sampler: Sampler | None
    calls: int = 0
    batch: Batch | None = None
    # as chosen, where train.max_canvases=auto; fewer once memory was exhausted
    max_canvases: int = field(init=False)

    def __post_init__(self) -> None:
        given = self.recipe.train.max_canvases
        self.max_canvases = AUTO_ON_CPU if given == AUTO else given
        policy = watched(self.frozen, self._before_pass)
        self.rollouts = start_engine(self.recipe, self.method, policy)
        if isinstance(self.rollouts, Placed):
            self.rollouts.place(
                self.out / SERVED,
                lambda: f"step-{self.step}",
                self.stop.check,
                lambda text: self.progress.note(text),
            )

    def groups(self) -> Groups:
        """Also the threshold head with its optimiser, and the open step."""
        groups = Training.groups(self)
        if self.sampler is not None:
            head = self.sampler.head
            groups["threshold"] = dict(head.named_parameters())
            groups["threshold_optimizer"] = optimizer_tensors(head, self.sampler.optimizer)
        if self.batch is not None:
            groups["batch"] = batch_tensors(self.batch)
        return groups

    def numbers(self) -> dict[str, Any]:
        """Calls made, what the anchors have learnt, canvases alive if they were chosen, the head's
        optimiser, the open step.
        """
        state: dict[str, Any] = {
            "calls": self.calls,
            "keep": self.anchors.adapted,
            "solved": self.anchors.solved,
        }
        if self.sampler is not None:
            state["threshold_optimizer"] = optimizer_numbers(
                self.sampler.head, self.sampler.optimizer
            )
        if self.recipe.train.max_canvases == AUTO:
            state["max_canvases"] = self.max_canvases
        return state if self.batch is None else state | {"batch": batch_state(self.batch)}

    def check_own(self, checkpoint: Checkpoint) -> None:
        """The threshold head, the anchors' numbers and the open step."""
        tensors = checkpoint.tensors
        state = checkpoint.state
        if self.sampler is not None:
            head = self.sampler.head
            check_tensors("threshold", dict(head.named_parameters()), tensors)
            check_optimizer_group("threshold_optimizer", HEAD_OPTIMIZER, head, checkpoint)
        _own_numbers(state)
        _chosen_canvases(state)
        if state["inner"] and "batch" not in state:
            raise ValueError("it stands inside a step and holds no batch")
        if "batch" in state:
            restore_batch(group_of("batch", tensors), state["batch"], torch.device("cpu"))

    def restore_own(self, checkpoint: Checkpoint) -> None:
        """The same."""
        state = checkpoint.state
        if self.sampler is not None:
            head = self.sampler.head
            load_trainable(head, checkpoint.tensors["threshold"])
            kept = checkpoint.tensors["threshold_optimizer"]
            load_optimizer(head, self.sampler.optimizer, kept, state["threshold_optimizer"])
        self.calls, self.anchors.adapted, self.anchors.solved = _own_numbers(state)
        if self.recipe.train.max_canvases == AUTO:
            self.max_canvases = _chosen_canvases(state)
        if "batch" in state:
            batch = checkpoint.tensors["batch"]
            self.batch = restore_batch(batch, state["batch"], self.denoiser.device)

    @property
    def share_done(self) -> float:
        """How much of the run is over, by steps or, if train.minutes is set and further on, by
        time.
        """
        t = self.recipe.train
        return min(
            1.0, max(self.step / t.steps, self.elapsed / (60 * t.minutes) if t.minutes else 0.0)
        )

    @property
    def out_of_time(self) -> bool:
        """Whether train.minutes are over (counted over all parts of a resumed run, evaluation
        apart).
        """
        minutes = self.recipe.train.minutes
        return minutes is not None and self.elapsed >= 60 * minutes

    @property
    def trains_policy(self) -> bool:
        """Whether the policy's weights learn at this point of the run (sampler.mode)."""
        mode = self.recipe.sampler.mode
        return mode != "sampler" and not (
            mode == "sequential" and self.sampler and self.sampler.trains(self.share_done)
        )

    @property
    def sharded(self) -> bool:
        """Whether a pass through the model is a call that all ranks must make alike."""
        return self.frozen is not self.denoiser

    @contextmanager
    def inference(self) -> Iterator[ModelDenoiser]:
        """The policy for passes without gradient. All ranks enter together; inside, only the
        denoiser may communicate.
        """
        if self.gathered is not None:
            self.gathered.refresh()
        try:
            yield watched(self.frozen, self._before_pass)
        except (Abandoned, Lost):
            self._answer_others()
            raise
        self._answer_others()

    def _before_pass(self) -> None:
        """A signal leaves work that may be dropped; a pass that is made is shown."""
        self.stop.check()
        self.progress.call()

    def _answer_others(self) -> None:
        if isinstance(self.frozen, Lockstep):
            finish_lockstep(self.frozen)


def _own_numbers(state: dict[str, Any]) -> tuple[int, float, dict[int, float]]:
    """Calls, the anchors' keep and success by problem, as a checkpoint has them."""
    solved = state.get("solved", {})
    return (
        whole_number(state, "calls"),
        real_number(state, "keep"),
        {int(index): real_number(solved, index) for index in solved},
    )


def _chosen_canvases(state: dict[str, Any]) -> int:
    """Canvases alive, as chosen; 0 where none were, and a run that goes on has to choose."""
    return whole_number({"max_canvases": 0, **state}, "max_canvases")
