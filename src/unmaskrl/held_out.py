"""What a run shows of itself (shell): accuracy on held-out problems, and the models it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from .adapters import merged_tensors, save_adapter
from .bad_updates import check_weights
from .checkpoint import write_json
from .denoiser import save_model
from .evaluate import evaluate
from .loading import write_tokenizer
from .progress import SilentProgress, TrainProgress
from .prompts import fitting
from .run import Run
from .run_log import log_eval
from .thresholds import save_threshold
from .types import Rollout
from .weights import swapped


def evaluate_run(run: Run, split: str, weights: Sequence[str], progress: TrainProgress | SilentProgress) -> None:
    """Greedy, anchor-free accuracy of the weights (raw, base: as they are; ema) on a held-out split, by the main process."""
    e = run.recipe.eval
    examples = run.task.examples(split)[: e.size if split == "test" else e.size_during]
    fits = fitting(run.recipe, run.task, run.tokenizer, examples, run.denoiser.max_length)
    for note in fits.notes:
        progress.note(f"{split}: {note}")
    for name in weights:
        with averaged(run, name == "ema"), run.inference() as policy:
            if not run.accelerator.is_main_process:
                continue
            rollouts: list[Rollout] = []
            result = evaluate(
                policy,
                run.tokenizer,
                run.task,
                fits.examples,
                run.recipe.decode,
                temperature=e.temperature,
                seed=run.recipe.train.seed,
                batch_size=e.batch_size,
                head=None if run.sampler is None else run.sampler.head,
                on_rollout=rollouts.append,
            )
            result = replace(result, dropped=fits.dropped)
            progress.eval(log_eval(run, split, name, result, rollouts, fits.examples))
    run.accelerator.wait_for_everyone()


def save_models(run: Run) -> None:
    """The averaged weights in ``model/`` and the raw ones in ``model-raw/``, each a folder that can be loaded anywhere.

    Adapters are merged into them, and kept by themselves in ``adapter/``.
    """
    check_weights(run)
    model, main, lora = run.denoiser.model, run.accelerator.is_main_process, run.recipe.model.lora
    for name in ("model", "model-raw"):
        with averaged(run, name == "model"):
            # written inside: tensors that are neither split nor merged are the model's own
            tensors = merged_tensors(model, keep=main)
            if main:
                save_model(model, run.out / name, tensors=tensors)
            if lora and name == "model":
                save_adapter(model, run.out / name / "adapter", lora, run.recipe.model.path, write=main)
        if main:
            write_tokenizer(run.tokenizer_folder, run.out / name)
            if run.sampler is not None:
                save_threshold(run.sampler.head, run.out / name)
            write_json(run.out / name / "decode.json", {run.recipe.task["name"]: run.recipe.decode.model_dump()})


def averaged(run: Run, wanted: bool) -> AbstractContextManager[None]:
    """The run's model with the averaged weights in it, if there are such."""
    return swapped(run.denoiser.model, run.average) if wanted and run.average else nullcontext()
