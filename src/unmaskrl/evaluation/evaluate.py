"""Accuracy, NFE and tokens per call on held-out problems; always anchor-free, with the decode
config of training.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.canvas import blank_canvas
from ..core.decoding import RULES, decode
from ..core.rng import named_generator
from ..core.threshold_head import ThresholdHead, best_gamma
from ..core.types import Canvas, Rollout
from ..models.denoiser import ModelDenoiser
from ..models.tokenizer import decode_texts, encode_prompt
from ..recipes.schema import DecodeConfig
from ..tasks import CallContext, Example, Task, grade
from ..tasks.rewards import Grades
from .prompts import check_room


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalItem:
    """One completion of one problem; ``parts`` are its reward's, ``seconds`` its share of its
    batch's time.
    """

    id: str
    correct: bool
    text: str
    nfe: int
    num_tokens: int
    kind: str
    prompt: str = ""
    seed: int = 0
    sample: int = 0
    parts: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Items in problem order (``samples`` in a row per problem) and the decode settings that made
    them.
    """

    items: list[EvalItem]
    samples: int
    seconds: float
    decode: dict[str, Any]
    dropped: int = 0  # problems left out because their prompts are too long

    @property
    def accuracy(self) -> float:
        """Share of correct completions."""
        return sum(i.correct for i in self.items) / max(1, len(self.items))

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy; problems, not samples, are the independent draws if
        samples > 1.
        """
        return wilson(self.accuracy, len(self.items) // self.samples)

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k: mean over problems of 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
        if k > self.samples:
            raise ValueError(f"pass@{k} needs at least {k} samples per problem, got {self.samples}")
        groups = [self.items[i : i + self.samples] for i in range(0, len(self.items), self.samples)]
        misses = [
            math.comb(self.samples - sum(x.correct for x in g), k) / math.comb(self.samples, k)
            for g in groups
        ]
        return 1 - sum(misses) / max(1, len(misses))

    def summary(self) -> dict[str, Any]:
        """One flat JSON object: accuracy with interval, by kind, NFE, tokens per call, seconds,
        decode settings.
        """
        low, high = self.interval
        calls = sum(i.nfe for i in self.items)
        result = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "num_problems": len(self.items) // self.samples,
            "samples": self.samples,
            "num_dropped": self.dropped,
            "nfe": calls / max(1, len(self.items)),
            "tokens_per_call": sum(i.num_tokens for i in self.items) / max(1, calls),
            "seconds": self.seconds,
            "decode": self.decode,
        }
        for kind, total in sorted(Counter(i.kind for i in self.items).items()):
            if kind:
                result[f"accuracy_{kind}"] = (
                    sum(i.correct for i in self.items if i.kind == kind) / total
                )
                result[f"share_{kind}"] = total / len(self.items)
        for k in (2, 4, 8, 16, 32, 64):
            if k <= self.samples:
                result[f"pass@{k}"] = self.pass_at(k)
        return result


def evaluate(
    denoiser: ModelDenoiser,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    settings: DecodeConfig,
    *,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    head: ThresholdHead | None = None,
    gammas: Sequence[float] | None = None,
    on_rollout: Callable[[Rollout], None] | None = None,
) -> EvalResult:
    """Decode every example ``samples`` times from a blank canvas and grade it with the task's own
    verifier.

    An adaptive rule's gamma is the settings' number, or one of ``gammas`` per example, or
    ``head``'s choice.
    """
    if not examples:
        raise ValueError("nothing to evaluate: the list of examples is empty")
    if samples > 1 and not is_random(settings, temperature):
        raise ValueError(
            f"{samples} samples at temperature 0 are all the same; set a temperature above 0"
        )
    items: dict[int, EvalItem] = {}
    for rollout, done in evaluated_rows(
        denoiser,
        tokenizer,
        task,
        examples,
        settings,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        head=head,
        gammas=gammas,
    ):
        items |= done
        if on_rollout:
            on_rollout(rollout)
    ordered = [items[row] for row in sorted(items)]
    described = {**settings.model_dump(), "temperature": temperature}
    return EvalResult(
        items=ordered, samples=samples, seconds=sum(i.seconds for i in ordered), decode=described
    )


def evaluated_rows(
    denoiser: ModelDenoiser,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    settings: DecodeConfig,
    *,
    temperature: float,
    samples: int,
    seed: int,
    batch_size: int,
    head: ThresholdHead | None,
    gammas: Sequence[float] | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[Rollout, dict[int, EvalItem]]]:
    """Decode and grade every row (problem * samples + sample), batch by batch; items by row.

    Which rows share a batch changes nothing but rounding: a row's draws are keyed by its number.
    Batches whose rows are all ``done`` are left out; the others are what they would be without, so
    that a resumed evaluation is the same to the bit.
    """
    prompts = [encode_prompt(tokenizer, task.prompt(example)) for example in examples]
    check_room(prompts, settings.gen_length, denoiser.max_length)
    for batch in batches_by_length(
        [len(prompt) for prompt in prompts for _ in range(samples)], batch_size
    ):
        if all(row in done for row in batch):
            continue
        start = time.perf_counter()
        rollout = decode_blank(
            denoiser,
            [prompts[row // samples] for row in batch],
            settings,
            temperature=temperature,
            row_ids=batch,
            generator=named_generator(seed, "eval"),
            head=head,
            gammas=None
            if gammas is None
            else torch.tensor([gammas[row // samples] for row in batch], dtype=torch.float64),
        )
        ids = rollout.completions()
        texts = decode_texts(tokenizer, ids)
        lengths = rollout.action_mask.sum(-1).tolist()
        calls = rollout.nfe.tolist()
        share = (time.perf_counter() - start) / len(batch)
        items = {}
        own = [examples[row // samples] for row in batch]
        grades = grade(task, own, texts, CallContext(completion_ids=ids))
        correct = _verdicts(task, tokenizer, own, ids, grades)
        for i, (row, text, nfe, length) in enumerate(
            zip(batch, texts, calls, lengths, strict=True)
        ):
            example = examples[row // samples]
            items[row] = EvalItem(
                id=example.id,
                correct=correct[i],
                text=text,
                nfe=nfe,
                num_tokens=length,
                kind=str(example.fields.get("kind", "")),
                prompt="\n".join(message["content"] for message in task.prompt(example)),
                seed=seed,
                sample=row % samples,
                parts={name: scores[i] for name, scores in grades.parts.items()},
                seconds=share,
            )
        yield rollout, items


def _verdicts(
    task: Task, tokenizer: Any, examples: list[Example], ids: list[list[int]], grades: Grades
) -> list[bool]:
    """What is right; judged again on texts with special tokens where the task's judge reads
    them, as published ones do.
    """
    if not task.reads_special_tokens:
        return grades.correct
    return grade(task, examples, decode_texts(tokenizer, ids, special=True)).correct


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows 0, 1, ... in batches of ``size``, those with prompts of similar length together: little
    is spent on padding.
    """
    if size < 1:
        raise ValueError(f"the batch size must be at least 1, got {size}")
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[at : at + size] for at in range(0, len(order), size)]


def is_random(settings: DecodeConfig, temperature: float) -> bool:
    """Whether two decodings of a prompt can differ."""
    return temperature > 0 or settings.select == "random"


def decode_blank(
    denoiser: ModelDenoiser,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    *,
    temperature: float,
    generator: torch.Generator,
    row_ids: Sequence[int] | None = None,
    head: ThresholdHead | None = None,
    gammas: Tensor | None = None,
) -> Rollout:
    """Blank canvas and ``decode`` with a DecodeConfig, at a temperature of its own; ``head``
    chooses gamma where it is null.
    """
    canvas = blank_canvas(
        prompts,
        gen_length=settings.gen_length,
        denoiser=denoiser,
        row_ids=row_ids,
        device=denoiser.device,
    )
    options = decode_options(settings, canvas, head)
    if gammas is not None:
        options["gamma"] = gammas.to(denoiser.device)
    return decode(denoiser, canvas, temperature=temperature, generator=generator, **options)


def decode_options(
    settings: DecodeConfig, canvas: Canvas, head: ThresholdHead | None
) -> dict[str, Any]:
    """Keyword arguments of ``decode``; an adaptive rule whose gamma is null takes the head's most
    probable one.
    """
    options = settings.model_dump(exclude={"gen_length", "temperature"})
    if RULES[settings.select].prefix is not None and settings.gamma is None:
        if head is None:
            raise ValueError(
                f"decode.select={settings.select} with decode.gamma=null decodes with the model's "
                "threshold head, "
                "and there is none; set decode.gamma, for instance to 0.1"
            )
        options["gamma"] = best_gamma(head, canvas.prompt_mask)
    return options


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a share out of n."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
