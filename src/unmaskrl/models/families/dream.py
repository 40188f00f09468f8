"""Dream (Ye et al. 2025, https://arxiv.org/abs/2508.15487) and DiffuCoder
(https://arxiv.org/abs/2506.20639): Qwen2's transformer without a causal mask.

    x = embed_tokens[ids]
    x = x + o_proj(attention(rope(q_proj(y)), rope(k_proj(y)), v_proj(y))),  y = input_layernorm(x)
        (per layer)
    x = x + down_proj(silu(gate_proj(y)) * up_proj(y)),                      y =
        post_attention_layernorm(x)
    raw logits = lm_head(norm(x))

Raw row i predicts position i + 1, as in the autoregressive model that Dream starts from. ``hidden``
undoes that: its row l is raw row l - 1. Row 0 keeps raw row 0, as the published generation code
does; so does the first row after left pads, so that pads change nothing (there the published code
reads the pad's row). It is the first prompt token, which is never predicted here.

Parameters carry the published names (``model.layers.0.self_attn.q_proj.weight``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..low_rank import linears
from .common import (
    QWEN_KEYS,
    RMSNorm,
    SwiGLU,
    TransformerConfig,
    check_room,
    draw_weights,
    in_chunks,
    rotary_attention,
    rotary_table,
    run_blocks,
    with_plain_rope,
)
from .family import Family, MaskPredictor


@dataclass(frozen=True, kw_only=True)
class DreamConfig(TransformerConfig):
    """Sizes and token ids of Dream, from Qwen2's names in config.json."""

    name: ClassVar[str] = "Dream"
    keys: ClassVar[dict[str, str]] = QWEN_KEYS
    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu", None),
        "rope_scaling": (None,),
        "rope_parameters": (None,),  # newer transformers write rope_theta in there
        "use_sliding_window": (False, None),
        "use_mrope": (False, None),
        "attention_dropout": (0.0, None),
    }
    written: ClassVar[dict[str, Any]] = {"model_type": "Dream", "architectures": ["DreamModel"]}

    max_sequence_length: int = 131072
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6

    @property
    def embedding_size(self) -> int:
        """Width of the logits."""
        return self.vocab_size

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DreamConfig:
        """Read config.json; ValueError on missing keys and on settings not computed here."""
        config = super().from_dict(with_plain_rope(raw))
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ValueError(
                f"Dream config has head_dim={raw['head_dim']!r}; only {config.head_dim} is "
                "supported"
            )
        return config


class _Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values have biases, the
    output has none.
    """

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d = config.d_model
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, config.n_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, d, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        qkv = linears(x, self.q_proj, self.k_proj, self.v_proj)
        seen = rotary_attention(*qkv, head_dim=self.head_dim, rotary=rotary, mask=mask)
        return self.o_proj(seen)


class _Layer(nn.Module):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = SwiGLU(config.d_model, config.mlp_hidden_size)
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Dream(MaskPredictor):
    """A mask predictor: after the shift, logits at position l are about the token at position l.

    A new module holds no memory (meta device), so building it draws nothing from the global
    generator: call ``init_weights(generator)``, or load a checkpoint
    (``unmaskrl.models.checkpoint.load_denoiser``).
    """

    compiles: bool = True

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding(config.vocab_size, config.d_model),
                    "layers": nn.ModuleList([_Layer(config) for _ in range(config.n_layers)]),
                    "norm": RMSNorm(config.d_model, config.rms_norm_eps),
                }
            )
            if not config.weight_tying:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def _parts(self) -> Any:
        return self.model

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers."""
        return self._parts["layers"]

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> Dream:
        """Draw all weights on the generator's device: N(0, std), before residuals std / sqrt(2
        n_layers).
        """
        draw_weights(self, generator, std, self.config.n_layers, ("o_proj", "down_proj"))
        return self

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm, row l about position l; keys where ``attention_mask``
        is False are not attended.

        Rows at such positions are finite and mean nothing. Pass None when there are no pads: the
        mask is not inspected. ValueError beyond ``max_position_embeddings`` positions.
        """
        check_room(ids.shape[1], self.config.max_sequence_length, "max_position_embeddings")
        hidden = in_chunks(self._hidden, self.cpu_chunk, ids, attention_mask)
        return _shift(hidden, attention_mask)

    def _hidden(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        parts = self._parts
        x = parts["embed_tokens"](ids)
        rotary = rotary_table(ids.shape[1], self.config.head_dim, self.config.rope_theta, x)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        x = run_blocks(parts["layers"], x, rotary, mask, self.recompute)
        return parts["norm"](x)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits over all V = ``vocab_size`` rows, as in the published code."""
        if self.config.weight_tying:
            return F.linear(hidden, self._parts["embed_tokens"].weight)
        return self.lm_head(hidden)


def _shift(
    hidden: Float[Tensor, "B L D"], attention_mask: Bool[Tensor, "B L"] | None
) -> Float[Tensor, "B L D"]:
    """Row l becomes row l - 1; the first row that is not a pad keeps its own."""
    shifted = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)
    if attention_mask is None:
        return shifted
    first = attention_mask & (attention_mask.long().cumsum(-1) == 1)
    return torch.where(first[..., None], hidden, shifted)


FAMILY = Family(
    model_type="Dream",
    read=DreamConfig.from_dict,
    build=Dream,
    linears={
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "o_proj": "out",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
    },
    # DiffuCoder's model_type is Dream's, and it starts from Qwen2.5-Coder-7B
    hub_ids=("Dream-org/Dream-v0-", "apple/DiffuCoder-7B-"),
    # Qwen2.5-7B's sizes (Dream-org/Dream-v0-Instruct-7B, config.json). The file could not be
    # downloaded here: when one is at hand, it is what counts.
    released={
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "vocab_size": 152064,
        "mask_token_id": 151666,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
    },
    # its own tokenizer class is remote code
    slow_tokenizer="Qwen2TokenizerFast",
    derived=("rotary_emb.inv_freq",),  # a table that older versions of transformers stored
)
