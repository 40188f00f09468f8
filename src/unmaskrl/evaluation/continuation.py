"""Likelihood of given answers under a masked diffusion model, and whether greedy decoding would
give them.

log p(answer | context) has no closed form; this is the any-order ELBO of ``estimators.elbo`` on a
canvas that is the context and exactly the answer, which is how such models are scored on
multiple-choice tasks (LLaDA, arXiv 2502.09992): (n / k) * sum over k hidden tokens of log p(token |
the rest), averaged over ``num_mc`` draws, k stratified over 1..n. Nats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from ..core.block_causal import block_length_of, completed
from ..core.canvas import blank_canvas
from ..core.estimators import elbo
from ..core.finite import NotFiniteError, where_from
from ..core.precision import finest
from ..core.rng import named_generator
from ..core.rollouts import DecodeSettings, LocalRollouts
from ..core.scoring import frozen_token_logps
from ..core.types import Rollout
from ..models.denoiser import ModelDenoiser

Pair = tuple[Sequence[int], Sequence[int]]


def continuation_logps(
    denoiser: ModelDenoiser,
    pairs: Sequence[Pair],
    *,
    num_mc: int,
    seed: int,
    batch_size: int,
    max_canvases: int,
) -> list[float]:
    """ELBO in nats of each (context ids, answer ids); 0 for an empty answer.

    Masks are keyed by (seed, context, position from the end): a value does not depend on the other
    pairs or on their order, and the answers to one question share their draws. Answers of one token
    are exact. NotFiniteError if one is NaN.
    """
    estimator = elbo(num_mc=num_mc)
    result = [0.0] * len(pairs)
    for batch in _equal_lengths(pairs, batch_size):
        rollout = given_rollout(denoiser, [pairs[i] for i in batch])
        views = estimator.make_views(
            rollout, denoiser.mask_id, named_generator(seed, "loglikelihood")
        )
        logps = frozen_token_logps(denoiser, rollout, estimator, views, max_canvases=max_canvases)
        for i, value in zip(batch, finest(logps).sum(-1).tolist(), strict=True):
            if math.isnan(value):
                raise NotFiniteError(
                    f"the log-likelihood of an answer is NaN: {where_from(denoiser)}"
                )
            result[i] = value
    return result


def greedy_matches(
    denoiser: ModelDenoiser, pairs: Sequence[Pair], *, batch_size: int
) -> list[bool]:
    """Whether greedy decoding (most confident token first, one per call, as many tokens as the
    answer has) gives the answer.
    """
    result = [True] * len(pairs)
    for batch in _equal_lengths(pairs, batch_size):
        contexts = [pairs[i][0] for i in batch]
        length = len(pairs[batch[0]][1])
        canvas = blank_canvas(
            contexts, gen_length=length, denoiser=denoiser, device=denoiser.device
        )
        block = block_length_of(denoiser) or length
        settings = DecodeSettings(block_length=block, steps=length, stop_at_eos=False)
        rollout = LocalRollouts(denoiser).sample(canvas, settings)
        first = canvas.ids.shape[1] - length
        decoded = rollout.ids[:, first : first + length].tolist()
        for i, ids in zip(batch, decoded, strict=True):
            result[i] = ids == list(pairs[i][1])
    return result


def given_rollout(denoiser: ModelDenoiser, pairs: Sequence[Pair]) -> Rollout:
    """Answers of equal length as if they had been drawn: every token an action, no exit, rows named
    by their context.
    """
    length = len(pairs[0][1])
    canvas = blank_canvas(
        [c for c, _ in pairs], gen_length=length, denoiser=denoiser, device=denoiser.device
    )
    first = canvas.ids.shape[1] - length
    block = block_length_of(denoiser)
    if block is not None:
        canvas = completed(canvas, block, denoiser.mask_id, denoiser.pad_id)
    given = slice(first, first + length)
    completion = torch.zeros_like(canvas.prompt_mask)
    completion[:, given] = True
    ids = canvas.ids.clone()
    ids[:, given] = torch.tensor(
        [list(answer) for _, answer in pairs], dtype=torch.int64, device=ids.device
    )
    zeros = torch.zeros(len(pairs), dtype=torch.int64, device=ids.device)
    names = torch.tensor(
        [_name(context) for context, _ in pairs], dtype=torch.int64, device=ids.device
    )
    return Rollout(
        ids=ids,
        prompt_mask=canvas.prompt_mask,
        completion_mask=completion,
        attention_mask=canvas.attention_mask,
        decoded_step=completion.long(),
        behavior_logps=torch.zeros(ids.shape, device=ids.device),
        nfe=zeros + 1,
        exit_step=zeros,
        row_ids=names,
        group_ids=names,
        gamma=finest(zeros),
        gen_length=canvas.gen_length,
        temperature=1.0,
        exact=True,
        block_length=block,
    )


def _equal_lengths(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Indices in batches whose answers are equally long: a longer canvas would be another
    question.
    """
    if size < 1:
        raise ValueError(f"the batch size must be at least 1, got {size}")
    by_length: dict[int, list[int]] = {}
    for i, (_, answer) in enumerate(pairs):
        by_length.setdefault(len(answer), []).append(i)
    for length, indices in sorted(by_length.items()):
        ordered = sorted(indices, key=lambda i: len(pairs[i][0]))
        for at in range(0, len(ordered) if length else 0, size):
            yield ordered[at : at + size]


def _name(context: Sequence[int]) -> int:
    digest = hashlib.blake2b(",".join(map(str, context)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
