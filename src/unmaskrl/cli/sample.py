"""`unmaskrl sample`: decode one prompt and show in which order the tokens appeared."""

from __future__ import annotations

from typing import Any

from ..core.canvas import anchored_canvas, choose_anchors, random_scores
from ..core.denoiser import end_ids
from ..core.rng import named_generator, named_seed
from ..core.rollouts import check_truncation_served
from ..evaluation.evaluate import gamma_for
from ..models.denoiser import ModelDenoiser
from ..models.tokenizer import decode_texts, encode_prompt, encode_reference, sample_row
from ..recipes.registry import settings_at
from ..recipes.schema import DecodeConfig
from ..reporting.trajectory import print_trajectory
from ..tasks import CallContext, Grades, Task, grade
from ..utils.terminal import PlainConsole
from .arguments import SampleArguments
from .common import load_parts


def sample_command(args: SampleArguments) -> int:
    """unmaskrl sample."""
    if (args.prompt is None) == (args.task is None):
        raise ValueError("give either --prompt TEXT or --task T (with --index N)")
    parts = load_parts(args)
    denoiser = parts.model.denoiser
    tokenizer = parts.model.tokenizer
    settings = parts.settings
    task = parts.task
    messages = [{"role": "user", "content": args.prompt}]
    example = None
    anchors = {}
    if task is not None:
        examples = task.examples("test")
        if not 0 <= args.index < len(examples):
            raise ValueError(f"--index {args.index}: the test split has {len(examples)} problems")
        example = examples[args.index]
        messages = task.prompt(example)
        anchors = _sample_anchors(args, task, example, tokenizer, denoiser, settings)
    prompt = encode_prompt(tokenizer, messages)
    canvas = anchored_canvas(
        [prompt],
        [anchors],
        gen_length=settings.gen_length,
        denoiser=denoiser,
        device=denoiser.device,
    )
    wanted = settings_at(settings, args.temperature)
    check_truncation_served(parts.rollouts, wanted)
    rollout = parts.rollouts.sample(
        canvas,
        wanted,
        named_generator(args.seed, "sample"),
        gamma_for(settings, canvas, parts.model.head),
    )
    ids = rollout.completions()
    text = decode_texts(tokenizer, ids)[0]
    grades = Grades(parts={}, correct=[False])
    if task is not None and example is not None:
        grades = grade(task, [example], [text], CallContext(completion_ids=ids))
    row = sample_row(
        rollout,
        0,
        tokenizer,
        step=0,
        split="sample",
        example_id="" if example is None else example.id,
        prompt_text=decode_texts(tokenizer, [prompt])[0],
        completion_text=text,
        reward=grades.totals()[0],
        correct=grades.correct[0],
        parts={name: scores[0] for name, scores in grades.parts.items()},
    )
    print_trajectory(row, PlainConsole(), graded=task is not None)
    return 0


def _sample_anchors(
    args: SampleArguments,
    task: Task,
    example: Any,
    tokenizer: Any,
    denoiser: ModelDenoiser,
    settings: DecodeConfig,
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
