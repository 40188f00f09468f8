"""Canvas builders: blank, or with anchors (spatial pruning, STP, arXiv 2602.08905).

Anchors are (offset, id) pairs on the completion, never text. Which tokens of a reference answer
become anchors is a choice of scores: anchors are the highest-scoring tokens outside the protected
span. Padding, EOS and end-of-turn tokens are never anchors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .block_causal import BlockCausal, block_length_of, completed, hidden_beside_clean
from .decoding.sample import masked_log_softmax, row_chunks
from .denoiser import Denoiser, end_ids
from .finite import NotFiniteError, where_from
from .rng import counter_uniform
from .types import Canvas

COUNTS = ("reference", "outside_answer")
SELECTIONS = ("random", "protect_answer", "most_predictable", "protect_answer+most_predictable")


def blank_canvas(
    prompts: Sequence[Sequence[int]],
    *,
    gen_length: int,
    denoiser: Denoiser,
    row_ids: Sequence[int] | None = None,
    group_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Canvas:
    """A canvas whose completion is fully masked; prompts (id lists) are padded on the left.

    ``row_ids`` (default 0..B-1) key the rows' random draws; ``group_ids`` (default: row ids) say
    which rows share a prompt.
    """
    return anchored_canvas(
        prompts,
        [{}] * len(prompts),
        gen_length=gen_length,
        denoiser=denoiser,
        row_ids=row_ids,
        group_ids=group_ids,
        device=device,
    )


def anchored_canvas(
    prompts: Sequence[Sequence[int]],
    anchors: Sequence[Mapping[int, int]],
    *,
    gen_length: int,
    denoiser: Denoiser,
    row_ids: Sequence[int] | None = None,
    group_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Canvas:
    """A canvas with some completion tokens given: ``anchors[b]`` maps offsets in the completion to
    token ids.

    Raises ValueError for anchors outside the completion, or that are end (EOS, end-of-turn),
    padding or mask tokens.
    """
    if not prompts or len(prompts) != len(anchors):
        raise ValueError(
            f"need as many anchor maps as prompts and at least one; got {len(anchors)} and "
            f"{len(prompts)}"
        )
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt is empty; expected at least one token id")
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width + gen_length), denoiser.pad_id, dtype=torch.int64)
    ids[:, width:] = denoiser.mask_id
    prompt_mask = torch.zeros(ids.shape, dtype=torch.bool)
    fixed_mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b, (prompt, given) in enumerate(zip(prompts, anchors, strict=True)):
        ids[b, width - len(prompt) : width] = torch.tensor(prompt, dtype=torch.int64)
        prompt_mask[b, width - len(prompt) : width] = True
        for offset, token in given.items():
            _check_anchor(offset, token, gen_length, denoiser)
            ids[b, width + offset] = token
            fixed_mask[b, width + offset] = True
    completion = torch.arange(ids.shape[1]) >= width
    rows = list(range(len(prompts))) if row_ids is None else list(row_ids)
    groups = rows if group_ids is None else list(group_ids)
    return Canvas(
        ids=ids.to(device),
        prompt_mask=prompt_mask.to(device),
        fixed_mask=fixed_mask.to(device),
        attention_mask=(prompt_mask | completion).to(device),
        row_ids=torch.tensor(rows, dtype=torch.int64, device=device),
        group_ids=torch.tensor(groups, dtype=torch.int64, device=device),
        gen_length=gen_length,
    ).validate(denoiser.mask_id)


def choose_anchors(
    reference: Sequence[int],
    scores: Sequence[float],
    *,
    keep: float,
    gen_length: int,
    protected: Sequence[bool] | None = None,
    never: Sequence[int] = (),
    count: str = "reference",
) -> dict[int, int]:
    """The round(keep * n) highest-scoring tokens of an n-token reference as {offset: id}.

    ``protected`` tokens (the answer span), ids in ``never`` (EOS, padding) and tokens beyond
    ``gen_length`` are not taken; n counts every token of the reference but those in ``never``. With
    ``count="outside_answer"`` it is STP's published rule, m - floor((1 - keep) m) of the m tokens
    that are not protected either. Ties go to the left.
    """
    if not 0 <= keep <= 1:
        raise ValueError(
            f"keep is the fraction of the reference that is fixed, in [0, 1]; got {keep}"
        )
    banned = [False] * len(reference) if protected is None else list(protected)
    if not len(reference) == len(scores) == len(banned):
        raise ValueError(
            f"{len(reference)} tokens, {len(scores)} scores, {len(banned)} protected flags: must "
            "be equal"
        )
    if count not in COUNTS:
        raise ValueError(f"count must be one of {', '.join(COUNTS)}, got {count!r}")
    number = int(keep * sum(token not in never for token in reference) + 0.5)
    if count == "outside_answer":
        outside = sum(
            not ban and token not in never for token, ban in zip(reference, banned, strict=True)
        )
        number = outside - int((1 - keep) * outside)
    allowed = [
        i for i, t in enumerate(reference) if not banned[i] and t not in never and i < gen_length
    ]
    best = sorted(allowed, key=lambda i: (-scores[i], i))[:number]
    return {i: reference[i] for i in sorted(best)}


def random_scores(length: int, *, seed: int, row_id: int) -> list[float]:
    """Scores for the ``random`` selections: uniforms keyed by (seed, row, offset), the same in any
    batch.
    """
    return _uniforms(length, seed, row_id).tolist()


@torch.no_grad()
def predictability(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
) -> list[list[float]]:
    """log p(y_i | prompt, all completion tokens masked), in nats, for the tokens of each reference
    answer.

    The scores of ``most_predictable`` (STP, stage 1): one call per row on a completion as long as
    the longest reference. A block-causal denoiser sees the reference in the blocks before, as it
    will when it decodes. NotFiniteError if one is NaN.
    """
    gen_length = max(map(len, references))
    canvas = blank_canvas(prompts, gen_length=gen_length, denoiser=denoiser, device=device)
    hidden = _hidden_of_open(denoiser, canvas, references)
    result = []
    for row, reference in zip(hidden, references, strict=True):
        targets = torch.tensor(list(reference), dtype=torch.int64)
        scores = []
        for chunk in row_chunks(len(reference), denoiser.vocab_size):
            logps = masked_log_softmax(
                denoiser.head(row[: len(reference)][chunk]), denoiser.mask_id, 1.0
            )
            scores += logps.gather(-1, targets[chunk, None].to(logps.device)).squeeze(-1).tolist()
        if any(map(math.isnan, scores)):
            raise NotFiniteError(
                f"log-probabilities of a reference answer are NaN: {where_from(denoiser)}"
            )
        result.append(scores)
    return result


def _hidden_of_open(
    denoiser: Denoiser, canvas: Canvas, references: Sequence[Sequence[int]]
) -> Float[Tensor, "B G D"]:
    length = block_length_of(denoiser)
    if length is None:
        return denoiser.hidden(canvas.ids, canvas.attention_mask)[:, -canvas.gen_length :]
    assert isinstance(denoiser, BlockCausal)
    first = canvas.ids.shape[1] - canvas.gen_length
    end = canvas.ids.shape[1]
    canvas = completed(canvas, length, denoiser.mask_id, denoiser.pad_id)
    clean = canvas.ids.clone()
    for row, reference in zip(clean, references, strict=True):
        row[first : first + len(reference)] = torch.tensor(list(reference), device=row.device)
    hidden = hidden_beside_clean(
        denoiser, canvas.ids[:, None], clean, canvas.attention_mask, first
    )[:, 0]
    return hidden[:, : end - first]


def _uniforms(length: int, seed: int, row_id: int) -> Float64[Tensor, " N"]:
    return counter_uniform(seed, torch.tensor(row_id), torch.arange(length))


def _check_anchor(offset: int, token: int, gen_length: int, denoiser: Denoiser) -> None:
    if not 0 <= offset < gen_length:
        raise ValueError(f"anchor offset {offset} is outside the completion of {gen_length} tokens")
    if token in (denoiser.mask_id, denoiser.eos_id, denoiser.pad_id, *end_ids(denoiser)):
        raise ValueError(
            f"token {token} (mask, end of turn, EOS or padding) cannot be an anchor: it fixes "
            "nothing"
        )
