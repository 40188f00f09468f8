"""`unmaskrl prior`: sampled answers of a model to the training problems, as ids, with
log-probs and correctness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from ..core.denoiser import end_ids
from ..core.rng import named_generator
from ..evaluation.evaluate import batches_by_length, decode_blank, is_random
from ..evaluation.item_log import ItemLog, described_model, described_problems
from ..models.tokenizer import decode_texts, encode_prompt, protected_tokens
from ..recipes.load import parse_overrides
from ..tasks import CallContext, Example, Task, grade
from ..utils.files import check_output, json_text, write_whole
from ..utils.lock import holding
from ..utils.terminal import PlainConsole
from .arguments import PriorArguments
from .common import Parts, check_counts, load_parts, task_of


def prior_command(args: PriorArguments) -> int:
    """unmaskrl prior."""
    check_counts(args)
    check_output(args.out, "--out")
    parts = load_parts(args)
    task = task_of(args, parts.task)
    tokenizer = parts.model.tokenizer
    settings = parts.settings
    if args.samples > 1 and not is_random(settings, args.temperature):
        raise ValueError(
            f"{args.samples} samples at temperature 0 are all the same; set --temperature above 0"
        )
    examples = task.examples("train")[: args.size]
    out = Path(args.out)
    unfinished = out.with_name(f"{out.name}.partial")
    with holding(unfinished):
        log = ItemLog.open(
            unfinished,
            {
                **described_model(args.model),
                "task": {"name": args.task, **parse_overrides(args.overrides).get("task", {})},
                "problems": described_problems(task, examples),
                "decode": {**settings.model_dump(), "temperature": args.temperature},
                "seed": args.seed,
                "samples": args.samples,
                "dtype": parts.dtype,
            },
        )
        if log.rows:
            PlainConsole().print(
                f"going on with {log.path}: {len(log.rows)} answers are there", highlight=False
            )
        prompts = [encode_prompt(tokenizer, task.prompt(example)) for example in examples]
        batches = batches_by_length(
            [len(prompt) for prompt in prompts for _ in range(args.samples)], args.batch_size
        )
        for batch in track(batches, description="prior answers", console=PlainConsole()):
            have = {row["row"] for row in log.rows}
            if not have.issuperset(batch):
                answers = decode_answers(
                    parts, args, [prompts[row // args.samples] for row in batch], batch
                )
                log.append([answer for answer in answers if answer["row"] not in have])
        rows = graded(log.rows, examples, args.samples, task, tokenizer)
        write_whole(
            out, lambda part: part.write_text("".join(json_text(row) + "\n" for row in rows))
        )
        assert log.path is not None
        log.path.unlink()
        right = sum(row["correct"] for row in rows)
        PlainConsole().print(
            f"{len(rows)} prior answers, {right} of them right: {out}", highlight=False
        )
        return 0


def decode_answers(
    parts: Parts, args: PriorArguments, prompts: Sequence[Sequence[int]], rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Ids without EOS and their log-probs (nats) when they were drawn, for some rows (problem *
    samples + sample).
    """
    denoiser = parts.model.denoiser
    rollout = decode_blank(
        parts.rollouts,
        denoiser,
        prompts,
        parts.settings,
        temperature=args.temperature,
        row_ids=rows,
        generator=named_generator(args.seed, "prior"),
        head=parts.model.head,
    )
    for i, (row, ids) in enumerate(zip(rows, rollout.completions(), strict=True)):
        kept = [token for token in ids if token not in end_ids(denoiser)]
        logps = rollout.behavior_logps[i][rollout.completion_mask[i]][: len(kept)].tolist()
        yield {"row": row, "ids": kept, "logps": logps}


def graded(
    answers: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    samples: int,
    task: Task,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """One line of the file per problem: its first right answer, or its first one, and how many of
    its answers were right.
    """
    by_row = {answer["row"]: answer for answer in answers}
    rows = []
    for n, example in enumerate(examples):
        own = [by_row[n * samples + s] for s in range(samples)]
        texts = decode_texts(tokenizer, [answer["ids"] for answer in own])
        context = CallContext(completion_ids=[answer["ids"] for answer in own])
        right = grade(task, [example] * samples, texts, context).correct
        s = right.index(True) if any(right) else 0
        ids = own[s]["ids"]
        text = texts[s]
        rows.append(
            {
                "id": example.id,
                "ids": ids,
                "logps": own[s]["logps"],
                "correct": right[s],
                "text": text,
                "protected": protected_tokens(tokenizer, ids, task.answer_spans(text)),
                "sample": s,
                "num_samples": samples,
                "num_correct": sum(right),
            }
        )
    return rows
