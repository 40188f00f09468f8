"""SDAR (Cheng et al. 2025, https://arxiv.org/abs/2510.06303), dense and with experts: Qwen3's
transformer, block-causal. TraDo and DiRL use the same files.

    x = embed_tokens[ids]
    x = x + o_proj(attention(rope(q_norm(q_proj(y))), rope(k_norm(k_proj(y))), v_proj(y))),
        y = input_layernorm(x)                                                (per layer)
    x = x + mlp(post_attention_layernorm(x))
    logits = lm_head(norm(x))

What sees what is ``block.py``'s. Row l predicts position l. Parameters carry the published names
(``model.layers.0.self_attn.q_norm.weight``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..low_rank import linears
from .block import GIVEN, BlockCausalModel, BlockConfig, Layer, attend
from .cache import LayerCache
from .common import RMSNorm, SwiGLU
from .family import Family
from .moe import EXPERT_COUNTS, EXPERT_KEYS, EXPERTS, Mixture, Router, check_experts, softmax_choice


@dataclass(frozen=True, kw_only=True)
class SDARConfig(BlockConfig):
    """Sizes and token ids of SDAR, from Qwen3's names in config.json."""

    name: ClassVar[str] = "SDAR"
    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu", None),
        "rope_scaling": (None,),
        "rope_parameters": (None,),  # newer transformers write rope_theta in there
        "use_sliding_window": (False, None),
        "attention_bias": (False, None),
        "attention_dropout": (0.0, None),
    }
    written: ClassVar[dict[str, Any]] = {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
    }
    silent: ClassVar[dict[str, int]] = {
        "mask_token_id": 151669,
        "block_size": 4,
        "head_dim": 128,
    }


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys; no biases."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        d = config.d_model
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, d, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache | None
    ) -> Tensor:
        heads = (-1, self.head_dim)
        read = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (one.unflatten(-1, heads) for one in read)
        q = self.q_norm(q)
        k = self.k_norm(k)
        return self.o_proj(attend(q, k, v, rotary, mask, cache))


class SDAR(BlockCausalModel):
    """A block-causal mask predictor with a dense MLP in every layer."""

    residual: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")

    def layer(self, index: int) -> Layer:
        """Attention and SwiGLU."""
        c = self.config
        return Layer(c, "self_attn", Attention(c), SwiGLU(c.d_model, c.mlp_hidden_size))


@dataclass(frozen=True, kw_only=True)
class SDARMoeConfig(SDARConfig):
    """SDAR with Qwen3-MoE's experts in every layer; ``intermediate_size`` is not used."""

    name: ClassVar[str] = "SDAR-MoE"
    keys: ClassVar[dict[str, str]] = SDARConfig.keys | EXPERT_KEYS
    supported: ClassVar[dict[str, tuple[Any, ...]]] = SDARConfig.supported | {
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
    }
    written: ClassVar[dict[str, Any]] = {
        "model_type": "sdar_moe",
        "architectures": ["SDARMoeForCausalLM"],
    }
    counts: ClassVar[tuple[str, ...]] = (*SDARConfig.counts, *EXPERT_COUNTS)

    n_experts: int
    top_experts: int
    expert_size: int
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        super().__post_init__()
        check_experts(self)

    def tiny(self) -> SDARMoeConfig:
        """The same settings and vocabulary at sizes for a dry run."""
        return replace(super().tiny(), n_experts=8, top_experts=2, expert_size=32)


class SDARMoe(BlockCausalModel):
    """A block-causal mask predictor with experts in every layer."""

    residual: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    not_adapted: tuple[str, ...] = (EXPERTS,)

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__(config)
        self.experts_per_token = config.top_experts
        self.inner_size = config.top_experts * config.expert_size

    def layer(self, index: int) -> Layer:
        """Attention and experts."""
        c = self.config
        choose = partial(softmax_choice, top=c.top_experts, renormalise=c.norm_topk_prob)
        router = Router(c.d_model, c.n_experts, choose)
        mixture = Mixture(c.d_model, c.expert_size, c.n_experts, router)
        return Layer(c, "self_attn", Attention(c), mixture)


def block_in_name(name: str) -> Mapping[str, Any]:
    """The block that a released model's name ends with (``-b16``), where config.json is silent."""
    found = re.search(r"-b(\d+)$", name)
    return {"block_size": int(found[1])} if found else {}


LINEARS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 9728,
}
_8B = {**_4B, "hidden_size": 4096, "intermediate_size": 12288}
_SIZES = {
    "JetLM/SDAR-1.7B-": {
        **_4B,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
    },
    "JetLM/SDAR-4B-": _4B,
    "JetLM/SDAR-8B-": _8B,
    "Gen-Verse/TraDo-4B-": _4B,
    "Gen-Verse/TraDo-8B-": _8B,
}
# Of all sizes, as two projects' copies of the released config.json agree on it. The files could not
# be downloaded here: when one is at hand, it is what counts.
RELEASED = {
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "block_size": 4,
    "mask_token_id": 151669,
}
FAMILY = Family(
    model_type="sdar",
    read=SDARConfig.from_dict,
    build=SDAR,
    linears=LINEARS,
    hub_ids=tuple(_SIZES),
    sizes=_SIZES,
    released={"model_type": "sdar", "architectures": ["SDARForCausalLM"], **RELEASED, **_8B},
    in_name=block_in_name,
    given=GIVEN,
    slow_tokenizer="Qwen2TokenizerFast",
    derived=("rotary_emb.inv_freq",),
)
MOE_FAMILY = Family(
    model_type="sdar_moe",
    read=SDARMoeConfig.from_dict,
    build=SDARMoe,
    linears=LINEARS,
    hub_ids=("JetLM/SDAR-30B-A3B-",),
    released={
        "model_type": "sdar_moe",
        "architectures": ["SDARMoeForCausalLM"],
        **RELEASED,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    in_name=block_in_name,
    given=GIVEN,
    slow_tokenizer="Qwen2TokenizerFast",
    derived=("rotary_emb.inv_freq",),
)
