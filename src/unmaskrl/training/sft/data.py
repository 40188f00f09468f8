"""The data of a supervised run: a task's references as ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import ModelDenoiser
from ...models.tokenizer import encode_prompt, encode_reference
from ...recipes.registry import COMPONENTS, make_task, setting
from ...recipes.schema import SFTMixture
from ...tasks import LazyTask, Task


@dataclass(frozen=True, slots=True)
class SFTData:
    """Token ids of one part of the data: prompts (N, P), left-padded, their masks, right and lazy
    completions (N, G).
    """

    prompts: Tensor
    prompt_mask: Tensor
    references: Tensor
    lazy: Tensor
    part: SFTMixture

    def batch(
        self, step: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one step: with probability lazy_share the lazy demonstration, once lazy_from of
        the run is over.
        """
        index = torch.randint(len(self.prompts), (self.part.batch_size,), generator=generator)
        share = self.part.lazy_share if step >= self.part.lazy_from * steps else 0.0
        is_lazy = torch.rand(self.part.batch_size, generator=generator) < share
        completions = torch.where(is_lazy[:, None], self.lazy[index], self.references[index])
        return self.prompts[index], self.prompt_mask[index], completions


def encode_mixture(part: SFTMixture, tokenizer: Any, denoiser: ModelDenoiser) -> SFTData:
    """References and lazy demonstrations of a task's training problems as ids."""
    task = mixture_task(part)
    examples = task.examples("train")[: part.num_examples][: part.first]
    # a problem without a known solution teaches nothing here
    pairs = [(e, text) for e in examples if (text := task.reference(e)) is not None]
    if not pairs:
        raise ValueError(
            f"{task.name}: none of {len(examples)} problems has a reference to learn from: give "
            "others"
        )
    prompts = [encode_prompt(tokenizer, task.prompt(example)) for example, _ in pairs]
    references = _encode_all(tokenizer, [text for _, text in pairs])
    lazy = references
    if isinstance(task, LazyTask):
        lazy = _encode_all(tokenizer, [task.lazy(example) for example, _ in pairs])
    elif part.lazy_share > 0:
        raise ValueError(
            f"data.lazy_share is {part.lazy_share}, but task {task.name} has no lazy policy: set "
            "it to 0"
        )
    longest = max(map(len, references + lazy)) + 1
    if longest > part.gen_length:
        raise ValueError(
            f"{task.name}: a completion has {longest} tokens, gen_length is {part.gen_length}: "
            "raise it"
        )
    width = max(map(len, prompts))
    limit = denoiser.max_length
    if limit is not None and width + part.gen_length > limit:
        raise ValueError(
            f"{task.name}: the longest prompt has {width} tokens and gen_length is "
            f"{part.gen_length}, the model reads {limit}: lower gen_length, or give shorter ones"
        )
    return SFTData(
        prompts=torch.tensor([[denoiser.pad_id] * (width - len(p)) + p for p in prompts]),
        prompt_mask=torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]),
        references=torch.tensor(
            [r + [denoiser.eos_id] * (part.gen_length - len(r)) for r in references]
        ),
        lazy=torch.tensor([r + [denoiser.eos_id] * (part.gen_length - len(r)) for r in lazy]),
        part=part,
    )


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each completion; of sudoku's 60,000 few hundred differ, and each is encoded once."""
    known = {text: encode_reference(tokenizer, text, [])[0] for text in dict.fromkeys(texts)}
    return [known[text] for text in texts]


def mixture_task(part: SFTMixture) -> Task:
    """The task of one part of the data; one that generates its problems makes ``num_examples`` of
    them.
    """
    generates = setting(part.task, COMPONENTS["task"], "train_size", "data.task") is not None
    size = {"train_size": part.num_examples} if generates else {}
    return make_task({**part.task, **size}, "data.task")
