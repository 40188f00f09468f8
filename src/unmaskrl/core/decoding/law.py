"""The distribution that tokens are drawn from: temperature, then top-k, then top-p.

Logits are divided by the temperature; the ``top_k`` most probable tokens are kept; of these,
renormalised, the fewest whose probabilities reach ``top_p``, at least one; what is left is
renormalised and drawn from. (The order of transformers and of SDAR's and LLaDA2's published
decoders.) Of tokens with equal probability at the edge the lower ids are kept, so that exactly
``top_k`` tokens stay and ``top_k`` 1 is greedy. Temperature 0 is greedy, whatever is kept.

Position rules never see the truncated distribution: theirs is that of temperature 1 over every
token (``select``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ..precision import finest
from .sample import chunk_elements, draw, masked_log_softmax, row_chunks

# Most ids per token that a rollout records; 4 bytes each.
MAX_KEPT = 512
# a sorted copy in fp64 and its running sum, beside the logits
_COPIES = 4


class Draws(NamedTuple):
    """Tokens, their log-probabilities (nats), and the ids they were drawn from (-1: no more), if
    these are recorded.
    """

    tokens: Int[Tensor, " R"]
    logps: Float[Tensor, " R"]
    kept: Int[Tensor, "R K"] | None

    def at(self, index: Int[Tensor, " C"]) -> Draws:
        """Those of some rows."""
        kept = None if self.kept is None else self.kept[index]
        return Draws(self.tokens[index], self.logps[index], kept)


@dataclass(frozen=True, slots=True)
class Law:
    """What tokens are drawn from. None: not truncated by that."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float | None) -> Law:
        """Checked (ValueError); greedy decoding is not truncated, and top_p 1 keeps everything."""
        check_truncation(top_k, top_p)
        if temperature == 0:
            return cls(temperature)
        return cls(temperature, top_k, None if top_p == 1 else top_p)

    @property
    def truncates(self) -> bool:
        """Whether any token may be left out."""
        return self.top_k is not None or self.top_p is not None

    def num_kept(self, vocab_size: int) -> int:
        """Ids per token that a rollout records; 0: none, without a small enough ``top_k``."""
        if self.top_k is None or self.top_k > MAX_KEPT:
            return 0
        return min(self.top_k, vocab_size)

    def chunks(self, hidden_RD: Tensor, vocab_size: int) -> list[slice]:
        """Slices over rows whose logits fit into memory."""
        elements = chunk_elements(hidden_RD.device) // (_COPIES if self.truncates else 1)
        return list(row_chunks(len(hidden_RD), vocab_size, elements))

    def logps(self, logits: Float[Tensor, "R V"], mask_id: int) -> Float[Tensor, "R V"]:
        """log p of every token in nats, -inf where it is left out; T = 0 scores at T = 1."""
        logps_RV = masked_log_softmax(logits, mask_id, self.temperature)
        if not self.truncates:
            return logps_RV
        left_out = ~kept_tokens(logps_RV, self.top_k, self.top_p)
        return logps_RV.masked_fill_(left_out, float("-inf")).log_softmax(-1)

    def draw(
        self, logits: Float[Tensor, "R V"], mask_id: int, uniform: Float[Tensor, " R"]
    ) -> Draws:
        """A token per row, by its uniform."""
        logps_RV = self.logps(logits, mask_id)
        tokens = draw(logps_RV, self.temperature, uniform)
        logps = logps_RV.gather(-1, tokens[:, None]).squeeze(-1)
        size = self.num_kept(logits.shape[-1])
        if not size:
            return Draws(tokens, logps, None)
        best = logps_RV.topk(size, dim=-1)
        kept = torch.where(best.values > float("-inf"), best.indices, -1)
        return Draws(tokens, logps, kept.to(torch.int32))


def join(parts: list[Draws]) -> Draws:
    """Draws of chunks of rows, as one."""
    tokens, logps, kept = zip(*parts, strict=True)
    return Draws(torch.cat(tokens), torch.cat(logps), None if kept[0] is None else torch.cat(kept))


def kept_tokens(
    logps_RV: Float[Tensor, "R V"], top_k: int | None, top_p: float | None
) -> Bool[Tensor, "R V"]:
    """Which tokens stay, of tempered log-probabilities; those of probability 0 never do."""
    vocab_size = logps_RV.shape[-1]
    size = min(top_k or vocab_size, vocab_size)
    if size < vocab_size:
        best = logps_RV.topk(size, dim=-1).values
    else:
        best = logps_RV.sort(dim=-1, descending=True).values
    last = torch.full_like(best[:, :1], size - 1, dtype=torch.int64)
    if top_p is not None:
        reached = finest(best).softmax(-1).cumsum(-1)
        before = pad(reached[:, :-1], (1, 0))
        last = ((before < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
    edge = best.gather(-1, last)
    above = logps_RV > edge
    tied = logps_RV == edge
    room = last + 1 - above.sum(-1, keepdim=True)
    first = tied.cumsum(-1, dtype=torch.int32) <= room  # the lower ids
    return (above | (tied & first)) & (logps_RV > float("-inf"))


def check_truncation(top_k: Any, top_p: Any) -> None:
    """ValueError if these are no number of tokens and no probability."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"top_k is a number of tokens, at least 1, or null for every token; got {top_k!r}"
        )
    if top_p is not None and (
        isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1
    ):
        raise ValueError(
            f"top_p is a probability above 0 and at most 1, or null for every token; got {top_p!r}"
        )
