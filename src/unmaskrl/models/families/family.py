"""What a model family states of itself, so that nothing else in the package knows its layers.

A family is one ``Family``: functions that read a config.json and build a module, and what memory
plan, adapters, tokenizer and dry runs need. It may come from outside the package (``model.family``:
``my_module:factory`` or ``path/to/file.py:factory``, a function without arguments that returns a
``Family``). ``unmaskrl.testing.check_family`` checks one. Which positions attend to which is the
module's own affair: ``hidden`` gets ids and left pads, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# On CPU a batch runs in chunks of about this many tokens, so that activations stay in the cache:
# 10-50 % faster at d_model 128, forward and backward; the optimum is flat between 1,000 and 3,000
# tokens.
CPU_CHUNK = 2048
# What a linear layer of a block may be: three that read the first norm, the one behind the
# attention, two that read the second norm, and the one that reads their product.
ROLES = ("q", "k", "v", "out", "gate", "up", "down")


@runtime_checkable
class FamilyConfig(Protocol):
    """Sizes and ids of one model, under the names that every family has.

    ``embedding_size``: width of the logits. ``max_sequence_length``: positions of prompt and
    completion together. ``d_model``: width of the hidden states.
    """

    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def max_sequence_length(self) -> int: ...
    @property
    def mask_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...

    def to_dict(self) -> dict[str, Any]:
        """The config.json, ``model_type`` included: reading it gives this config again."""
        ...

    def tiny(self) -> FamilyConfig:
        """The same settings and vocabulary at sizes for a dry run."""
        ...

    def with_vocabulary(
        self, vocab_size: int, mask_id: int, eos_id: int, pad_id: int
    ) -> FamilyConfig:
        """The same architecture for another tokenizer."""
        ...


class MaskPredictor(nn.Module):
    """The module of a family: ids (B, L) -> hidden (B, L, D) -> logits at chosen rows.

    Row l is about position l, rows are independent, and nothing is drawn. ``state_dict`` has the
    names of the released files. Built without memory (``torch.device("meta")``); ``init_weights``
    or a checkpoint fills it.
    """

    config: Any  # a FamilyConfig
    # None: a batch is one pass, as ranks with sharded weights need it
    cpu_chunk: int | None = CPU_CHUNK
    recompute: bool = False  # activation checkpointing

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers, whose linear layers are adapted, put into 4 bits, and sharded.

        Here: the longest list of modules. ValueError if there is none.
        """
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"{type(self).__name__} has no list of blocks, which adapters and shards need"
            )
        return max(lists, key=len)

    def init_weights(self, generator: torch.Generator) -> MaskPredictor:
        """Draw all weights on the generator's device; returns self."""
        raise NotImplementedError

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm; keys where ``attention_mask`` is False (left pads)
        are not attended.
        """
        raise NotImplementedError

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits at chosen rows of ``hidden``."""
        raise NotImplementedError

    def forward(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """head(hidden(ids))."""
        return self.head(self.hidden(ids, attention_mask))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    ``model_type``: its name in config.json. ``read``: config.json -> config, ValueError on settings
    that are not computed. ``build``: config -> module without memory. ``linears``: the linear
    layers of a block by name and what each is (``ROLES``); without them `check` makes no memory
    plan. ``hub_ids``: how the hub ids of released models begin, and ``released``: their config.json
    as far as it sets sizes and ids, so that they can be priced and rehearsed without a download.
    ``slow_tokenizer``: the class of transformers that reads vocab.json and merges.txt where a
    released model has no tokenizer.json. ``derived``: endings of stored tensors that follow from
    the config and are not read.
    """

    model_type: str
    read: Callable[[dict[str, Any]], FamilyConfig]
    build: Callable[[Any], MaskPredictor]
    linears: Mapping[str, str] = field(default_factory=dict)
    hub_ids: tuple[str, ...] = ()
    released: Mapping[str, Any] | None = None
    slow_tokenizer: str | None = None
    derived: tuple[str, ...] = ()

    def config(self, raw: dict[str, Any], where: object) -> FamilyConfig:
        """``read(raw)``; ValueError that names ``where`` it came from."""
        if raw.get("model_type") != self.model_type:
            raise ValueError(
                f"{where} has model_type {raw.get('model_type')!r}, and this family reads "
                f"{self.model_type!r}; name another family"
            )
        try:
            return self.read(raw)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
