"""Supervised masked-diffusion training: of the shipped base from scratch, or of any checkpoint on a
task's references.

Per row, n ~ U{1..G} of the G completion tokens are masked and the loss is the mean cross-entropy
over them, i.e. the count-weighted ELBO (G / n) sum_{masked} -log p divided by G (LLaDA's 1/t weight
in its low-variance form). Completions are filled up with EOS, which is learnt as well. Batches and
masks depend on (seed, step) alone, so a run resumes exactly.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.decoding.sample import row_chunks
from ..core.finite import NotFiniteError, first_not_finite
from ..core.rng import named_generator
from ..models.checkpoint import save_model
from ..models.denoiser import ModelDenoiser
from ..models.loading import open_checkpoint
from ..models.tokenizer import (
    build_mini_tokenizer,
    copy_tokenizer,
    encode_prompt,
    encode_reference,
    load_tokenizer,
)
from ..models.weights import load_trainable
from ..recipes.optimizers import make_optimizer
from ..recipes.registry import COMPONENTS, make_task, setting
from ..recipes.schema import SFTMixture, SFTRecipe, SFTRun
from ..tasks import LazyTask, Task
from ..utils.files import append_jsonl, write_json
from ..utils.stopping import Stop, Stopped, signals_to
from ..utils.torch_setup import default_device, set_threads
from .bad_updates import last_good
from .folder.checkpoint import (
    Checkpoint,
    load_latest,
    save_checkpoint,
    set_aside,
)
from .folder.config import check_changes, keep_old, read_config
from .folder.optimizer_state import load_optimizer, optimizer_numbers, optimizer_tensors
from .folder.run_folder import (
    check_folder,
    claim_folder,
    cut_log,
    folder_of,
    hold_folder,
    sync_logs,
)
from .resume import check_optimizer_group, check_tensors, whole_number
from .schedule import learning_rate

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class SFTData:
    """Token ids of one part of the data: prompts (N, P), left-padded, their masks, right and lazy
    completions (N, G).
    """

    prompts: Tensor
    prompt_mask: Tensor
    references: Tensor
    lazy: Tensor
    part: SFTMixture

    def batch(
        self, step: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one step: with probability lazy_share the lazy demonstration, once lazy_from of
        the run is over.
        """
        index = torch.randint(len(self.prompts), (self.part.batch_size,), generator=generator)
        share = self.part.lazy_share if step >= self.part.lazy_from * steps else 0.0
        is_lazy = torch.rand(self.part.batch_size, generator=generator) < share
        completions = torch.where(is_lazy[:, None], self.lazy[index], self.references[index])
        return self.prompts[index], self.prompt_mask[index], completions


CONFIG = "config.json"
LOG = "log.jsonl"


def run_sft(
    recipe: SFTRecipe,
    *,
    resume: bool = False,
    force: bool = False,
    report: Report | None = None,
    stop_at: int | None = None,
) -> Path:
    """Train, log to ``log.jsonl``, checkpoint, and write the model folder ``model/``; returns the
    run's folder.

    ``stop_at`` ends after that many steps with the schedule of the whole run, to compare with its
    log.
    """
    out = folder_of(recipe.run.out, recipe.name, recipe.run.seed)
    check_folder(out, resume=resume, force=force)
    changed = (
        check_changes(recipe, read_config(out / CONFIG, SFTRecipe), out / CONFIG) if resume else []
    )
    set_threads(recipe.run.threads)
    lock = hold_folder(out) if resume else None
    try:
        # the tokenizer goes into the folder once everything could be built
        with tempfile.TemporaryDirectory() as aside:
            denoiser, tokenizer = _start_model(recipe, Path(aside))
            data = [encode_mixture(part, tokenizer, denoiser) for part in recipe.data]
            if lock is None:
                lock, notes = claim_folder(out, force=force)
                _say(notes, report)
            shutil.copytree(Path(aside) / "model", out / "model", dirs_exist_ok=True)
        _run_steps(
            recipe,
            out,
            denoiser,
            data,
            resume=resume,
            changed=changed,
            report=report,
            stop_at=stop_at,
        )
    finally:
        if lock is not None:
            lock.release()
    return out


def _run_steps(
    recipe: SFTRecipe,
    out: Path,
    denoiser: ModelDenoiser,
    data: list[SFTData],
    *,
    resume: bool,
    changed: list[str],
    report: Report | None,
    stop_at: int | None,
) -> None:
    """From where the folder's newest checkpoint stands to the model folder."""
    steps = recipe.train.steps
    optimizer = make_optimizer(recipe.optimizer, denoiser.model.parameters())
    first = _resume(out, recipe, denoiser.model, optimizer, report) if resume else 0
    if changed:
        keep_old(out / CONFIG)
    write_json(out / CONFIG, recipe.model_dump(mode="json"))
    stop = Stop()
    start = time.perf_counter()
    saver = _Saver(out, denoiser.model, optimizer, recipe.run, report)
    with signals_to(stop.handle):
        for step in range(first, steps if stop_at is None else stop_at):
            with _explaining(out, step + 1):
                losses, norm, rate = _update(denoiser, optimizer, data, recipe, step)
            if (step + 1) % recipe.run.log_every == 0 or step + 1 == steps:
                row = {
                    "step": step + 1,
                    "loss": sum(losses) / len(losses),
                    "lr": rate,
                    "grad_norm": norm,
                }
                row |= {
                    f"loss/{i}_{p.task['name']}": v
                    for i, (p, v) in enumerate(zip(recipe.data, losses, strict=True))
                }
                append_jsonl(out / LOG, [row])
                if report:
                    report({**row, "steps": steps, "seconds": time.perf_counter() - start})
            last = step + 1 == steps  # kept: a finished run can be made longer
            if last or stop.signum or saver.is_due(step + 1):
                with _explaining(out, step + 1):
                    failed = saver.save(step + 1)
                if stop.signum and not last:
                    place = (
                        f"stopped at step {step + 1} of {steps}; all of it is in "
                        f"{out / 'checkpoints'}"
                    )
                    raise Stopped(stop.signum, failed or place, resumable=True)
    save_model(denoiser.model, out / "model")


@contextmanager
def _explaining(out: Path, step: int) -> Iterator[None]:
    """What is not finite, with the step and what there is to go on from."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"step {step}: {error}; {last_good(out)}") from None


def encode_mixture(part: SFTMixture, tokenizer: Any, denoiser: ModelDenoiser) -> SFTData:
    """References and lazy demonstrations of a task's training problems as ids."""
    task = mixture_task(part)
    examples = task.examples("train")[: part.num_examples][: part.first]
    # a problem without a known solution teaches nothing here
    pairs = [(e, text) for e in examples if (text := task.reference(e)) is not None]
    if not pairs:
        raise ValueError(
            f"{task.name}: none of {len(examples)} problems has a reference to learn from: give "
            "others"
        )
    prompts = [encode_prompt(tokenizer, task.prompt(example)) for example, _ in pairs]
    references = _encode_all(tokenizer, [text for _, text in pairs])
    lazy = references
    if isinstance(task, LazyTask):
        lazy = _encode_all(tokenizer, [task.lazy(example) for example, _ in pairs])
    elif part.lazy_share > 0:
        raise ValueError(
            f"data.lazy_share is {part.lazy_share}, but task {task.name} has no lazy policy: set "
            "it to 0"
        )
    longest = max(map(len, references + lazy)) + 1
    if longest > part.gen_length:
        raise ValueError(
            f"{task.name}: a completion has {longest} tokens, gen_length is {part.gen_length}: "
            "raise it"
        )
    width = max(map(len, prompts))
    return SFTData(
        prompts=torch.tensor([[denoiser.pad_id] * (width - len(p)) + p for p in prompts]),
        prompt_mask=torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]),
        references=torch.tensor(
            [r + [denoiser.eos_id] * (part.gen_length - len(r)) for r in references]
        ),
        lazy=torch.tensor([r + [denoiser.eos_id] * (part.gen_length - len(r)) for r in lazy]),
        part=part,
    )


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each completion; of sudoku's 60,000 few hundred differ, and each is encoded once."""
    known = {text: encode_reference(tokenizer, text, [])[0] for text in dict.fromkeys(texts)}
    return [known[text] for text in texts]


def mixture_task(part: SFTMixture) -> Task:
    """The task of one part of the data; one that generates its problems makes ``num_examples`` of
    them.
    """
    generates = setting(part.task, COMPONENTS["task"], "train_size", "data.task") is not None
    size = {"train_size": part.num_examples} if generates else {}
    return make_task({**part.task, **size}, "data.task")


def masked_loss(
    denoiser: ModelDenoiser,
    prompts: Tensor,
    prompt_mask: Tensor,
    completions: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean over rows of the mean cross-entropy (nats per token) over n masked tokens, n ~ U{1..G},
    stratified over rows.
    """
    batch, gen_length = completions.shape
    share = (torch.arange(batch) + torch.rand((), generator=generator)) / batch
    count = 1 + (share * gen_length).long().clamp(max=gen_length - 1)
    rank = (
        torch.rand(batch, gen_length, generator=generator, dtype=torch.float64)
        .argsort(-1)
        .argsort(-1)
    )
    masked = (rank < count[:, None]).to(completions.device)
    ids = torch.cat([prompts, torch.where(masked, denoiser.mask_id, completions)], 1)
    attention = torch.cat([prompt_mask, torch.ones_like(masked)], 1)
    hidden = denoiser.hidden(ids, None if bool(attention.all()) else attention)[:, -gen_length:]
    weight = (1.0 / count.to(completions.device) / batch)[:, None].expand_as(masked)[masked]
    hidden_RD = hidden[masked]
    targets = completions[masked]
    total = hidden.new_zeros(())
    for rows in row_chunks(len(targets), denoiser.vocab_size):
        loss = nn.functional.cross_entropy(
            denoiser.head(hidden_RD[rows]).float(), targets[rows], reduction="none"
        )
        total = total + (loss * weight[rows]).sum()
    return total


def _update(
    denoiser: ModelDenoiser,
    optimizer: torch.optim.Optimizer,
    data: list[SFTData],
    recipe: SFTRecipe,
    step: int,
) -> tuple[list[float], float, float]:
    """One step: the loss (nats per token) of each part, the gradient norm, the learning rate."""
    o = recipe.optimizer
    steps = recipe.train.steps
    losses = []
    optimizer.zero_grad(set_to_none=True)
    for i, part in enumerate(data):
        generator = named_generator(recipe.run.seed, "sft-batch", step, i)
        prompts, mask, completions = (
            t.to(denoiser.device) for t in part.batch(step, steps, generator)
        )
        loss = masked_loss(denoiser, prompts, mask, completions, generator)
        (loss / len(data)).backward()
        losses.append(float(loss.detach()))
    norm = float(nn.utils.clip_grad_norm_(denoiser.model.parameters(), o.max_grad_norm))
    if not all(map(math.isfinite, [*losses, norm])):
        raise NotFiniteError(
            f"loss {sum(losses) / len(losses)}, gradient norm {norm}; lower optimizer.lr"
        )
    share_done = max(0.0, step - o.warmup) / max(1, steps - o.warmup)
    rate = learning_rate(step, share_done, lr=o.lr, warmup=o.warmup, schedule=o.schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return losses, norm, rate


def _start_model(recipe: SFTRecipe, out: Path) -> tuple[ModelDenoiser, Any]:
    folder = out / "model"
    if recipe.model.path:
        denoiser, tokenizer, source = open_checkpoint(recipe.model.path, default_device())
        copy_tokenizer(source, folder)
        return denoiser, tokenizer
    from ..models.families.llada import LLaDA, LLaDAConfig

    build_mini_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    m = recipe.model
    config = LLaDAConfig(
        d_model=m.d_model,
        n_heads=m.n_heads,
        n_kv_heads=m.n_heads,
        n_layers=m.n_layers,
        mlp_hidden_size=m.mlp_hidden_size,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        weight_tying=True,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LLaDA(config)
    model.init_weights(named_generator(recipe.run.seed, "init"))
    return ModelDenoiser.from_model(model.to(default_device())), tokenizer


@dataclass(slots=True)
class _Saver:
    """Checkpoints by steps and by minutes."""

    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: SFTRun
    report: Report | None
    last: float = field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        minutes = self.settings.save_minutes
        return step % self.settings.save_every == 0 or (
            minutes is not None and time.monotonic() - self.last >= 60 * minutes
        )

    def save(self, step: int) -> str:
        """Write one; why it failed, if it did: training goes on, and the older ones are there."""
        self.last = time.monotonic()
        tensors = {
            "model": dict(self.model.named_parameters()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        bad = first_not_finite(
            {f"{group} {name}": t for group, named in tensors.items() for name, t in named.items()}
        )
        if bad is not None:
            raise NotFiniteError(f"{bad} is not finite, nothing is saved; lower optimizer.lr")
        state = {
            "step": step,
            "log_bytes": sync_logs(self.out, (LOG,))[LOG],
            "optimizer": optimizer_numbers(self.model, self.optimizer),
        }
        try:
            save_checkpoint(
                self.out / "checkpoints", step, tensors, state, keep=self.settings.keep_checkpoints
            )
        except OSError as error:
            if self.report:
                self.report({"note": f"warning: {error}"})
            return str(error)
        return ""


def _resume(
    out: Path,
    recipe: SFTRecipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Report | None,
) -> int:
    def fit(checkpoint: Checkpoint) -> tuple[int, int]:
        check_tensors("model", dict(model.named_parameters()), checkpoint.tensors)
        check_optimizer_group("optimizer", recipe.optimizer, model, checkpoint)
        return whole_number(checkpoint.state, "step"), whole_number(checkpoint.state, "log_bytes")

    found = load_latest(out / "checkpoints", fit)
    step, log_bytes = found.value or (0, 0)
    if step > recipe.train.steps:
        raise ValueError(
            f"train.steps={recipe.train.steps}: {out} stands at step {step} already; set at "
            "least that"
        )
    if found.checkpoint is not None:
        load_trainable(model, found.checkpoint.tensors["model"])
        state = found.checkpoint.state["optimizer"]
        load_optimizer(model, optimizer, found.checkpoint.tensors["optimizer"], state)
    _say([*found.notes, *set_aside(found.damaged), *cut_log(out / LOG, log_bytes)], report)
    return step


def _say(notes: list[str], report: Report | None) -> None:
    if report is not None:
        for note in notes:
            report({"note": note})
