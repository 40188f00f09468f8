"""Accuracy of a run on held-out problems, before, during and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.types import Rollout
from ..evaluation.evaluate import EvalRequest, evaluate
from ..evaluation.prompts import fitting
from ..reporting.progress import Progress
from ..tasks import Example
from ..utils.files import read_jsonl
from .log import log_eval
from .saved_models import averaged
from .state import Run


def evaluate_run(run: Run, split: str, weights: Sequence[str], progress: Progress) -> None:
    """Greedy, anchor-free accuracy of the weights (raw, base: as they are; ema) on a held-out
    split, by the main process.
    """
    e = run.recipe.eval
    examples = run.task.examples(split)[: e.size if split == "test" else e.size_during]
    fits = fitting(run.recipe, run.task, run.tokenizer, examples, run.denoiser.max_length)
    for note in fits.notes:
        progress.note(f"{split}: {note}")
    for name in weights:
        if _is_logged(run, split, name):
            continue
        with run.droppable(), averaged(run, name == "ema"), run.inference() as policy:
            run.rollouts.sync()
            if not run.accelerator.is_main_process:
                continue
            rollouts: list[Rollout] = []
            request = EvalRequest(
                denoiser=policy,
                tokenizer=run.tokenizer,
                task=run.task,
                examples=fits.examples,
                settings=run.recipe.decode,
                temperature=e.temperature,
                seed=run.recipe.run.seed,
                batch_size=e.batch_size,
                head=None if run.sampler is None else run.sampler.head,
                rollouts=run.rollouts,
            )
            seen = _shown(progress, f"evaluating {split} ({name})", fits.examples, rollouts)
            result = replace(evaluate(request, seen), dropped=fits.dropped)
            progress.eval(log_eval(run, split, name, result, rollouts, fits.examples))


def _shown(
    progress: Progress, what: str, examples: Sequence[Example], kept: list[Rollout]
) -> Callable[[Rollout], None]:
    """Keep every rollout, and show how many of the problems are done."""
    progress.phase(what, len(examples), 0, unit="problems")

    def seen(rollout: Rollout) -> None:
        kept.append(rollout)
        done = sum(len(one.ids) for one in kept)
        progress.phase(what, len(examples), done, unit="problems")

    return seen


def evaluate_due(run: Run, progress: Progress) -> None:
    """The evaluation that belongs to where the run stands, unless it is in the log already."""
    recipe = run.recipe
    if run.step == 0:
        evaluate_run(run, "test", ["base"], progress)
        if recipe.eval.every < recipe.train.steps:  # where the curve of the later ones begins
            evaluate_run(run, "validation", ["base"], progress)
    elif run.step % recipe.eval.every == 0 and run.step < recipe.train.steps:
        evaluate_run(run, "validation", ["ema" if recipe.train.ema else "raw"], progress)


def _is_logged(run: Run, split: str, weights: str) -> bool:
    """Whether this evaluation was done before the run was stopped; the main process has the log."""
    known = run.accelerator.is_main_process and any(
        (row.get("split"), row.get("weights"), row.get("step")) == (split, weights, run.step)
        for row in read_jsonl(run.out / "eval.jsonl")
    )
    return bool(run.most(float(known)))
