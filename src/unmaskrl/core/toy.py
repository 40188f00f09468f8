"""An exact joint distribution as a Denoiser: every quantity of the library can be enumerated on it.

Tokens 0..V-1 are ordinary, V is the mask, V + 1 is EOS (probability 0 unless ``eos_id`` names an
ordinary token). The completion is the last ``length`` columns; prompt tokens are ignored. ``head``
is the identity: hidden states are logits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .block_causal import block_positions, block_visible


class ToyDenoiser:
    """p(x_l = v | visible tokens) of an explicit joint over V**length completions, V <= 4, length
    <= 6.

    ``log_weights`` (V**length,), unnormalised, may require grad. With ``noise`` each (pattern of
    masked positions, position) gets its own random tilt, so that the conditionals belong to no
    joint: an inconsistent denoiser.
    """

    def __init__(
        self,
        log_weights: Float[Tensor, " N"],
        *,
        num_tokens: int,
        length: int,
        noise: float = 0.0,
        eos_id: int | None = None,
    ) -> None:
        if num_tokens > 4 or length > 6 or log_weights.shape != (num_tokens**length,):
            raise ValueError(
                "the toy enumerates V**length completions, V <= 4, length <= 6; got "
                f"V={num_tokens}, length={length}, "
                f"{tuple(log_weights.shape)} weights"
            )
        self.log_weights = log_weights
        self.num_tokens = num_tokens
        self.length = length
        self.mask_id = num_tokens
        self.eos_id = num_tokens + 1 if eos_id is None else eos_id
        self.pad_id = num_tokens + 1
        self.vocab_size = num_tokens + 2
        self.completions = torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))
        shape = (2**length, length, num_tokens)
        self.tilt = noise * torch.randn(
            shape, generator=torch.Generator().manual_seed(7), dtype=log_weights.dtype
        )

    @classmethod
    def random(
        cls,
        generator: torch.Generator,
        *,
        num_tokens: int = 3,
        length: int = 4,
        **options: float | int,
    ) -> ToyDenoiser:
        """A joint with standard normal log-weights, in fp64."""
        weights = torch.randn(num_tokens**length, generator=generator, dtype=torch.float64)
        kwargs: dict[str, Any] = {"num_tokens": num_tokens, "length": length, **options}
        return cls(weights, **kwargs)

    def log_joint(self) -> Float[Tensor, " N"]:
        """log p of each of ``completions``, nats."""
        return self.log_weights.log_softmax(-1)

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """Exact conditional logits log p(x_l = v | visible) at the completion; zeros at the
        prompt.
        """
        visible = ids[:, -self.length :]
        match = ((visible[:, None] == self.completions) | (visible[:, None] == self.mask_id)).all(
            -1
        )
        joint = torch.where(match, self.log_joint(), float("-inf"))
        one_hot = torch.nn.functional.one_hot(self.completions, self.num_tokens).bool()
        logits = torch.where(one_hot, joint[:, :, None, None], float("-inf")).logsumexp(1)
        pattern = ((visible == self.mask_id).long() * 2 ** torch.arange(self.length)).sum(-1)
        logits = (logits + self.tilt[pattern]).clamp(min=-1e9)
        extra = torch.full((*logits.shape[:2], 2), -1e9, dtype=logits.dtype)
        prompt = torch.zeros(
            len(ids), ids.shape[1] - self.length, self.vocab_size, dtype=logits.dtype
        )
        return torch.cat([prompt, torch.cat([logits, extra], -1)], 1)

    def head(self, hidden: Float[Tensor, "*R V"]) -> Float[Tensor, "*R V"]:
        """The identity."""
        return hidden

    def logits(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """Same as ``hidden``."""
        return self.hidden(ids, attention_mask)


class BlockToy:
    """A block-causal denoiser whose conditionals are explicit: every completion of a few tokens can
    be enumerated.

    logits(t) = bias[position of t, own token] + tanh(sum over visible s of
    table[position of t, position of s, token of s]). ``head`` is the identity. Tokens are
    0..``num_tokens`` - 1, then the mask; the first of them may be EOS. Its cache stores ids, of
    which keys and values would be functions.
    """

    def __init__(
        self,
        generator: torch.Generator,
        *,
        block_length: int = 2,
        num_tokens: int = 3,
        max_length: int = 16,
        eos_id: int | None = None,
    ) -> None:
        self.block_length: int | None = block_length
        self.mask_id = num_tokens
        self.pad_id = num_tokens + 1
        self.eos_id = num_tokens + 1 if eos_id is None else eos_id
        self.vocab_size = num_tokens + 2
        shape = (max_length, max_length, self.vocab_size, self.vocab_size)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(
            (max_length, self.vocab_size, self.vocab_size), generator=generator, dtype=torch.float64
        )
        # only ordinary tokens are drawn
        self.bias[..., num_tokens:] = -1e9

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Any = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of T tokens (``block_causal.BlockCausal``)."""
        keys = ids
        places = positions
        if cache is not None:
            cache.ids.scatter_(1, columns, ids)
            cache.positions.scatter_(1, columns, positions)
            keys = cache.ids[:, : visible.shape[2]]
            places = cache.positions[:, : visible.shape[2]]
        seen = self.table[positions[:, :, None], places[:, None], keys[:, None]]
        return self.bias[positions, ids] + (seen * visible[..., None]).sum(2).tanh()

    def new_cache(self, rows: int, columns: int) -> ToyCache:
        """A cache of ids and positions."""
        return ToyCache(*torch.zeros((2, rows, columns), dtype=torch.int64))

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """Logits on whole canvases, pads apart."""
        assert self.block_length is not None
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
        positions = block_positions(real)
        blocks = positions // self.block_length
        return self.hidden_under(ids, positions, block_visible(blocks, blocks, real))

    def head(self, hidden: Float[Tensor, "*R V"]) -> Float[Tensor, "*R V"]:
        """The identity."""
        return hidden

    def logits(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """Same as ``hidden``."""
        return self.hidden(ids, attention_mask)


@dataclass(slots=True)
class ToyCache:
    """Which tokens stand in the cache's columns."""

    ids: Int[Tensor, "B L"]
    positions: Int[Tensor, "B L"]

    def keep(self, index: Int[Tensor, " A"]) -> None:
        """Drop all other rows."""
        self.ids = self.ids[index]
        self.positions = self.positions[index]
