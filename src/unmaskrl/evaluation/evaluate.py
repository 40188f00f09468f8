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
from ..core.decoding import Gamma
from ..core.precision import finest_dtype
from ..core.rng import named_generator
from ..core.rollouts import LocalRollouts, Rollouts, check_truncation_served
from ..core.threshold_head import ThresholdHead, best_gamma
from ..core.types import Canvas, Rollout
from ..models.denoiser import ModelDenoiser
from ..models.tokenizer import decode_texts, encode_prompt
from ..recipes.registry import selection_rule, settings_at
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EvalResult:
    """Items in problem order (``samples`` in a row per problem) and the decode settings that made
    them.
    """

    items: list[EvalItem]
    samples: int
    seconds: float
    decode: dict[str, Any]
    dropped: int = 0  # problems left out because their prompts are too long

    def __repr__(self) -> str:
        low, high = self.interval
        calls = sum(i.nfe for i in self.items) / max(1, len(self.items))
        times = f" x {self.samples} samples" if self.samples > 1 else ""
        return (
            f"EvalResult({100 * self.accuracy:.1f}% right [{100 * low:.1f}, {100 * high:.1f}], "
            f"{len(self.items) // self.samples} problems{times}, {calls:.1f} calls each)"
        )

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


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate: every example ``samples`` times from a blank canvas.

    An adaptive rule's gamma is the settings' number, or one of ``gammas`` per example, or
    ``head``'s choice. ``rollouts`` decodes (default: the denoiser in this process).
    """

    denoiser: ModelDenoiser
    tokenizer: Any
    task: Task
    examples: Sequence[Example]
    settings: DecodeConfig
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    batch_size: int = 256
    head: ThresholdHead | None = None
    gammas: Sequence[float] | None = None
    rollouts: Rollouts | None = None

    @property
    def engine(self) -> Rollouts:
        """What decodes."""
        return self.rollouts or LocalRollouts(self.denoiser)


def evaluate(
    request: EvalRequest, on_rollout: Callable[[Rollout], None] | None = None
) -> EvalResult:
    """Decode every example and grade it with the task's own verifier."""
    r = request
    if not r.examples:
        raise ValueError("nothing to evaluate: the list of examples is empty")
    if r.samples > 1 and not is_random(r.settings, r.temperature):
        raise ValueError(
            f"{r.samples} samples at temperature 0 are all the same; set a temperature above 0"
        )
    items: dict[int, EvalItem] = {}
    for rollout, done in evaluated_rows(r):
        items |= done
        if on_rollout:
            on_rollout(rollout)
    ordered = [items[row] for row in sorted(items)]
    described = {**r.settings.model_dump(), "temperature": r.temperature}
    return EvalResult(
        items=ordered, samples=r.samples, seconds=sum(i.seconds for i in ordered), decode=described
    )


def evaluated_rows(
    request: EvalRequest, done: Collection[int] = ()
) -> Iterator[tuple[Rollout, dict[int, EvalItem]]]:
    """Decode and grade every row (problem * samples + sample), batch by batch; items by row.

    Which rows share a batch changes nothing but rounding: a row's draws are keyed by its number.
    Batches whose rows are all ``done`` are left out; the others are what they would be without, so
    that a resumed evaluation is the same to the bit.
    """
    r = request
    samples = r.samples
    prompts = [encode_prompt(r.tokenizer, r.task.prompt(example)) for example in r.examples]
    check_room(prompts, r.settings.gen_length, r.denoiser.max_length)
    lengths = [len(prompt) for prompt in prompts for _ in range(samples)]
    for batch in batches_by_length(lengths, r.batch_size):
        if all(row in done for row in batch):
            continue
        start = time.perf_counter()
        rollout = decode_blank(
            r.engine,
            r.denoiser,
            [prompts[row // samples] for row in batch],
            r.settings,
            temperature=r.temperature,
            row_ids=batch,
            generator=named_generator(r.seed, "eval"),
            head=r.head,
            gammas=None
            if r.gammas is None
            else torch.tensor([r.gammas[row // samples] for row in batch], dtype=torch.float64),
        )
        ids = rollout.completions()
        texts = decode_texts(r.tokenizer, ids)
        lengths = rollout.action_mask.sum(-1).tolist()
        calls = rollout.nfe.tolist()
        share = (time.perf_counter() - start) / len(batch)
        items = {}
        own = [r.examples[row // samples] for row in batch]
        grades = grade(r.task, own, texts, CallContext(completion_ids=ids))
        correct = _verdicts(r.task, r.tokenizer, own, ids, grades)
        for i, (row, text, nfe, length) in enumerate(
            zip(batch, texts, calls, lengths, strict=True)
        ):
            example = r.examples[row // samples]
            items[row] = EvalItem(
                id=example.id,
                correct=correct[i],
                text=text,
                nfe=nfe,
                num_tokens=length,
                kind=str(example.fields.get("kind", "")),
                prompt="\n".join(message["content"] for message in r.task.prompt(example)),
                seed=r.seed,
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
    return temperature > 0 or selection_rule(settings.select).is_random


def decode_blank(
    rollouts: Rollouts,
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
    """Blank canvases decoded with a DecodeConfig, at a temperature of its own; ``head`` chooses
    gamma where it is null.
    """
    canvas = blank_canvas(
        prompts,
        gen_length=settings.gen_length,
        denoiser=denoiser,
        row_ids=row_ids,
        device=denoiser.device,
    )
    gamma = (
        gamma_for(settings, canvas, head)
        if gammas is None
        else gammas.to(denoiser.device, finest_dtype(denoiser.device))
    )
    wanted = settings_at(settings, temperature)
    check_truncation_served(rollouts, wanted)
    return rollouts.sample(canvas, wanted, generator, gamma)


def gamma_for(settings: DecodeConfig, canvas: Canvas, head: ThresholdHead | None) -> Gamma | None:
    """The settings' gamma; where an adaptive rule has none, the head's most probable one."""
    if selection_rule(settings.select).prefix is None or settings.gamma is not None:
        return settings.gamma
    if head is None:
        raise ValueError(
            f"decode.select={settings.select} with decode.gamma=null decodes with the model's "
            "threshold head, "
            "and there is none; set decode.gamma, for instance to 0.1"
        )
    return best_gamma(head, canvas.prompt_mask)


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a share out of n."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
