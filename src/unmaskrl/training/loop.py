"""The RL loop, to be read from top to bottom: rollout, reward, advantage, inner updates, log,
checkpoint.

It is explicit on purpose (no trainer class of another library): what happens in a step is
``collect`` and ``update``. Every draw comes from a generator named by (seed, purpose, step), so a
checkpoint holds no generator states and a resumed run repeats the interrupted one bit for bit.
Ranks (accelerate launch) hold whole groups; gradients are summed and losses are normalised by
global counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.advantages import group_sum, groups_with_spread
from ..core.estimators import Update
from ..core.importance import progress_of, summarise
from ..core.losses import PolicyLoss
from ..core.rng import named_generator, named_seed
from ..core.scoring import (
    backward_in_chunks,
    behavior_gap,
    count_canvases,
    frozen_token_logps_over,
    num_passes,
)
from ..core.types import LossOutputs, Rollout, TrainBatch, Views
from ..models.compiled import graph_news
from ..models.denoiser import ModelDenoiser
from ..models.weights import update_average
from ..recipes.optimizers import learning_rate
from ..recipes.schema import Recipe
from ..reporting.html import write_report
from ..reporting.progress import Progress
from ..tasks import TrlReward
from .bad_updates import check_rewards, refused
from .conduct import conduct
from .first_ratio import check_first_ratio
from .held_out import evaluate_due, evaluate_run
from .log import alarms, log_samples, log_step, rollout_metrics, write_summary
from .memory_notes import memory_notes, with_fewer_canvases
from .ranks.shard import extra_passes
from .rollouts.collect import most_calls, rollout_step
from .rollouts.first_contact import first_contact
from .rollouts.open_step import Batch
from .rollouts.problems import Rewarded
from .saved_models import save_models
from .saving import is_late, save, saved_if_stopped
from .setup import start_run
from .state import Run


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    rewards: Sequence[TrlReward] = (),
) -> dict[str, Any]:
    """Run a recipe (or go on with it) and return its summary; everything else is in the run
    folder. ``rewards``: functions of TRL's contract beside those that the recipe names.
    """
    began = time.perf_counter()

    def go_on(run: Run) -> dict[str, Any]:
        for note in [*run.anchors.notes(), *memory_notes(run)]:
            run.progress.note(note)
        run_steps(run, run.progress)
        save_models(run, {recipe.task["name"]: recipe.decode})
        summary = write_summary(run, wall_minutes=(time.perf_counter() - began) / 60)
        if run.accelerator.is_main_process:
            write_report(run.out)
        return {**summary, "unsaved": run.unsaved}

    start = partial(start_run, recipe, resume=resume, force=force, rewards=rewards)
    return conduct(recipe, start, go_on, resume=resume, progress=progress)


def run_steps(run: Run, progress: Progress) -> None:
    """All steps and evaluations that are left; Stopped after a signal, with a checkpoint of where
    the run stands.
    """
    recipe = run.recipe
    first = True
    with saved_if_stopped(run, progress):
        first_contact(run)
        evaluate_due(run, progress)
        while run.step < recipe.train.steps and not run.out_of_time:
            do_step(run, progress, check_ratio=first)
            run.stop.obey(run.most)
            evaluate_due(run, progress)
            first = False
        save(run, progress)  # from which a longer run can go on
        progress.note("evaluating on held-out problems")
        evaluate_run(run, "test", ["raw", "ema"] if recipe.train.ema else ["raw"], progress)


def do_step(run: Run, progress: Progress, *, check_ratio: bool) -> None:
    """Finish one step, wherever inside it the run stands."""
    recipe = run.recipe
    began = time.perf_counter()
    due = False
    if run.batch is None:
        run.progress.phase(
            "rollout", most_calls(recipe.decode, run.denoiser.block_length), unit="calls"
        )
        run.batch = collect(run)
    alone = run.accelerator.num_processes == 1
    while run.inner < recipe.train.num_iterations:
        # ranks hold different rows, so with several a checkpoint, and a stop, waits for the end of
        # the step
        if alone:
            run.stop.obey(run.most)
        run.progress.phase("update", recipe.train.num_iterations, run.inner + 1)
        if note := update(run, run.batch, check_ratio=check_ratio and run.inner == 0):
            progress.note(note)
        run.inner += 1
        run.updates += 1
        due = due or run.updates % recipe.run.save_every == 0 or (alone and is_late(run))
        if due and run.inner < recipe.train.num_iterations and alone:
            save(run, progress)
            due = False
    run.step = run.step + 1
    run.inner = 0
    # one clock: rates, modes and the end follow from it
    run.elapsed += run.most(time.perf_counter() - began)
    row = log_step(run, run.batch)
    progress.step(row)
    if note := graph_news(run.denoiser.model):
        progress.note(note)
    run.batch = None
    if run.step % recipe.eval.every == 0:
        for note in alarms(row):
            progress.note(note)
    if due or run.most(float(is_late(run))):  # clocks differ, so the ranks decide together
        save(run, progress)


def collect(run: Run) -> Batch:
    """Rollouts, rewards and advantages of one step, and the old and reference likelihoods of all
    its inner updates.
    """
    clock = time.perf_counter
    began = clock()
    with run.droppable(), run.inference() as policy:
        run.rollouts.sync()
        done = roll_out(run, policy)
        decoded = clock()
        run.progress.phase("scoring", unit="passes")
        gap = sampling_gap(run, policy, done.rollout)
    group_ids = done.rollout.group_ids.cpu()
    advantages = advantages_of(run, done.rewards, group_ids).to(done.rollout.ids.device)
    largest = check_rewards(run, done, advantages)
    metrics = rollout_metrics(run, done) | {"advantage/largest": largest}
    used = trained_rows(run, groups_with_spread(done.rewards, group_ids)).to(
        done.rollout.ids.device
    )
    rollout = done.rollout.rows(used)
    advantages = advantages[used]
    metrics["health/behavior_gap"] = gap
    graded = clock()
    with run.droppable(), run.inference() as policy:
        old, ref, canvases = frozen_likelihoods(run, policy, rollout, advantages)
    # up to here nothing but this function's own names has changed: a signal may drop it all
    log_samples(run, done)
    run.anchors.learn(done, run.step, run.reduce)
    metrics |= {
        "calls/score": run.total(float(canvases)),
        "seconds/rollout": decoded - began,
        "seconds/reward": graded - decoded,
        "seconds/score": clock() - graded,
        "groups/used_rows": float(len(used)),
    }
    return Batch(
        rollout=rollout,
        advantages=advantages,
        old_logps=old,
        ref_logps=ref,
        group_actions=group_sum(done.rollout.action_mask.sum(-1).float(), done.rollout.group_ids)[
            used
        ],
        counts=count(run, done.rollout, used),
        choices=None if run.sampler is None else run.sampler.choices(done),
        metrics=metrics,
        inner_metrics=[],
    )


def roll_out(run: Run, policy: ModelDenoiser) -> Rewarded:
    """This rank's rewarded rollouts of the step."""
    gamma_of = None
    if run.sampler is not None:
        gamma_of = partial(run.sampler.gamma, seed=run.recipe.run.seed, step=run.step)
    return rollout_step(
        run.recipe,
        run.problems,
        run.anchors,
        run.rollouts,
        policy,
        run.functions,
        run.step,
        run.share_done,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        gamma_of=gamma_of,
    )


def sampling_gap(run: Run, policy: ModelDenoiser, rollout: Rollout) -> float | None:
    """How far replayed log-probs of two rollouts are from the engine's; None if it reports none, or
    not what they are of.
    """
    told = run.rollouts.features
    if "step_maps" not in told or not told & {"behavior_logps", "shown_logps"}:
        return None
    if rollout.is_truncated and rollout.kept is None:
        return None
    few = rollout.rows(torch.arange(min(2, len(rollout.ids))))
    return with_fewer_canvases(
        run,
        max(1, int(few.nfe.sum())),
        lambda limit: behavior_gap(policy, few, max_canvases=limit),
    )


def trained_rows(run: Run, live: Tensor) -> Tensor:
    """Rows that the policy is trained on. Without a KL term, rows without advantage add nothing:
    the gradient is the same.
    """
    if not run.trains_policy:
        return torch.zeros(0, dtype=torch.int64)
    return (live if run.method.loss.kl_coef == 0 else torch.ones_like(live)).nonzero().squeeze(-1)


def frozen_likelihoods(
    run: Run, policy: ModelDenoiser, rollout: Rollout, advantages: Tensor
) -> tuple[Tensor, Tensor | None, int]:
    """Old and reference token log-probs (num_iterations, B, L) on each inner update's views, and
    all canvases of the step.

    At the first inner update the old policy is the current one: no pass is needed, and zeros stand
    there.
    """
    iterations = run.recipe.train.num_iterations
    old = torch.zeros(iterations, *rollout.ids.shape, device=rollout.ids.device)
    ref = None
    if not len(advantages):
        return old, torch.zeros_like(old) if run.reference else None, 0
    views = [make_views(run, rollout, advantages, inner) for inner in range(iterations)]
    canvases = sum(count_canvases(rollout, v) for v in views)
    if run.method.loss.uses_old and iterations > 1:
        later, calls = scored(run, policy, rollout, views[1:])
        old = torch.cat([old[:1], later])
        canvases = canvases + calls
    if run.reference is not None:
        ref, calls = scored(run, run.reference, rollout, views)
        canvases += calls
    return old, ref, canvases


def scored(
    run: Run, policy: ModelDenoiser, rollout: Rollout, views: Sequence[Views]
) -> tuple[Tensor, int]:
    """Token log-probs (N, B, L) on N sets of views, and the canvases run."""
    return with_fewer_canvases(
        run,
        sum(count_canvases(rollout, v) for v in views),
        lambda limit: frozen_token_logps_over(
            policy, rollout, run.method.estimator, views, max_canvases=limit
        ),
    )


def count(run: Run, rollout: Rollout, used: Tensor) -> dict[str, float]:
    """What losses are normalised by, over all ranks: tokens, rows and groups of the step; and the
    tokens of the used rows.
    """
    actions = rollout.action_mask
    local = {
        "num_actions": actions.sum(),
        "num_rows": actions.any(-1).sum(),
        "num_groups": rollout.group_ids[actions.any(-1)].unique().numel(),
        "num_scored": actions[used].sum(),
    }
    return {name: run.total(float(value)) for name, value in local.items()}


def update(run: Run, batch: Batch, *, check_ratio: bool) -> str | None:
    """One optimiser step on the inner update's own masks, shared by the current, old and reference
    policy.

    What is not finite is not stepped on: NotFiniteError, or the update is skipped and the line that
    says so returned.
    """
    o = run.recipe.optimizer
    began = time.perf_counter()
    rate = learning_rate(o, run.updates, run.share_done)
    row: dict[str, float] = {"lr": rate, "loss": 0.0, "grad_norm": 0.0, "updates/skipped": 0.0}
    if trained := batch.counts["num_scored"] > 0:
        views = make_views(run, batch.rollout, batch.advantages, run.inner)
        if check_ratio:
            row |= check_first_ratio(run, batch, views)
        loss_fn = batch_loss(run.method.loss, batch, run.inner)
        out = with_fewer_canvases(
            run,
            count_canvases(batch.rollout, views),
            lambda limit: backward(run, batch, views, loss_fn, limit),
        )
        row |= summarise(run.reduce_metrics({"loss": out.loss, **out.metrics}))
        row["grad_norm"] = run.sum_gradients(run.denoiser.model, o.max_grad_norm)
    sampler = (
        run.sampler
        if batch.choices is not None and run.sampler and run.sampler.trains(run.share_done)
        else None
    )
    if sampler is not None and batch.choices is not None:
        num_rows = run.total(float(len(batch.choices.index)))
        row |= run.reduce_metrics(sampler.backward(batch.choices, num_rows))
        row["sampler/grad_norm"] = run.sum_gradients(sampler.head, sampler.config.max_grad_norm)
    if note := refused(run, row):
        row = {"lr": rate, "updates/skipped": 1.0}
    elif trained:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        update_average(run.average, run.denoiser.model, run.recipe.train.ema)
    if sampler is not None and not note:
        sampler.optimizer.step()
    row["seconds/update"] = time.perf_counter() - began
    batch.inner_metrics.append(row)
    return note


def backward(
    run: Run,
    batch: Batch,
    views: Views,
    loss_fn: Callable[[Tensor], LossOutputs],
    limit: int,
) -> LossOutputs:
    """Loss and gradients of this rank's rows, ``limit`` canvases at a time; on sharded weights
    every rank makes as many passes as the rank with most.
    """
    run.optimizer.zero_grad(set_to_none=True)
    frozen = None
    own = 0
    most = 0
    if run.sharded:
        own = num_passes(batch.rollout, views, limit)
        most = int(run.most(own))
        frozen = run.inference if most > 1 else None
    out = backward_in_chunks(
        run.denoiser,
        batch.rollout,
        run.method.estimator,
        views,
        loss_fn,
        max_canvases=limit,
        frozen=frozen,
    )
    extra_passes(run.denoiser, own, most)
    return out


def batch_loss(loss: PolicyLoss, batch: Batch, inner: int) -> Callable[[Tensor], LossOutputs]:
    """The policy loss as a function of token log-probs alone; at inner update 0 the old policy is
    the current one.
    """

    def loss_fn(token_logps: Tensor) -> LossOutputs:
        return loss(
            token_logps,
            TrainBatch(
                action_mask=batch.rollout.action_mask,
                advantages=batch.advantages,
                old_logps=batch.old_logps[inner] if inner else token_logps.detach(),
                ref_logps=None if batch.ref_logps is None else batch.ref_logps[inner],
                behavior_logps=batch.rollout.behavior_logps,
                progress=progress_of(batch.rollout.decoded_step, batch.rollout.nfe),
                calls=batch.rollout.decoded_step,
                group_actions=batch.group_actions,
                **batch.counts,
            ),
        )

    return loss_fn


def advantages_of(run: Run, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Advantages within groups; the control of ``train.shuffle_advantages`` permutes them within
    each group.
    """
    advantages = run.method.advantage(rewards, group_ids)
    if run.recipe.train.shuffle_advantages:
        generator = named_generator(run.recipe.run.seed, "shuffle", run.step)
        for group in group_ids.unique():
            rows = (group_ids == group).nonzero().squeeze(-1)
            advantages[rows] = advantages[rows[torch.randperm(len(rows), generator=generator)]]
    return advantages


def make_views(run: Run, rollout: Rollout, advantages: Tensor, inner: int) -> Views:
    """Masks of an inner update: named by step and position, so old, reference and current policy
    share them.
    """
    seed = run.recipe.run.seed
    generator = named_generator(seed, "views", run.step, inner)
    update = Update(
        inner, run.recipe.train.num_iterations, named_seed(seed, "schedule", run.step), advantages
    )
    return run.method.estimator.make_views(rollout, run.denoiser.mask_id, generator, update)
