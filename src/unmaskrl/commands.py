"""What the commands sample and check and the end of sft do, and what commands that load a model share (shell)."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .build import COMPONENTS, component, warnings_for
from .checkpoint import write_json
from .config import (
    DecodeConfig,
    SFTRecipe,
    build_recipe,
    load_recipe,
    parse_overrides,
)
from .cost import Cost, step_cost
from .decoding import decode
from .denoiser import ModelDenoiser, end_ids, read_json
from .evaluate import EvalResult, decode_options, evaluate
from .loading import open_checkpoint
from .memory_view import print_memory
from .plain_text import printable
from .priors import anchored_canvas, choose_anchors, random_scores
from .recipe_files import PARTS, RECIPES, headline, is_diffpo, is_method, part_names, recipe_names
from .rng import named_generator, named_seed
from .shell import DTYPES, default_device, set_threads
from .tasks import CallContext, Task, grade
from .terminal import PlainConsole
from .thresholds import ThresholdHead, load_threshold
from .tokenizer import decode_texts, encode_prompt, encode_reference
from .trajectory_view import print_trajectory, sample_row

DECODE_FILE = "decode.json"


def eval_table(title: str, result: EvalResult) -> Table:
    """The summary of an evaluation, one figure per row."""
    summary = result.summary()
    table = Table("figure", "value", title=title)
    low, high = result.interval
    table.add_row("accuracy", f"{100 * result.accuracy:.1f}% (95%: {100 * low:.1f} to {100 * high:.1f})")
    for key, value in summary.items():
        if key.startswith(("pass@", "accuracy_")) and key not in ("accuracy_low", "accuracy_high"):
            table.add_row(key.replace("accuracy_", "accuracy, "), f"{100 * value:.1f}%")
    table.add_row("problems x samples", f"{summary['num_problems']} x {result.samples}")
    table.add_row("denoiser calls per completion", f"{summary['nfe']:.1f}")
    table.add_row("tokens per call", f"{summary['tokens_per_call']:.2f}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("decode", ", ".join(f"{k}={v}" for k, v in result.decode.items()))
    return table


def sample_command(args: argparse.Namespace) -> int:
    """unmaskrl sample."""
    if (args.prompt is None) == (args.task is None):
        raise ValueError("give either --prompt TEXT or --task T (with --index N)")
    denoiser, tokenizer, settings, task, head = load_parts(args)
    messages, example, anchors = [{"role": "user", "content": args.prompt}], None, {}
    if task is not None:
        examples = task.examples("test")
        if not 0 <= args.index < len(examples):
            raise ValueError(f"--index {args.index}: the test split has {len(examples)} problems")
        example = examples[args.index]
        messages = task.prompt(example)
        anchors = _sample_anchors(args, task, example, tokenizer, denoiser, settings)
    prompt = encode_prompt(tokenizer, messages)
    canvas = anchored_canvas([prompt], [anchors], gen_length=settings.gen_length, denoiser=denoiser, device=denoiser.device)
    options = decode_options(settings, canvas, head)
    generator = named_generator(args.seed, "sample")
    rollout = decode(denoiser, canvas, temperature=args.temperature, generator=generator, **options)
    ids = rollout.completions()
    text = decode_texts(tokenizer, ids)[0]
    correct = False
    if task is not None and example is not None:
        correct = grade(task, [example], [text], CallContext(completion_ids=ids)).correct[0]
    row = sample_row(
        rollout,
        0,
        tokenizer,
        step=0,
        split="sample",
        example_id="" if example is None else example.id,
        prompt_text=decode_texts(tokenizer, [prompt])[0],
        completion_text=text,
        reward=float(correct),
        correct=correct,
    )
    print_trajectory(row, PlainConsole(), graded=task is not None)
    return 0


def check_command(args: argparse.Namespace) -> int:
    """unmaskrl check: the resolved recipe, its cost per step, its memory plan, warnings."""
    recipe = load_recipe(args.recipe, args.overrides)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)
    if args.yaml:
        sys.stdout.write(text)  # a file for `unmaskrl train`: nothing else may stand in it
        sys.stderr.writelines(f"unmaskrl: warning: {printable(note)}\n" for note in warnings_for(recipe))
        return 0
    console = PlainConsole()
    console.print(text, soft_wrap=True)
    cost = step_cost(recipe)
    console.print(cost_table(recipe.name, cost))
    block, full = cost.logits_bytes / 2**20, cost.full_logits_bytes / 2**20
    console.print(f"peak logits: {cost.logits_bytes} bytes ({block:.1f} MiB; all at once: {full:.1f} MiB)", highlight=False)
    print_memory(recipe, console, args.processes)
    for note in warnings_for(recipe):
        console.print(f"warning: {note}", style="yellow", highlight=False)
    return 0


def cost_table(name: str, cost: Cost) -> Table:
    """Row-calls of a step, and of one of its updates on average."""
    table = Table(
        "row-calls, at most",
        "per step",
        f"per update ({cost.num_iterations} a step)",
        title=f"{name}: {cost.parameters / 1e6:.2f}M parameters",
    )
    rows = {
        f"rollout ({cost.rollout_per_row} calls per row)": cost.rollout,
        "old policy": cost.old,
        "reference policy": cost.ref,
        "new policy, forward and backward": cost.new,
        "in forward passes (backward = 2)": cost.forwards,
    }
    for label, calls in rows.items():
        table.add_row(label, f"{calls}", f"{cost.per_update(calls):.6g}")
    return table


def recipes_command() -> int:
    """unmaskrl recipes: the shipped ones, methods apart from tasks and from the supervised recipes of the bases."""
    console, names = PlainConsole(), recipe_names()
    bases = [name for name in names if name.endswith("-base")]
    parts = {
        "Published methods, each a preset on sudoku (docs/papers.md)": [name for name in names if is_method(name)],
        "DiFFPO and its ablations (docs/diffpo.md)": [name for name in names if is_diffpo(name)],
        "Tasks (docs/recipes.md)": [n for n in names if not is_method(n) and not is_diffpo(n) and n not in bases],
        "Bases, for `unmaskrl sft`": bases,
    }
    width = max(map(len, names))
    for title, part in parts.items():
        console.print(title, style="bold", highlight=False, soft_wrap=True)
        for name in part:
            line = f"  {name:{width}}  {headline(RECIPES / f'{name}.yaml')}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()
    console.print("Large runs, MODEL-TASK-METHOD, e.g. llada-8b-gsm8k-stp (docs/scaling.md)", style="bold", highlight=False)
    for kind in ("model", "task", "method"):
        for name in part_names(kind):
            line = f"  {kind:6}  {name:{width - 8}}  {headline(PARTS / kind / f'{name}.yaml')}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def finish_sft(recipe: SFTRecipe, out: Path, console: Console) -> None:
    """Write the decode settings beside the weights and evaluate them: pass@1 (greedy) and pass@8."""
    folder = out / "model"
    write_json(folder / DECODE_FILE, {name: d.model_dump() for name, d in recipe.eval_decode.items()})
    denoiser, tokenizer, _ = open_checkpoint(folder, default_device())
    results = {}
    for part in recipe.data:
        settings = recipe.eval_decode.get(part.task["name"])
        if settings is None:
            continue
        task: Task = component(part.task, COMPONENTS["task"], "data.task")
        examples = task.examples("test")
        greedy = evaluate(denoiser, tokenizer, task, examples, settings)
        console.print(eval_table(f"{task.name}, greedy", greedy))
        sampled = evaluate(denoiser, tokenizer, task, examples[:128], settings, temperature=1.0, samples=8)
        console.print(eval_table(f"{task.name}, temperature 1", sampled))
        results[task.name] = {"greedy": greedy.summary(), "sampled": sampled.summary()}
    write_json(out / "eval.json", results)
    console.print(f"model: {folder}", highlight=False)


def load_parts(args: argparse.Namespace) -> tuple[ModelDenoiser, Any, DecodeConfig, Task | None, ThresholdHead | None]:
    """Model, tokenizer, decode settings (stored beside the weights, then overridden), task, and threshold head."""
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature: expected a number of at least 0, got {args.temperature}")
    set_threads(args.threads)
    overrides = parse_overrides(args.overrides)
    unknown = overrides.keys() - {"decode", "task"}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: expected decode.key=value or task.key=value")
    if "temperature" in overrides.get("decode", {}):
        raise ValueError("decode.temperature is that of training's rollouts; here it is --temperature")
    task = None
    if args.task is not None:
        spec = {"name": args.task, **overrides.get("task", {})}
        if args.data:
            spec["data"] = args.data
        task = component(spec, COMPONENTS["task"], "task")
    denoiser, tokenizer, folder = open_checkpoint(args.model, default_device(), DTYPES[args.dtype])
    stored = stored_decode(folder, args.task)
    try:
        checked_decode(args.task, stored)
    except ValueError as error:
        raise ValueError(f"{folder / DECODE_FILE}: {error}") from None
    settings = {**stored, **overrides.get("decode", {})}
    decode_config = checked_decode(args.task, settings)
    return denoiser, tokenizer, decode_config, task, load_threshold(folder, denoiser.device)


def check_counts(args: argparse.Namespace) -> None:
    """Refuse sizes that ask for nothing, before a file is begun."""
    for option in ("size", "samples", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")


def checked_decode(task: str | None, settings: dict[str, Any]) -> DecodeConfig:
    """Decode settings that a recipe would accept; the temperature is not theirs, commands have --temperature."""
    probe = {"task": {"name": task or "sudoku"}, "decode": {**settings, "temperature": 1.0}}
    return build_recipe(probe).decode


def stored_decode(path: str | Path, task: str | None) -> dict[str, Any]:
    """The decode settings beside the weights for a task, or the first ones if no task is named; empty without any."""
    file = Path(path) / DECODE_FILE
    stored = read_json(file) if file.is_file() else {}
    if not all(isinstance(settings, dict) for settings in stored.values()):
        raise ValueError(f"{file}: expected an object of decode settings for each task; correct or delete it")
    if task in stored:
        return stored[task]
    return next(iter(stored.values())) if task is None and stored else {}


def task_of(args: argparse.Namespace, task: Task | None) -> Task:
    if task is None:
        raise ValueError("--task is needed")
    return task


def _sample_anchors(
    args: argparse.Namespace, task: Task, example: Any, tokenizer: Any, denoiser: ModelDenoiser, settings: DecodeConfig
) -> dict[int, int]:
    text = task.reference(example)
    if args.keep == 0:
        return {}
    if text is None:
        raise ValueError("--keep: this problem has no known reference answer")
    ids, _ = encode_reference(tokenizer, text, [])
    scores = random_scores(len(ids), seed=named_seed(args.seed, "anchors"), row_id=args.index)
    never = (*end_ids(denoiser), denoiser.pad_id, denoiser.mask_id)
    return choose_anchors(ids, scores, keep=args.keep, gen_length=settings.gen_length, never=never)
