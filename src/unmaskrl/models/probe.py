"""A smoke probe of a loaded checkpoint: can it fill in masked tokens of the task's own text?

A model whose logits are read one row off, with a wrong mask id or a wrong tokenizer, trains without
an error and learns nothing. Here some tokens are masked and the argmax at their rows, and one row
to either side, is compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.denoiser import Denoiser
from ..core.finite import NotFiniteError, where_from

MASKED_SHARE = 0.3
ROWS_PER_HEAD = 256  # rows of logits at once
MIN_TOKENS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Shares of masked tokens that the argmax hits: at the token's own row, at the row before
    (left) and after (right).

    ``chance``: share of the most frequent of these tokens. ``num_tokens``: how many there are.
    """

    share: float
    chance: float
    share_shifted_left: float
    share_shifted_right: float
    num_tokens: int


NOTHING = Probe(
    share=0.0, chance=0.0, share_shifted_left=0.0, share_shifted_right=0.0, num_tokens=0
)


@torch.no_grad()
def masked_accuracy(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> Probe:
    """Mask about 30% of the tokens of each text (prompt + reference, one denoiser call in all) and
    compare the argmax.

    Only tokens that differ from both neighbours are compared: a row that repeats the token it sees
    would otherwise look like a shifted one. Draws from ``generator`` alone (CPU).
    """
    texts = [[*prompt, *reference] for prompt, reference in zip(prompts, references, strict=True)]
    if not texts:
        return NOTHING
    width = max(map(len, texts))
    device = device_of(denoiser)
    ids = torch.full((len(texts), width), denoiser.pad_id)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        real[row, width - len(text) :] = True
    scored = real & (torch.rand(ids.shape, generator=generator) < MASKED_SHARE)
    canvas = torch.where(scored, denoiser.mask_id, ids).to(device)
    hidden = denoiser.hidden(canvas, None if bool(real.all()) else real.to(device))
    rows, columns = comparable(ids, real, scored).nonzero(as_tuple=True)
    truth = ids[rows, columns]
    if not len(truth):
        return NOTHING

    def share(shift: int) -> float:
        guess = argmax_tokens(denoiser, hidden[rows.to(device), (columns + shift).to(device)])
        return float((guess.cpu() == truth).double().mean())

    return Probe(
        share=share(0),
        chance=float(truth.bincount().max()) / len(truth),
        share_shifted_left=share(-1),
        share_shifted_right=share(1),
        num_tokens=len(truth),
    )


def comparable(
    ids: Int[Tensor, "B L"], real: Bool[Tensor, "B L"], scored: Bool[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Masked positions inside a text whose token differs from both neighbours."""
    inside = torch.zeros_like(scored)
    middle = ids[:, 1:-1]
    before = ids[:, :-2]
    after = ids[:, 2:]
    inside[:, 1:-1] = scored[:, 1:-1] & real[:, :-2] & (middle != before) & (middle != after)
    return inside


def argmax_tokens(denoiser: Denoiser, hidden: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """The likeliest token at each row; the mask token is never an answer. NotFiniteError on logits
    that are not finite.
    """
    best = []
    tops = []
    for part in hidden.split(ROWS_PER_HEAD):
        never = torch.tensor([denoiser.mask_id], device=part.device)
        # NaN is the largest of all
        top = denoiser.head(part).index_fill(-1, never, -torch.inf).max(-1)
        best.append(top.indices)
        tops.append(top.values)
    if not bool(torch.cat(tops).isfinite().all()):
        raise NotFiniteError(f"the model's logits are not finite: {where_from(denoiser)}")
    return torch.cat(best)


def check_probe(probe: Probe) -> str | None:
    """None for a model that fills in masked tokens, a warning for one at chance; ValueError if its
    neighbours' rows do.

    Clear means three standard errors of a share over ``num_tokens``; below 20 tokens nothing is
    said.
    """
    if probe.num_tokens < MIN_TOKENS:
        return None
    error = math.sqrt(max(probe.chance * (1 - probe.chance), 1e-4) / probe.num_tokens)
    if probe.share > probe.chance + 3 * error:
        return None
    text = f"masked-token accuracy {probe.share:.2f}, chance {probe.chance:.2f}"
    shifted, place = max((probe.share_shifted_left, "before"), (probe.share_shifted_right, "after"))
    if shifted > max(probe.share, probe.chance) + 3 * error:
        raise ValueError(
            f"{text}: logits look shifted by one ({shifted:.2f} one row {place}); check the "
            "family's logit shift, mask id and "
            "tokenizer, or set run.probe=false"
        )
    return (
        f"{text}: the model does not know the task's text better than chance; check mask id and "
        "tokenizer"
    )


def device_of(denoiser: Denoiser) -> torch.device:
    """Where a denoiser computes; those that do not say, on the CPU."""
    return getattr(denoiser, "device", torch.device("cpu"))
