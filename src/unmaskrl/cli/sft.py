"""`unmaskrl sft`: a supervised run, and what is measured when it is over."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from ..evaluation.evaluate import EvalRequest, evaluate
from ..models.loading import load
from ..recipes.load import load_recipe
from ..recipes.registry import make_task
from ..recipes.schema import SFTRecipe
from ..reporting.progress import Progress
from ..reporting.tables import eval_table
from ..tasks import Task
from ..training.folder.card import Figure, write_card
from ..training.sft.loop import run_sft
from ..utils.files import write_json
from ..utils.stopping import is_main
from ..utils.terminal import PlainConsole
from .arguments import SFTArguments


def sft_command(args: SFTArguments) -> int:
    """unmaskrl sft."""
    recipe = load_recipe(args.recipe, args.overrides, SFTRecipe)
    console = PlainConsole(quiet=not is_main())  # a table per process would be 64 tables
    progress = Progress(console if is_main() else None)
    run = run_sft(recipe, resume=args.resume, force=args.force, progress=progress)
    if is_main():
        finish_sft(recipe, run.out, console)
    if run.unsaved:
        raise OSError(f"the run is complete, but {run.unsaved}")
    return 0


def finish_sft(recipe: SFTRecipe, out: Path, console: Console) -> None:
    """Evaluate the model, pass@1 (greedy) and pass@8, and put that into eval.json and its card."""
    folder = out / "model"
    results = {}
    figures: list[Figure] = []
    m = recipe.model
    parts = [part for part in recipe.data if part.task["name"] in recipe.eval_decode]
    if parts:
        given = asdict(m.given)  # an adapter's base has its own config.json
        model = load(folder, dtype=m.dtype, family=m.family, quantize=m.quantize, **given)
    for part in parts:
        settings = recipe.eval_decode[part.task["name"]]
        task: Task = make_task(part.task, "data.task")
        examples = task.examples("test")
        request = EvalRequest(
            denoiser=model.denoiser,
            tokenizer=model.tokenizer,
            task=task,
            examples=examples,
            settings=settings,
        )
        greedy = evaluate(request)
        console.print(eval_table(f"{task.name}, greedy", greedy))
        sampled = evaluate(replace(request, examples=examples[:128], temperature=1.0, samples=8))
        console.print(eval_table(f"{task.name}, temperature 1", sampled))
        results[task.name] = {"greedy": greedy.summary(), "sampled": sampled.summary()}
        figures.append((f"{task.name}, greedy", greedy.summary()))
    write_json(out / "eval.json", results)
    weights = "ema" if recipe.train.ema else "raw"
    write_card(folder, recipe, recipe.train.steps, weights, figures)
    console.print(f"model: {folder}", highlight=False, soft_wrap=True)
