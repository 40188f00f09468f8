"""What the command variance does: anchored completions of a model, and how much their
likelihood estimates vary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress

from ..core.canvas import anchored_canvas
from ..core.estimators import ESTIMATORS, Estimator
from ..core.rng import named_generator
from ..core.rollouts import check_truncation_served
from ..core.types import Rollout
from ..core.variance import compare_versions, rollout_figures, summarise
from ..evaluation.evaluate import gamma_for
from ..models.tokenizer import decode_texts
from ..recipes.load import build_recipe, parse_overrides
from ..recipes.registry import component, factory_of, settings_at
from ..recipes.schema import Recipe
from ..reporting.variance import variance_png, variance_table, verdicts
from ..tasks import CallContext, Example, Task, grade
from ..training.rollouts.anchors import Anchors
from ..training.rollouts.problems import Problems
from ..utils.files import write_json
from ..utils.terminal import PlainConsole
from .arguments import VarianceArguments
from .common import Parts, load_parts, task_of


def variance_command(args: VarianceArguments) -> int:
    """unmaskrl variance: the variance of likelihood estimates on the model's own anchored
    completions, in three versions.
    """
    if args.draws < 2:
        raise ValueError(f"--draws: a variance needs at least 2 draws of masks, got {args.draws}")
    if min(args.size, args.samples, args.max_canvases) < 1:
        raise ValueError(
            f"--size, --samples, --max-canvases must be at least 1: {args.size}, {args.samples}, "
            f"{args.max_canvases}"
        )
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(
            f"{args.samples} samples at temperature 0 are all the same; set a temperature above 0"
        )
    for out in filter(None, (args.json, args.plot)):
        if not Path(out).parent.is_dir():
            raise ValueError(f"{out}: the folder {Path(out).parent} does not exist; make it first")
    if args.exit_at is not None:
        args.overrides.append(f"decode.exit_at={args.exit_at}")
    estimators = {spec: _estimator(spec, args.num_mc) for spec in args.estimators.split(",")}
    parts = load_parts(args)
    denoiser = parts.model.denoiser
    settings = parts.settings
    rollout, correct, left_out = _anchored_rollout(args, parts)
    result: dict[str, Any] = {
        key: getattr(args, key)
        for key in ("model", "task", "keep", "select", "seed", "draws", "num_mc")
    }
    result |= {
        "decode": {**settings.model_dump(), "temperature": args.temperature},
        "num_rows": len(rollout.ids),
    }
    result |= {"num_problems": len(rollout.group_ids.unique()), "left_out": left_out}
    result |= {"rollouts": rollout_figures(rollout, correct), "estimators": []}
    console = PlainConsole()
    with Progress(console=console, transient=True) as bar:
        for spec, estimator in estimators.items():
            line = bar.add_task(escape(spec), total=3 * args.draws)
            draws = compare_versions(
                denoiser,
                rollout,
                estimator,
                num_draws=args.draws,
                generator=named_generator(args.seed, "variance"),
                max_canvases=args.max_canvases,
                on_draws=lambda n, line=line: bar.advance(line, n),
            )
            result["estimators"].append(summarise(spec, draws, rollout.group_ids, args.seed))
    console.print(variance_table(result))
    for line in verdicts(result):
        console.print(line, soft_wrap=True)
    if args.json:
        write_json(Path(args.json), result)
        console.print(f"wrote {args.json}", soft_wrap=True)
    if args.plot:
        variance_png(result, Path(args.plot))
        console.print(f"wrote {args.plot}", soft_wrap=True)
    return 0


def _estimator(spec: str, num_mc: int) -> Estimator:
    """``name`` or ``name:key=value:key=value``, where a name may be ``where:factory``; ``num_mc``
    is the default of those that have such a setting.
    """
    first, *settings = spec.split(":")
    is_place = first not in ESTIMATORS and settings and "=" not in settings[0]
    name = f"{first}:{settings.pop(0)}" if is_place else first
    try:
        chosen = {"name": name, **parse_overrides(settings)}
        if "num_mc" in inspect.signature(factory_of(chosen, ESTIMATORS, "estimator")).parameters:
            chosen.setdefault("num_mc", num_mc)
        return component(chosen, ESTIMATORS, "estimator")
    except ValueError as error:
        raise ValueError(f"--estimators {spec}: {error}") from None


def _check_references(task: Task, examples: Sequence[Example], keep: float) -> None:
    for example in examples:
        if task.reference(example) is None:
            raise ValueError(
                f"--keep {keep}: problem {example.id} has no known reference answer to take "
                "anchors from"
            )


def _anchored_rollout(args: VarianceArguments, parts: Parts) -> tuple[Rollout, list[bool], int]:
    """Completions of training problems, anchored as in training, and their correctness; and how
    many rows are left out, because nothing is free in them.
    """
    task = task_of(args, parts.task)
    denoiser = parts.model.denoiser
    tokenizer = parts.model.tokenizer
    settings = parts.settings
    examples = task.examples("train")[: args.size]
    prior = {"name": "anchors" if args.keep else "none", "select": args.select, "keep": args.keep}
    recipe: Recipe = build_recipe(
        {
            "task": {"name": args.task},
            "prior": prior,
            "decode": {**settings.model_dump(), "temperature": 1.0},
            "train": {"num_prompts": args.size, "prompts_per_step": 1},
            "run": {"seed": args.seed},
        }
    )
    if args.keep:
        _check_references(task, examples, args.keep)
    problems = Problems(recipe, task, tokenizer, denoiser.max_length)
    anchors = Anchors(recipe, problems, denoiser)
    given = []
    for i in range(len(examples)):
        given += anchors.of_group(i, 0, 0.0, range(i * args.samples, (i + 1) * args.samples))
    if args.keep and not any(given):
        raise ValueError(
            f"--select-anchors {args.select} leaves nothing of these references to fix; try "
            "--select-anchors random"
        )
    canvas = anchored_canvas(
        [problems.prompt(i) for i in range(len(examples)) for _ in range(args.samples)],
        given,
        gen_length=settings.gen_length,
        denoiser=denoiser,
        group_ids=[i for i in range(len(examples)) for _ in range(args.samples)],
        device=denoiser.device,
    )
    wanted = settings_at(settings, args.temperature)
    check_truncation_served(parts.rollouts, wanted)
    rollout = parts.rollouts.sample(
        canvas,
        wanted,
        named_generator(args.seed, "rollout"),
        gamma_for(settings, canvas, parts.model.head),
    )
    used = rollout.action_mask.any(-1).nonzero().squeeze(-1)
    if not len(used):
        raise ValueError(
            f"--keep {args.keep}: every completion is all anchors, so nothing is estimated; "
            "lower it"
        )
    rollout = rollout.rows(used)
    ids = rollout.completions()
    rows = [examples[int(group)] for group in rollout.group_ids]
    correct = grade(
        task, rows, decode_texts(tokenizer, ids), CallContext(completion_ids=ids)
    ).correct
    return rollout, correct, len(canvas.ids) - len(used)
