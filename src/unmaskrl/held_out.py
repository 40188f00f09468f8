"""What a run shows of itself (shell): accuracy on held-out problems, and the models it leaves."""

from __future__ import annotations

from typing import Any

from .checkpoint import write_json
from .config import asset
from .denoiser import save_model
from .evaluate import evaluate
from .progress import SilentProgress, TrainProgress
from .run import Run
from .run_log import log_eval
from .thresholds import save_threshold
from .tokenizer import copy_tokenizer
from .types import Rollout


def evaluate_run(run: Run, split: str, weights: dict[str, Any], progress: TrainProgress | SilentProgress) -> None:
    """Greedy, anchor-free accuracy of some weights on a held-out split; the main process does it, all wait."""
    if run.accelerator.is_main_process:
        e = run.recipe.eval
        examples = run.task.examples(split)[: e.size if split == "test" else e.size_during]
        for name, denoiser in weights.items():
            rollouts: list[Rollout] = []
            result = evaluate(
                denoiser,
                run.tokenizer,
                run.task,
                examples,
                run.recipe.decode,
                temperature=e.temperature,
                seed=run.recipe.train.seed,
                batch_size=e.batch_size,
                head=None if run.sampler is None else run.sampler.head,
                on_rollout=rollouts.append,
            )
            progress.eval(log_eval(run, split, name, result, rollouts, examples))
    run.accelerator.wait_for_everyone()


def save_models(run: Run) -> None:
    """The averaged weights in ``model/`` and the raw ones in ``model-raw/``, each a folder that can be loaded anywhere."""
    if run.accelerator.is_main_process:
        for name, denoiser in (("model", run.ema), ("model-raw", run.denoiser)):
            copy_tokenizer(asset(run.recipe.model.path), run.out / name)
            save_model(denoiser.model, run.out / name)
            if run.sampler is not None:
                save_threshold(run.sampler.head, run.out / name)
            write_json(run.out / name / "decode.json", {run.recipe.task["name"]: run.recipe.decode.model_dump()})
