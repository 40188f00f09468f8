"""LLaDA (Nie et al. 2025, https://arxiv.org/abs/2502.09992): a Llama-like transformer without a
causal mask.

    x = wte[ids]
    x = x + attn_out(attention(rope(q_proj(y)), rope(k_proj(y)), v_proj(y))),  y = attn_norm(x)
        (per block)
    x = x + ff_out(silu(ff_proj(y)) * up_proj(y)),                             y = ff_norm(x)
    logits = ff_out(ln_f(x))

Parameters carry the published names (``model.transformer.blocks.0.attn_norm.weight``, ...). Unlike
the published code: no dropout, no KV cache; RMSNorm and attention are torch's own kernels.
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
    RMSNorm,
    TransformerConfig,
    check_room,
    draw_weights,
    in_chunks,
    rotary_attention,
    rotary_table,
    run_blocks,
)
from .family import Family, MaskPredictor


@dataclass(frozen=True, kw_only=True)
class LLaDAConfig(TransformerConfig):
    """Sizes and token ids, named as in LLaDA's config.json."""

    name: ClassVar[str] = "LLaDA"
    # None: the key is absent or null, which for some keys means another value
    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "rope_full_precision": (True, None),
        "layer_norm_with_affine": (True, None),
        "bias_for_layer_norm": (False, None),
        "alibi": (False, None),
        "input_emb_norm": (False, None),
        "attention_layer_norm": (False, None),
        "scale_logits": (False, None),
        "multi_query_attention": (None, False),
        "clip_qkv": (None,),
        "rope_scaling": (None,),
        "block_group_size": (1, None),
        "attention_dropout": (0.0, None),
        "residual_dropout": (0.0, None),
        "embedding_dropout": (0.0, None),
    }
    written: ClassVar[dict[str, Any]] = {"model_type": "llada", "architectures": ["LLaDAModelLM"]}

    embedding_size: int
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    include_qkv_bias: bool = False
    include_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size {self.embedding_size} is below vocab_size {self.vocab_size}"
            )
        super().__post_init__()

    @classmethod
    def derived(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What the published configuration class fills in for absent (or null) keys."""
        d_model = raw.get("d_model")
        ratio = raw.get("mlp_ratio")
        return super().derived(raw) | {
            "mlp_hidden_size": d_model * ratio if d_model and ratio else None,
            "embedding_size": raw.get("vocab_size"),
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LLaDAConfig:
        """Read config.json; ValueError on missing keys and on settings not computed here."""
        config = super().from_dict(raw)
        if raw.get("include_bias") and raw.get("bias_for_layer_norm") is None:
            raise ValueError(
                "LLaDA config has include_bias and norms with a bias; that is not supported"
            )
        return config


class _Block(nn.Module):
    """Pre-norm attention and SwiGLU, both residual."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d_model = config.d_model
        head_dim = config.head_dim
        bias = config.include_bias
        qkv_bias = bias or config.include_qkv_bias
        self.head_dim = head_dim
        self.attn_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, config.n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.attn_out = nn.Linear(d_model, d_model, bias=bias)
        self.ff_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=bias)
        self.up_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=bias)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d_model, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        y = self.attn_norm(x)
        qkv = linears(y, self.q_proj, self.k_proj, self.v_proj)
        # neither they nor the attention's output have names, which would keep them
        x = x + self.attn_out(
            rotary_attention(*qkv, head_dim=self.head_dim, rotary=rotary, mask=mask)
        )
        y = self.ff_norm(x)
        inner = linears(y, self.ff_proj, self.up_proj)
        return x + self.ff_out(F.silu(next(inner)) * next(inner))


class LLaDA(MaskPredictor):
    """A mask predictor: logits at position l are about the token at position l.

    A new module holds no memory (meta device), so building it draws nothing from the global
    generator: call ``init_weights(generator)``, or load a checkpoint
    (``unmaskrl.models.checkpoint.load_denoiser``).
    """

    compiles: bool = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            parts: dict[str, nn.Module] = {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList([_Block(config) for _ in range(config.n_layers)]),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
            if not config.weight_tying:
                parts["ff_out"] = nn.Linear(
                    config.d_model, config.embedding_size, bias=config.include_bias
                )
            self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    @property
    def _parts(self) -> Any:
        return self.model["transformer"]

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers."""
        return self._parts["blocks"]

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> LLaDA:
        """Draw all weights on the generator's device: N(0, std), before residuals std / sqrt(2
        n_layers).
        """
        draw_weights(self, generator, std, self.config.n_layers, ("attn_out", "ff_out"))
        return self

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm; keys where ``attention_mask`` is False are not
        attended.

        Rows at such positions are finite and mean nothing. Pass None when there are no pads: the
        mask is not inspected. ValueError beyond ``max_sequence_length`` positions.
        """
        check_room(ids.shape[1], self.config.max_sequence_length, "max_sequence_length")
        return in_chunks(self._hidden, self.cpu_chunk, ids, attention_mask)

    def _hidden(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        parts = self._parts
        x = parts["wte"](ids)
        rotary = rotary_table(ids.shape[1], self.config.head_dim, self.config.rope_theta, x)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        x = run_blocks(parts["blocks"], x, rotary, mask, self.recompute)
        return parts["ln_f"](x)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits over all V = ``embedding_size`` rows, as in the published code."""
        parts = self._parts
        if self.config.weight_tying:
            return F.linear(hidden, parts["wte"].weight)
        return parts["ff_out"](hidden)


FAMILY = Family(
    model_type="llada",
    read=LLaDAConfig.from_dict,
    build=LLaDA,
    linears={
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "attn_out": "out",
        "ff_proj": "gate",
        "up_proj": "up",
        "ff_out": "down",
    },
    hub_ids=("GSAI-ML/LLaDA-8B-", "GSAI-ML/LLaDA-1.5"),
    # Sizes as LLaDA's converters check them (GSAI-ML/LLaDA-8B-Instruct, config.json). The file
    # could not be downloaded here: when one is at hand, it is what counts.
    released={
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "max_sequence_length": 4096,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    },
    derived=("rotary_emb.inv_freq",),
    architectures=("LLaDAModelLM",),  # LLaDA-MoE has the same model_type
)
