"""An exact joint distribution as a Denoiser: every quantity of the library can be enumerated on it.

Tokens 0..V-1 are ordinary, V is the mask, V + 1 is EOS (probability 0 unless ``eos_id`` names an
ordinary token). The completion is the last ``length`` columns; prompt tokens are ignored. ``head``
is the identity: hidden states are logits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
