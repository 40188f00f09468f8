"""Supervised masked-diffusion training: of the shipped base from scratch, or of any checkpoint on a
task's references.

Per row, n ~ U{1..G} of the G completion tokens are masked and the loss is the mean cross-entropy
over them, i.e. the count-weighted ELBO (G / n) sum_{masked} -log p divided by G (LLaDA's 1/t weight
in its low-variance form). Completions are filled up with EOS, which is learnt as well. Batches and
masks depend on (seed, step) alone, so a run resumes exactly; ranks take every n-th row of a batch.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...core.rng import named_generator
from ...models.compiled import graph_news
from ...models.denoiser import ModelDenoiser
from ...models.families import SDAR, LLaDA, LLaDAConfig, MaskPredictor, SDARConfig
from ...models.tokenizer import build_mini_tokenizer, load_tokenizer
from ...models.weights import start_average, trainable, update_average
from ...recipes.checks import check_eval_decode
from ...recipes.optimizers import learning_rate, make_optimizer
from ...recipes.schema import SFTRecipe
from ...reporting.progress import Progress
from ...utils.torch_setup import DTYPES
from ..bad_updates import refused
from ..conduct import conduct
from ..log import write_row
from ..ranks.shard import shard_blocks
from ..saved_models import save_models
from ..saving import is_late, save, saved_if_stopped
from ..setup import begin, checked_shard, compile_if_set, open_model
from ..state import Training
from .data import SFTData, encode_mixture
from .loss import masked_loss


@dataclass(slots=True, kw_only=True)
class SupervisedRun(Training):
    """A supervised run."""

    data: list[SFTData]

    def write_tokenizer(self, folder: Path) -> None:
        """That of the checkpoint, or the one of the shipped base for a new model."""
        if self.recipe.model.path:
            Training.write_tokenizer(self, folder)
        else:
            build_mini_tokenizer(folder)


def run_sft(
    recipe: SFTRecipe,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    stop_at: int | None = None,
) -> SupervisedRun:
    """Train, log to ``metrics.jsonl``, checkpoint, and write the model folder ``model/``; returns
    the run as it ended.

    ``stop_at`` ends after that many steps with the schedule of the whole run, to compare with its
    log.
    """

    def go_on(run: SupervisedRun) -> SupervisedRun:
        with saved_if_stopped(run, run.progress):
            while run.step < (stop_at or recipe.train.steps):
                do_step(run)
                run.stop.obey(run.most)
            if run.step == recipe.train.steps:
                save(run, run.progress)  # from which a longer run can go on
        save_models(run, recipe.eval_decode)
        return run

    start = partial(begin, recipe, partial(build_run, recipe), resume=resume, force=force)
    return conduct(recipe, start, go_on, resume=resume, progress=progress)


def build_run(recipe: SFTRecipe, accelerator: Accelerator, out: Path) -> SupervisedRun:
    """Model, data and optimiser; no step is made and nothing is written."""
    rows = {f"data.{i}.batch_size": part.batch_size for i, part in enumerate(recipe.data)}
    shard = checked_shard(recipe, accelerator, rows)
    if recipe.model.path:
        denoiser, tokenizer, folder = open_model(recipe.model, accelerator.device, recipe.run.seed)
    else:
        denoiser, tokenizer = new_model(recipe, accelerator.device)
        folder = None
    check_eval_decode(recipe, denoiser.block_length)
    notes = compile_if_set(recipe.model, denoiser)
    data = [encode_mixture(part, tokenizer, denoiser) for part in recipe.data]
    if shard != "none":
        shard_blocks(denoiser.model, shard)
    return SupervisedRun(
        recipe=recipe,
        out=out,
        accelerator=accelerator,
        denoiser=denoiser,
        average=start_average(denoiser.model) if recipe.train.ema else {},
        tokenizer=tokenizer,
        tokenizer_folder=folder,
        optimizer=make_optimizer(recipe.optimizer, trainable(denoiser.model).values()),
        data=data,
        notes=notes,
    )


def do_step(run: SupervisedRun) -> None:
    """One update, its row of the log and, when it is due, a checkpoint."""
    r = run.recipe.run
    began = time.perf_counter()
    row = update(run)
    run.step += 1
    run.updates += 1
    run.elapsed += run.most(time.perf_counter() - began)
    if note := graph_news(run.denoiser.model):
        run.progress.note(note)
    if run.step % r.log_every == 0 or run.step == run.recipe.train.steps:
        row = {"step": run.step, "seconds": run.elapsed, **row}
        write_row(run, row)
        run.progress.step(row)
    if run.updates % r.save_every == 0 or run.most(float(is_late(run))):
        save(run, run.progress)


def update(run: SupervisedRun) -> dict[str, float]:
    """One optimiser step: the loss (nats per token) of each part of the data and their mean, the
    gradient norm, the learning rate. What is not finite is not stepped on.
    """
    o = run.recipe.optimizer
    model = run.denoiser.model
    ranks = slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    parts = {}
    run.optimizer.zero_grad(set_to_none=True)
    for i, part in enumerate(run.data):
        generator = named_generator(run.recipe.run.seed, "sft-batch", run.step, i)
        batch = part.batch(run.step, run.recipe.train.steps, generator)
        prompts, mask, completions = (t.to(run.denoiser.device) for t in batch)
        loss = masked_loss(run.denoiser, prompts, mask, completions, generator, ranks)
        (loss / len(run.data)).backward()
        parts[f"loss/{i}_{part.part.task['name']}"] = run.total(float(loss.detach()))
    share_done = max(0.0, run.step - o.warmup) / max(1, run.recipe.train.steps - o.warmup)
    rate = learning_rate(o, run.step, share_done)
    row = {
        "loss": sum(parts.values()) / len(parts),
        "lr": rate,
        "grad_norm": run.sum_gradients(model, o.max_grad_norm),
        "updates/skipped": 0.0,
        **parts,
    }
    if note := refused(run, row):
        run.progress.note(note)
        return {"lr": rate, "updates/skipped": 1.0}
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    update_average(run.average, model, run.recipe.train.ema)
    return row


def new_model(recipe: SFTRecipe, device: torch.device) -> tuple[ModelDenoiser, Any]:
    """A model of the recipe's sizes with random weights, and the tokenizer of the shipped base: in
    SDAR's layout with a ``block_length``, in LLaDA's without.
    """
    m = recipe.model
    with tempfile.TemporaryDirectory() as folder:
        build_mini_tokenizer(folder)
        tokenizer = load_tokenizer(Path(folder))
    shared = {
        "d_model": m.d_model,
        "n_heads": m.n_heads,
        "n_kv_heads": m.n_heads,
        "n_layers": m.n_layers,
        "mlp_hidden_size": m.mlp_hidden_size,
        "vocab_size": len(tokenizer),
        "weight_tying": True,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: MaskPredictor
    if m.block_length is None:
        model = LLaDA(LLaDAConfig(embedding_size=len(tokenizer), **shared))
    else:
        width = m.d_model // m.n_heads
        model = SDAR(SDARConfig(block_length=m.block_length, head_size=width, **shared))
    model.init_weights(named_generator(recipe.run.seed, "init"))
    model.recompute = m.activation_checkpointing
    return ModelDenoiser.from_model(model.to(device, DTYPES[m.dtype])), tokenizer
