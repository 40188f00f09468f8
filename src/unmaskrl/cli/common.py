"""What the commands that load a model share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.decoding.law import check_truncation
from ..core.rollouts import Rollouts
from ..evaluation.decode_settings import DECODE_FILE, checked_decode, settings_for
from ..evaluation.evaluate import EvalRequest
from ..models.loading import Model, load
from ..recipes.engines import make_rollouts
from ..recipes.load import parse_overrides
from ..recipes.registry import make_task
from ..recipes.schema import DecodeConfig
from ..tasks import Task
from ..utils.torch_setup import set_threads
from .arguments import ModelArguments


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a command line's model, task and settings come to."""

    model: Model
    settings: DecodeConfig
    task: Task | None
    rollouts: Rollouts

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(next(self.model.denoiser.model.parameters()).dtype).removeprefix("torch.")


def load_parts(args: ModelArguments) -> Parts:
    """Model, decode settings (stored beside the weights, then overridden), task and engine."""
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature: expected a number of at least 0, got {args.temperature}")
    check_truncation(args.top_k, args.top_p)
    set_threads(args.threads)
    flags = {"top_k": args.top_k, "top_p": args.top_p}
    changed = [f"decode.{name}={value}" for name, value in flags.items() if value is not None]
    overrides = parse_overrides([*args.overrides, *changed])
    unknown = overrides.keys() - {"decode", "task", "rollouts"}
    if unknown:
        raise ValueError(
            f"{sorted(unknown)[0]}: expected decode.key=value, task.key=value or rollouts.key=value"
        )
    if "temperature" in overrides.get("decode", {}):
        raise ValueError(
            "decode.temperature is that of training's rollouts; here it is --temperature"
        )
    task = None
    if args.task is not None:
        spec = {"name": args.task, **overrides.get("task", {})}
        if args.data:
            spec["data"] = args.data
        task = make_task(spec)
    model = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        family=args.family,
        quantize=args.quantize,
    )
    stored = settings_for(model.decode_settings, args.task)
    try:
        checked_decode(args.task, stored)
    except ValueError as error:
        raise ValueError(f"{model.folder / DECODE_FILE}: {error}") from None
    settings = checked_decode(args.task, {**stored, **overrides.get("decode", {})})
    spec = {"name": "local", **overrides.get("rollouts", {})}
    rollouts = make_rollouts(spec, model.denoiser)
    return Parts(model=model, settings=settings, task=task, rollouts=rollouts)


def request_of(args: ModelArguments, parts: Parts, split: str, size: int) -> EvalRequest:
    """The first ``size`` problems of the task's ``split``."""
    task = task_of(args, parts.task)
    return EvalRequest(
        denoiser=parts.model.denoiser,
        tokenizer=parts.model.tokenizer,
        task=task,
        examples=task.examples(split)[:size],
        settings=parts.settings,
        temperature=args.temperature,
        seed=args.seed,
        head=parts.model.head,
        rollouts=parts.rollouts,
    )


def check_counts(args: ModelArguments) -> None:
    """Refuse sizes that ask for nothing, before a file is begun."""
    for option in ("size", "samples", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(
                f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}"
            )


def task_of(args: ModelArguments, task: Task | None) -> Task:
    if task is None:
        raise ValueError("--task is needed")
    return task
