"""What the commands that load a model share."""

from __future__ import annotations

import math
from typing import Any

from ..core.threshold_head import ThresholdHead
from ..evaluation.decode_settings import DECODE_FILE, checked_decode, stored_decode
from ..models.denoiser import ModelDenoiser
from ..models.heads import load_threshold
from ..models.loading import open_checkpoint
from ..recipes.load import parse_overrides
from ..recipes.registry import make_task
from ..recipes.schema import DecodeConfig
from ..tasks import Task
from ..utils.torch_setup import DTYPES, default_device, set_threads
from .arguments import ModelArguments


def load_parts(
    args: ModelArguments,
) -> tuple[ModelDenoiser, Any, DecodeConfig, Task | None, ThresholdHead | None]:
    """Model, tokenizer, decode settings (stored beside the weights, then overridden), task, and
    threshold head.
    """
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature: expected a number of at least 0, got {args.temperature}")
    set_threads(args.threads)
    overrides = parse_overrides(args.overrides)
    unknown = overrides.keys() - {"decode", "task"}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: expected decode.key=value or task.key=value")
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
    denoiser, tokenizer, folder = open_checkpoint(args.model, default_device(), DTYPES[args.dtype])
    stored = stored_decode(folder, args.task)
    try:
        checked_decode(args.task, stored)
    except ValueError as error:
        raise ValueError(f"{folder / DECODE_FILE}: {error}") from None
    settings = {**stored, **overrides.get("decode", {})}
    decode_config = checked_decode(args.task, settings)
    return denoiser, tokenizer, decode_config, task, load_threshold(folder, denoiser.device)


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
