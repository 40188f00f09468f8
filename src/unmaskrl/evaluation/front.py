"""``u.evaluate``: a loaded model on a task, with the decode settings beside its weights."""

from __future__ import annotations

from typing import Any

from ..core.rollouts import Rollouts
from ..models.loading import Model
from ..tasks import Task, load
from .decode_settings import checked_decode, settings_for
from .evaluate import EvalRequest, EvalResult
from .evaluate import evaluate as run_request


def evaluate(
    model: Model,
    task: Task | str,
    *,
    split: str = "test",
    size: int = 512,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    rollouts: Rollouts | None = None,
    **decode: Any,
) -> EvalResult:
    """Accuracy, denoiser calls and every completion on ``size`` problems of a task; the numbers of
    `unmaskrl eval`.

    ``decode`` changes the model's decode settings for this task (steps=10, exit_at=0.9, ...);
    without stored ones they are a recipe's defaults. ``rollouts``: another engine. ValueError on
    settings that do not fit.
    """
    chosen = load(task) if isinstance(task, str) else task
    settings = {**settings_for(model.decode_settings, chosen.name), **decode}
    return run_request(
        EvalRequest(
            denoiser=model.denoiser,
            tokenizer=model.tokenizer,
            task=chosen,
            examples=chosen.examples(split)[:size],
            settings=checked_decode(None, settings),
            temperature=temperature,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            head=model.head,
            rollouts=rollouts,
        )
    )
