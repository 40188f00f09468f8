"""What a run shows of itself (shell): accuracy on held-out problems, and the models it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ..core.types import Rollout
from ..evaluation.evaluate import EvalRequest, evaluate
from ..evaluation.prompts import fitting
from ..models.adapters import merged_tensors, save_adapter
from ..models.checkpoint import save_model
from ..models.heads import save_threshold
from ..models.loading import write_tokenizer
from ..models.weights import swapped
from ..recipes.memory import size_text
from ..recipes.schema import Recipe
from ..reporting.progress import Progress
from ..tasks import Example, told
from ..utils.files import read_jsonl, write_json
from .bad_updates import check_weights
from .log import log_eval
from .state import Run


def evaluate_run(run: Run, split: str, weights: Sequence[str], progress: Progress) -> None:
    """Greedy, anchor-free accuracy of the weights (raw, base: as they are; ema) on a held-out
    split, by the main process.
    """
    e = run.recipe.eval
    with told(run.task.name, "examples"):
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


def save_models(run: Run) -> None:
    """The averaged weights in ``model/`` and the raw ones in ``model-raw/``; without an average one
    folder, ``model/``.

    Each can be loaded. With adapters it holds what ``run.save`` says: the adapter on the name of
    its base, the merged weights, or both (the adapter then in ``adapter/``).
    """
    check_weights(run)
    model = run.denoiser.model
    main = run.accelerator.is_main_process
    lora = run.recipe.model.lora
    kind = saved_kind(run.recipe)
    for name in ("model", "model-raw") if run.average else ("model",):
        with averaged(run, name == "model"):
            if kind != "adapter":
                # written inside: tensors that are neither split nor merged are the model's own
                tensors = merged_tensors(model, keep=main)
                if main:
                    save_model(model, run.out / name, tensors=tensors)
            if lora and kind != "merged":
                folder = run.out / name if kind == "adapter" else run.out / name / "adapter"
                save_adapter(
                    model,
                    folder,
                    run.recipe.model.path,
                    rank=lora.rank,
                    alpha=lora.alpha,
                    revision=run.recipe.model.revision,
                    write=main,
                )
        if main:
            write_tokenizer(run.tokenizer_folder, run.out / name)
            if run.sampler is not None:
                save_threshold(run.sampler.head, run.out / name)
            write_json(
                run.out / name / "decode.json",
                {run.recipe.task["name"]: run.recipe.decode.model_dump()},
            )


def saved_kind(recipe: Recipe) -> str:
    """adapter, merged or both: merged without adapters, and also for a random stand-in, whose base
    is nowhere to be loaded.
    """
    if recipe.model.lora is None:
        return "merged"
    if recipe.run.save == "adapter" and recipe.model.random_init is not None:
        return "both"
    return recipe.run.save


def saving_notes(run: Run) -> list[str]:
    """With adapters: what model/ will hold at the end, and how large it is."""
    if run.recipe.model.lora is None:
        return []
    parameters = dict(run.denoiser.model.named_parameters())
    adapter = sum(p.numel() * p.element_size() for p in parameters.values() if p.requires_grad)
    base = sum(p.numel() * p.element_size() for p in parameters.values() if not p.requires_grad)
    kind = saved_kind(run.recipe)
    # 4 bits are written out as whole numbers
    least = " at least" if run.recipe.model.quantize else ""
    whole = f"the merged weights, {size_text(base)}{least}"
    parts = {"adapter": [f"the adapter, {size_text(adapter)}"], "merged": [whole]}
    held = parts.get(kind) or parts["merged"] + parts["adapter"]
    return [f"run.save={kind}: model/ will hold {' and '.join(held)}"]


def averaged(run: Run, wanted: bool) -> AbstractContextManager[None]:
    """The run's model with the averaged weights in it, if there are such."""
    return swapped(run.denoiser.model, run.average) if wanted and run.average else nullcontext()
