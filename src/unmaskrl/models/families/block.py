"""What block-causal families share: positions, what a token sees, attention with normed queries
and keys, and a cache.

    block(l) = position(l) // block_length,  positions counted from a row's first real token
    token t sees token s  iff  block(s) <= block(t)  and s is no pad

Queries and keys are normed per head, then rotated by their position. The rest is a pre-norm
transformer: x = x + attention(norm(x)); x = x + mlp(norm(x)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...core.block_causal import block_positions, block_visible
from .cache import Cache, LayerCache
from .common import (
    QWEN_KEYS,
    RMSNorm,
    TransformerConfig,
    check_room,
    draw_weights,
    in_chunks,
    rotary_at,
    rotate,
    run_blocks,
    with_plain_rope,
)
from .family import GIVEN as IDS
from .family import MaskPredictor

Config = TypeVar("Config", bound="BlockConfig")
GIVEN = {**IDS, "block_length": "block_size"}  # what a user may give, and its key in config.json


@dataclass(frozen=True, kw_only=True)
class BlockConfig(TransformerConfig):
    """Sizes and token ids of a block-causal family, from Qwen's names in config.json.

    ``block_length`` is read from, and written as, ``block_size``.
    """

    keys: ClassVar[dict[str, str]] = QWEN_KEYS | {
        "head_size": "head_dim",
        "block_length": "block_size",
    }
    silent: ClassVar[dict[str, int]]  # what holds where config.json is silent
    counts: ClassVar[tuple[str, ...]] = ("head_size", "block_length")  # at least 1

    head_size: int
    block_length: int
    max_sequence_length: int = 32768
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{self.key(name)} is {getattr(self, name)}; expected at least 1")
        super().__post_init__()

    def check_heads(self) -> None:
        """Refuse a width of heads that cannot be rotated (ValueError)."""
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            raise ValueError(f"{self.rotary_dim} values of a head are rotated; expected pairs")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size

    @property
    def rotary_dim(self) -> int:
        """How many values of a head are rotated."""
        return self.head_size

    @property
    def embedding_size(self) -> int:
        """Width of the logits."""
        return self.vocab_size

    @classmethod
    def derived(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What a config.json need not say."""
        d = raw.get("hidden_size")
        h = raw.get("num_attention_heads")
        eos = raw.get("eos_token_id") or cls.silent.get("eos_token_id")
        filled = {"head_dim": d // h if d and h else None, "pad_token_id": eos}
        return super().derived(raw) | filled | cls.silent

    @classmethod
    def from_dict(cls: type[Config], raw: dict[str, Any]) -> Config:
        """Read config.json; ValueError on missing keys and on settings not computed here."""
        return super().from_dict(with_plain_rope(raw))

    def tiny(self: Config) -> Config:
        """The same settings and vocabulary at sizes for a dry run; blocks are as long as they
        are.
        """
        return replace(super().tiny(), head_size=16)


def attend(
    q: Float[Tensor, "B T H C"],
    k: Float[Tensor, "B T K C"],
    v: Float[Tensor, "B T K C"],
    rotary: tuple[Tensor, Tensor],
    mask: Float[Tensor, "B 1 T S"],
    cache: LayerCache | None = None,
) -> Float[Tensor, "B T HC"]:
    """Attention over rotated queries and keys; K key heads serve H query heads.

    With a ``cache`` they are put into it, and S counts its columns. ``mask`` is added to scores.
    """
    q = _rotate_part(q, rotary)
    k = _rotate_part(k, rotary)
    shared = q.shape[2] // k.shape[2]
    if cache is not None:
        # a few queries against a long cache: the queries of a key head become rows, so that the
        # cache is not copied once per query head
        keys, values = cache.put(k, v, mask.shape[-1])
        rows = q.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        seen = mask[:, :, None].expand(-1, 1, shared, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen)
        out = out.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4)
        return out.flatten(2)
    # with a mask, torch's kernels for shared key heads fall back to one that holds all scores
    if shared > 1:
        k, v = (t.repeat_interleave(shared, 2) for t in (k, v))
    keys, values = (t.transpose(1, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def added_to_scores(visible: Bool[Tensor, "B T S"], dtype: torch.dtype) -> Tensor:
    """0 where a token is seen and -inf elsewhere, (B, 1, T, S): made once, because torch would make
    and keep one per layer of a boolean mask. A token that sees nothing sees all.
    """
    # Softmax over nothing is NaN in some kernels, and NaN spreads through weights' gradients.
    hidden = ~visible & visible.any(-1, keepdim=True)
    size = visible.shape[-1]
    # rows begin at multiples of 16 numbers: CUDA's kernel would copy others
    mask = visible.new_zeros((*visible.shape[:2], -(-size // 16) * 16), dtype=dtype)
    return mask[..., :size].masked_fill_(hidden, -torch.inf)[:, None]


def _rotate_part(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The first values of each head rotated, the rest as they are."""
    size = rotary[0].shape[-1]
    if size == x.shape[-1]:
        return rotate(x, rotary)
    return torch.cat([rotate(x[..., :size], rotary), x[..., size:]], -1)


class Layer(nn.Module):
    """Pre-norm attention and MLP, both residual; the attention is stored under ``name``."""

    def __init__(self, config: BlockConfig, name: str, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + getattr(self, self.name)(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockCausalModel(MaskPredictor):
    """The body of a block-causal family: logits at position l are about the token at position l.

    A family states its layers and two names. A new module holds no memory (meta device), so
    building it draws nothing from the global generator: call ``init_weights(generator)``, or load a
    checkpoint (``unmaskrl.models.checkpoint.load_denoiser``).
    """

    config: Any  # a BlockConfig
    embedding: ClassVar[str] = "embed_tokens"  # the embedding's published name
    residual: ClassVar[tuple[str, ...]]  # linear layers that write to the residual stream

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.block_length: int = config.block_length
        with torch.device("meta"):
            self.model = nn.ModuleDict(
                {
                    self.embedding: nn.Embedding(config.vocab_size, config.d_model),
                    "layers": nn.ModuleList([self.layer(i) for i in range(config.n_layers)]),
                    "norm": RMSNorm(config.d_model, config.rms_norm_eps),
                }
            )
            if not config.weight_tying:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def layer(self, index: int) -> Layer:
        """The layer of this index, from ``config``."""
        raise NotImplementedError

    @property
    def _parts(self) -> Any:
        return self.model

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers."""
        return self._parts["layers"]

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> BlockCausalModel:
        """Draw all weights on the generator's device: N(0, std), before residuals std / sqrt(2
        n_layers); routers' biases become 0.
        """
        draw_weights(self, generator, std, self.config.n_layers, self.residual)
        for buffer in self.buffers():
            buffer.zero_()
        return self

    def new_cache(self, rows: int, columns: int) -> Cache:
        """An empty cache for ``rows`` rows of ``columns`` tokens, as the weights are. ValueError
        beyond the model's positions.
        """
        c = self.config
        if columns - self.block_length + 1 > c.max_sequence_length:
            raise ValueError(
                f"got {columns} columns, of which the last block's rest may be "
                f"{self.block_length - 1}; the model has max_position_embeddings "
                f"{c.max_sequence_length}"
            )
        weight = self._parts[self.embedding].weight
        return Cache.empty(
            c.n_layers,
            rows,
            c.n_kv_heads,
            columns,
            c.head_dim,
            device=weight.device,
            dtype=weight.dtype,
        )

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm, each token seeing its own and earlier blocks of its
        row; tokens where ``attention_mask`` is False are not counted and not seen.

        Rows at such positions are finite and mean nothing. ValueError beyond
        ``max_position_embeddings`` positions.
        """
        seen = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
        positions = block_positions(seen)
        self._check_room(positions)
        blocks = positions // self.block_length
        visible = block_visible(blocks, blocks, seen)
        return in_chunks(self._body, self.cpu_chunk, ids, positions, visible)

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Cache | None = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm of tokens at ``positions`` that see each other where
        ``visible`` says so.

        Without a cache S = T. With one, for passes without gradient, the tokens' keys and values
        are written at ``columns`` first, and s counts the cache's columns. A token that sees
        nothing has a finite row that means nothing. ValueError for a mask that is not boolean.
        """
        if visible.dtype != torch.bool:
            raise ValueError(
                f"visible is {visible.dtype}; expected bool, True where a token is seen"
            )
        self._check_room(positions)
        if cache is None:
            return in_chunks(self._body, self.cpu_chunk, ids, positions, visible)
        if columns is None:
            raise ValueError("a cache needs columns (B, T): where keys and values are written")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("a cache holds no gradients: call hidden_under under torch.no_grad()")
        return self._body(ids, positions, visible, cache.layers(columns))

    def _check_room(self, positions: Tensor) -> None:
        """ValueError beyond the model's positions; columns of pads take none. No device is waited
        for where all fit.
        """
        limit = self.config.max_sequence_length
        if positions.shape[1] > limit:
            check_room(int(positions.max()) + 1, limit, "max_position_embeddings")

    def _body(
        self, ids: Tensor, positions: Tensor, visible: Tensor, caches: Sequence[LayerCache] = ()
    ) -> Tensor:
        x = self._parts[self.embedding](ids)
        mask = added_to_scores(visible, x.dtype)
        c = self.config
        dtype = torch.promote_types(x.dtype, torch.float32)
        rotary = rotary_at(positions, c.rotary_dim, c.rope_theta, dtype)
        if not caches:
            x = run_blocks(self.blocks, x, rotary, mask, self.recompute)
        for cache, layer in zip(caches, self.blocks, strict=False):
            x = layer(x, rotary, mask, cache)
        return self._parts["norm"](x)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits over all V = ``vocab_size`` rows, as in the published code."""
        if self.config.weight_tying:
            return F.linear(hidden, self._parts[self.embedding].weight)
        return self.lm_head(hidden)
