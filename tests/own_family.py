"""A model family as a user would write it, in a file outside the package: a bag of embeddings.

Each position sees itself and the mean of all; no attention, so it is quick, and no linear layers
are named, so there is no memory plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import unmaskrl as u


@dataclass(frozen=True)
class BagConfig:
    """config.json as it stands, under the names that every family has."""

    d_model: int
    embedding_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    n_heads: int = 1
    max_sequence_length: int = 512

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "bag", **asdict(self)}

    def tiny(self) -> BagConfig:
        return replace(self, d_model=16)

    def with_vocabulary(self, vocab_size: int, mask_id: int, eos_id: int, pad_id: int) -> BagConfig:
        ids = {"mask_token_id": mask_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
        return replace(self, embedding_size=vocab_size, **ids)


class Bag(u.MaskPredictor):
    def __init__(self, config: BagConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embed = nn.Embedding(config.embedding_size, config.d_model)
            self.layers = nn.ModuleList([nn.Linear(config.d_model, config.d_model)])
            self.out = nn.Linear(config.d_model, config.embedding_size)

    def init_weights(self, generator: torch.Generator) -> Bag:
        self.to_empty(device=generator.device)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        return self

    def hidden(self, ids, attention_mask=None):
        seen = torch.ones_like(ids) if attention_mask is None else attention_mask
        x = self.embed(ids)
        mean = (x * seen[..., None]).sum(1, keepdim=True) / seen.sum(-1)[:, None, None]
        for layer in self.layers:
            x = x + torch.tanh(layer(x + mean))
        return x

    def head(self, hidden):
        return self.out(hidden)


def read(raw: dict[str, Any]) -> BagConfig:
    return BagConfig(**{key: value for key, value in raw.items() if key != "model_type"})


def family() -> u.Family:
    size = BagConfig(64, 300, mask_token_id=299, eos_token_id=298, pad_token_id=298)
    return u.Family(model_type="bag", read=read, build=Bag, released=size.to_dict())


def count_letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that even random weights can earn."""
    return [len(set(str(text))) / 10 for text in completions]


def not_a_family() -> str:
    return "bag"
