"""Small block-causal models and a decoder of the tests' own: left to right, one token a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.conftest import seeded
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import (
    SDAR,
    LLaDA2,
    LLaDA2Config,
    SDARConfig,
    SDARMoe,
    SDARMoeConfig,
)
from unmaskrl.models.families.block import BlockCausalModel
from unmaskrl.models.families.cache import Cache

FAMILIES = ("sdar", "sdar_moe", "llada2_moe")
_SIZES = {
    "d_model": 20,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "head_size": 8,
    "vocab_size": 30,
    "mask_token_id": 29,
    "eos_token_id": 28,
    "pad_token_id": 28,
    "rope_theta": 10000.0,
    "max_sequence_length": 64,
}
_EXPERTS = {"n_experts": 6, "top_experts": 2, "expert_size": 12}
_LLADA2 = {
    "shared_experts": 2,
    "dense_layers": 1,
    "n_groups": 3,
    "top_groups": 2,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
}


def small_model(
    family: str, block_length: int = 4, dtype: torch.dtype = torch.float64, **changes
) -> BlockCausalModel:
    """Weights large enough that attention and routing are far from uniform; norms not 1."""
    sizes = _SIZES | {"block_length": block_length}
    if family == "sdar":
        model = SDAR(SDARConfig(**sizes | changes))
    elif family == "sdar_moe":
        model = SDARMoe(SDARMoeConfig(**sizes | _EXPERTS | {"norm_topk_prob": True} | changes))
    else:
        model = LLaDA2(LLaDA2Config(**sizes | _EXPERTS | _LLADA2 | changes))
    model.init_weights(seeded(), std=0.4).to(dtype)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("expert_bias"):
                tensor.add_(torch.randn(tensor.shape, generator=seeded(len(name))) / 4)
    return model.eval()


def small(family: str, block_length: int = 4, **changes) -> ModelDenoiser:
    """The same as a denoiser."""
    return ModelDenoiser.from_model(small_model(family, block_length, **changes))


def random_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 28, (rows, length), generator=seeded(seed))


def left_mask(pads: list[int], length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(pads)[:, None]


@dataclass
class Cached:
    """One row's cache, and how much of it is filled."""

    den: ModelDenoiser
    cache: Cache

    def call(self, ids: Tensor, start: int) -> Tensor:
        """Hidden states of ids (n,) that stand from ``start`` on and see all up to their end."""
        at = torch.arange(start, start + len(ids))[None]
        blocks = at // (self.den.block_length or 1)
        seen = torch.arange(start + len(ids))[None] // (self.den.block_length or 1)
        visible = seen[:, None, :] <= blocks[:, :, None]
        return self.den.hidden_under(ids[None], at, visible, self.cache, at)[0]


@torch.no_grad()
def decode_greedily(
    den: ModelDenoiser, prompt: Tensor, gen_length: int, *, cached: bool, clean: bool = True
) -> tuple[Tensor, Tensor]:
    """Completion and the log-probs of its tokens, the mask token left out; each call decides the
    leftmost mask. ``clean=False`` leaves out the pass over a finished block.
    """
    block = den.block_length or 1
    length = -(-(len(prompt) + gen_length) // block) * block
    ids = torch.full((length,), den.mask_id)
    ids[: len(prompt)] = prompt
    logps = []
    memory = Cached(den, den.model.new_cache(1, length))
    start = len(prompt) // block * block
    if cached and start:
        memory.call(ids[:start], 0)
    for place in range(len(prompt), length):
        first = place // block * block
        if cached:
            hidden = memory.call(ids[first : first + block], first)[place - first]
        else:
            hidden = den.hidden(ids[None])[0, place]
        logits = den.head(hidden).clone()
        logits[den.mask_id] = -torch.inf
        all_logps = logits.log_softmax(-1)
        ids[place] = all_logps.argmax()
        logps.append(all_logps.max())
        if cached and clean and (place + 1) % block == 0:
            memory.call(ids[first : first + block], first)
    return ids[len(prompt) : len(prompt) + gen_length], torch.stack(logps)[:gen_length]
