"""LLaDA2.0 and LLaDA2.1 (https://arxiv.org/abs/2512.15745): block-causal, with experts.

    x = word_embeddings[ids]
    q, k, v = query_key_value(y),  y = input_layernorm(x)                      (per layer)
    x = x + dense(attention(rope(query_layernorm(q)), rope(key_layernorm(k)), v))
    x = x + mlp(post_attention_layernorm(x))
    logits = lm_head(norm(x))

The first layers' MLP is dense; the others' is ``moe.py``'s, with a group limit and a shared expert.
A part of each head is rotated. What sees what is ``block.py``'s. Row l predicts position l. Token
editing (LLaDA2.1's decoding that decides a token more than once) is no part of the model.
Parameters carry the published names (``model.layers.0.attention.dense.weight``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from .block import GIVEN, BlockCausalModel, BlockConfig, Layer, attend
from .cache import LayerCache
from .common import RMSNorm, SwiGLU
from .family import Family
from .moe import (
    EXPERT_COUNTS,
    EXPERT_KEYS,
    EXPERTS,
    Mixture,
    Router,
    check_experts,
    grouped_sigmoid_choice,
)


@dataclass(frozen=True, kw_only=True)
class LLaDA2Config(BlockConfig):
    """Sizes and token ids, named as in LLaDA2's config.json, which lacks mask, EOS and block."""

    name: ClassVar[str] = "LLaDA2"
    keys: ClassVar[dict[str, str]] = (
        BlockConfig.keys
        | EXPERT_KEYS
        | {
            "shared_experts": "num_shared_experts",
            "dense_layers": "first_k_dense_replace",
            "n_groups": "n_group",
            "top_groups": "topk_group",
        }
    )
    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu", None),
        "rope_scaling": (None,),
        "rope_parameters": (None,),
        "use_sliding_window": (False, None),
        "use_qk_norm": (True, None),
        "use_qkv_bias": (False, None),
        "use_bias": (False, None),
        "attention_dropout": (0.0, None),
        "score_function": ("sigmoid", None),
        "norm_topk_prob": (True, None),
        "moe_router_enable_expert_bias": (True, None),
        "router_dtype": ("fp32", None),
    }
    written: ClassVar[dict[str, Any]] = {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
    }
    silent: ClassVar[dict[str, int]] = {
        "mask_token_id": 156895,
        "eos_token_id": 156892,
        "block_size": 32,
    }
    counts: ClassVar[tuple[str, ...]] = (
        *BlockConfig.counts,
        *EXPERT_COUNTS,
        "shared_experts",
        "n_groups",
        "top_groups",
    )

    rope_theta: float = 600000.0
    n_experts: int
    top_experts: int
    expert_size: int
    shared_experts: int
    dense_layers: int
    n_groups: int
    top_groups: int
    routed_scaling_factor: float
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        super().__post_init__()
        check_experts(self)
        of_a_group, rest = divmod(self.n_experts, self.n_groups)
        if rest or of_a_group < 2 or self.top_groups > self.n_groups:
            raise ValueError(
                f"num_experts {self.n_experts}, n_group {self.n_groups}, topk_group "
                f"{self.top_groups}: expected equal groups of at least 2"
            )
        if self.top_experts > of_a_group * self.top_groups:
            raise ValueError(
                f"num_experts_per_tok {self.top_experts} is above the {of_a_group} experts of "
                f"{self.top_groups} groups"
            )

    @property
    def rotary_dim(self) -> int:
        """How many values of a head are rotated."""
        return int(self.head_size * self.partial_rotary_factor)

    def tiny(self) -> LLaDA2Config:
        """The same settings and vocabulary at sizes for a dry run."""
        return replace(
            super().tiny(),
            n_experts=8,
            top_experts=2,
            expert_size=32,
            shared_experts=1,
            dense_layers=min(1, self.dense_layers),
            n_groups=2,
            top_groups=1,
        )


class _Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, from one product; no biases."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.query_key_value = nn.Linear(
            config.d_model, sum(self.heads) * self.head_dim, bias=False
        )
        self.dense = nn.Linear(config.n_heads * self.head_dim, config.d_model, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache | None
    ) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, -2)
        q = self.query_layernorm(q)
        k = self.key_layernorm(k)
        return self.dense(attend(q, k, v, rotary, mask, cache))


class LLaDA2(BlockCausalModel):
    """A block-causal mask predictor with experts behind the first layers."""

    embedding: ClassVar[str] = "word_embeddings"
    residual: ClassVar[tuple[str, ...]] = ("dense", "down_proj")
    adapted: tuple[str, ...] = ("query_key_value", "dense")
    not_adapted: tuple[str, ...] = (EXPERTS,)
    exact: tuple[str, ...] = ("expert_bias",)

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        self.experts_per_token = config.top_experts
        of_experts = (config.top_experts + config.shared_experts) * config.expert_size
        self.inner_size = max(of_experts, config.mlp_hidden_size)

    def layer(self, index: int) -> Layer:
        """Attention, and SwiGLU or experts."""
        c = self.config
        if index < c.dense_layers:
            return Layer(c, "attention", _Attention(c), SwiGLU(c.d_model, c.mlp_hidden_size))
        choose = partial(
            grouped_sigmoid_choice,
            top=c.top_experts,
            groups=c.n_groups,
            top_groups=c.top_groups,
            factor=c.routed_scaling_factor,
        )
        router = Router(c.d_model, c.n_experts, choose, bias=True)
        mixture = Mixture(c.d_model, c.expert_size, c.n_experts, router, c.shared_experts)
        return Layer(c, "attention", _Attention(c), mixture)


_FLASH = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "max_position_embeddings": 16384,
}
FAMILY = Family(
    model_type="llada2_moe",
    read=LLaDA2Config.from_dict,
    build=LLaDA2,
    linears={
        "query_key_value": "qkv",
        "dense": "out",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
    },
    hub_ids=(
        "inclusionAI/LLaDA2.0-mini",
        "inclusionAI/LLaDA2.1-mini",
        "inclusionAI/LLaDA2.0-flash",
        "inclusionAI/LLaDA2.1-flash",
    ),
    sizes={"inclusionAI/LLaDA2.0-flash": _FLASH, "inclusionAI/LLaDA2.1-flash": _FLASH},
    # Sizes as other projects' copies of the minis' config.json and a training framework's of flash
    # have them. The files could not be downloaded here: when one is at hand, it is what counts.
    released={
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "score_function": "sigmoid",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "max_position_embeddings": 32768,
        "vocab_size": 157184,
        "pad_token_id": 156892,
    },
    given=GIVEN,
    derived=("rotary_emb.inv_freq",),
)
