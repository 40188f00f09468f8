"""What a model family states of itself, so that nothing else in the package knows its layers.

A family is one ``Family``: functions that read a config.json and build a module, and what memory
plan, adapters, tokenizer and dry runs need. It may come from outside the package (``model.family``:
``my_module:factory`` or ``path/to/file.py:factory``, a function without arguments that returns a
``Family``). ``unmaskrl.testing.check_family`` checks one. Which positions attend to which is the
module's own affair: ``hidden`` gets ids and left pads, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .cache import Cache

# On CPU a batch runs in chunks of about this many tokens, so that activations stay in the cache:
# 10-50 % faster at d_model 128, forward and backward; the optimum is flat between 1,000 and 3,000
# tokens.
CPU_CHUNK = 2048
# What a linear layer of a block may be: three that read the first norm (or one in place of them),
# the one behind the attention, two that read the second norm, and the one that reads their product.
ROLES = ("q", "k", "v", "qkv", "out", "gate", "up", "down")
# What a user may give where a config.json lacks it, and the key that it is written to.
GIVEN = {"mask_id": "mask_token_id", "eos_id": "eos_token_id"}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a user says of a model in place of its config.json; None: what that says, or else the
    family's own default.
    """

    mask_id: int | None = None
    eos_id: int | None = None
    block_length: int | None = None


class MaskPredictor(nn.Module):
    """The module of a family: ids (B, L) -> hidden (B, L, D) -> logits at chosen rows.

    Row l is about position l, rows are independent, and nothing is drawn. ``state_dict`` has the
    names of the released files. Built without memory (``torch.device("meta")``); ``init_weights``
    or a checkpoint fills it.
    """

    config: Any  # a FamilyConfig
    # tokens of a block that sees earlier blocks and itself; None: every token sees every other
    block_length: int | None = None
    # linear layers that adapters sit on if a recipe names none; empty: all that may have one
    adapted: tuple[str, ...] = ()
    # parts of the names of modules whose linear layers never have one (experts: too many)
    not_adapted: tuple[str, ...] = ()
    # with experts: those that a token goes to, and its inner values in all of them together
    experts_per_token: int = 0
    inner_size: int = 0
    # how the names of tensors end that are float32 at least, on disk and in memory
    exact: tuple[str, ...] = ()
    # None: a batch is one pass, as ranks with sharded weights need it
    cpu_chunk: int | None = CPU_CHUNK
    recompute: bool = False  # activation checkpointing
    graphs: Any = None  # of compiled blocks (``models/compiled.py``)
    compiles: bool = False  # blocks were seen to compile without a break: on CUDA they are compiled

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

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Cache | None = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states under a visibility that the caller states, for families with a
        ``block_length``; see ``families/block.py``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no block_length")

    def new_cache(self, rows: int, columns: int) -> Cache:
        """An empty cache, for families with a ``block_length``."""
        raise NotImplementedError(f"{type(self).__name__} has no block_length")

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
    the config and are not read. ``sizes``: where released models differ, by how their hub ids begin
    (the longest counts). ``in_name``: what a model's name says where its config.json is silent.
    ``given``: what a user may give, by its key in config.json. ``architectures``: those that are
    computed here, if others share the model_type.
    """

    model_type: str
    read: Callable[[dict[str, Any]], FamilyConfig]
    build: Callable[[Any], MaskPredictor]
    linears: Mapping[str, str] = field(default_factory=dict)
    hub_ids: tuple[str, ...] = ()
    released: Mapping[str, Any] | None = None
    slow_tokenizer: str | None = None
    derived: tuple[str, ...] = ()
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_name: Callable[[str], Mapping[str, Any]] | None = None
    given: Mapping[str, str] = field(default_factory=lambda: GIVEN)
    architectures: tuple[str, ...] = ()

    def known(self, hub_id: str) -> dict[str, Any] | None:
        """The config.json of a released model by its hub id, or of the family's main one by its
        model_type; None if it is not known.
        """
        starts = [start for start in self.hub_ids if hub_id.startswith(start)]
        if self.released is None or not (starts or hub_id == self.model_type):
            return None
        own = self.sizes.get(max(starts, key=len), {}) if starts else {}
        return {**self.released, **own, **self.said_by(hub_id)}

    def said_by(self, name: str) -> Mapping[str, Any]:
        """What a model's name (or the path of its folder) says of it."""
        return self.in_name(name.rstrip("/")) if self.in_name else {}

    def config(
        self,
        raw: dict[str, Any],
        where: object,
        given: Given | None = None,
        name: str = "",
    ) -> FamilyConfig:
        """``read(raw)``, with what is ``given`` in place of what stands there, and what the model's
        ``name`` says where nothing does; ValueError that names ``where`` it came from.
        """
        if raw.get("model_type") != self.model_type:
            raise ValueError(
                f"{where} has model_type {raw.get('model_type')!r}, and this family reads "
                f"{self.model_type!r}; name another family"
            )
        kinds = raw.get("architectures") or []
        if self.architectures and kinds and not set(kinds) & set(self.architectures):
            raise ValueError(
                f"{where} has architectures {kinds}, and of model_type {self.model_type!r} "
                f"{', '.join(self.architectures)} is computed here; name another family"
            )
        values = {
            key: value for key, value in asdict(given or Given()).items() if value is not None
        }
        if unknown := values.keys() - self.given.keys():
            raise ValueError(
                f"model.{sorted(unknown)[0]}: {self.model_type} has none (its attention is full); "
                "leave it out"
            )
        said = {key: value for key, value in self.said_by(name).items() if raw.get(key) is None}
        try:
            return self.read(raw | said | {self.given[key]: v for key, v in values.items()})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
