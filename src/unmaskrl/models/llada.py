"""LLaDA (Nie et al. 2025, https://arxiv.org/abs/2502.09992): a Llama-like transformer without a causal mask.

    x = wte[ids]
    x = x + attn_out(attention(rope(q_proj(y)), rope(k_proj(y)), v_proj(y))),  y = attn_norm(x)   (per block)
    x = x + ff_out(silu(ff_proj(y)) * up_proj(y)),                             y = ff_norm(x)
    logits = ff_out(ln_f(x))

Parameters carry the published names (``model.transformer.blocks.0.attn_norm.weight``, ...). Unlike the
published code: no dropout, no KV cache; RMSNorm and attention are torch's own kernels.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Settings of the published configuration class that change the maths, and the values that this code computes
# (None: the key is absent or null, which means one of the other values). The first value is the one we write.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
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
    "block_group_size": (1, None),
    "attention_dropout": (0.0, None),
    "residual_dropout": (0.0, None),
    "embedding_dropout": (0.0, None),
}
_SIZES = (
    "d_model",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "mlp_hidden_size",
    "vocab_size",
    "max_sequence_length",
)
_TYPES = {"int": (int,), "float": (float, int), "bool": (bool,)}
# On CPU a batch runs in chunks of about this many tokens, so that activations stay in the cache: 10-50 %
# faster at d_model 128, forward and backward; the optimum is flat between 1,000 and 3,000 tokens.
_CPU_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class LLaDAConfig:
    """Sizes and token ids, named as in LLaDA's config.json; ``raw`` keeps what was read, verbatim."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    include_qkv_bias: bool = False
    include_bias: bool = False
    weight_tying: bool = False
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model {self.d_model} / n_heads {self.n_heads} must be an even whole number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"embedding_size {self.embedding_size} is below vocab_size {self.vocab_size}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.embedding_size:
                raise ValueError(f"{name} {getattr(self, name)} is not in 0..{self.embedding_size - 1}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LLaDAConfig:
        """Read LLaDA's config.json; ValueError on missing keys and on settings not computed here."""
        for key, supported in _SUPPORTED.items():
            if raw.get(key) not in supported:
                expected = f"only {supported[0]!r} is supported"
                raise ValueError(f"LLaDA config has {key}={raw.get(key)!r}; {expected}")
        if raw.get("include_bias") and raw.get("bias_for_layer_norm") is None:
            raise ValueError("LLaDA config has include_bias and norms with a bias; that is not supported")
        given = {key: value for key, value in raw.items() if value is not None}
        filled = _derived(raw) | given
        values = {}
        for item in fields(cls):
            if item.name == "raw":
                continue
            if item.name in filled:
                values[item.name] = filled[item.name]
            elif item.default is MISSING:
                raise ValueError(f"LLaDA config lacks {item.name}; add it to config.json")
            if item.name in values and type(values[item.name]) not in _TYPES[str(item.type)]:
                raise ValueError(f"LLaDA config has {item.name}={values[item.name]!r}; expected {item.type}")
        return cls(**values, raw=dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """The config.json: the keys that were read, verbatim, except values that were replaced since."""
        if self.raw and LLaDAConfig.from_dict(self.raw) == self:
            return dict(self.raw)
        fixed = {"model_type": "llada", "architectures": ["LLaDAModelLM"]}
        fixed |= {key: supported[0] for key, supported in _SUPPORTED.items()}
        return fixed | self.raw | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "raw"}


def _derived(raw: dict[str, Any]) -> dict[str, Any]:
    # What the published configuration class fills in for absent (or null) keys.
    d_model, ratio = raw.get("d_model"), raw.get("mlp_ratio")
    return {
        "n_kv_heads": raw.get("n_heads"),
        "mlp_hidden_size": d_model * ratio if d_model and ratio else None,
        "embedding_size": raw.get("vocab_size"),
        "pad_token_id": raw.get("eos_token_id"),
    }


class _RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Block(nn.Module):
    """Pre-norm attention and SwiGLU, both residual."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d_model, head_dim, bias = config.d_model, config.head_dim, config.include_bias
        qkv_bias = bias or config.include_qkv_bias
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, head_dim
        self.attn_norm = _RMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, config.n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.attn_out = nn.Linear(d_model, d_model, bias=bias)
        self.ff_norm = _RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=bias)
        self.up_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=bias)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d_model, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attn_out(self._attention(self.attn_norm(x), rotary, mask))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))

    def _attention(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        heads, kv_heads = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        q = _rotate(self.q_proj(x).unflatten(-1, heads), rotary).transpose(1, 2)
        k = _rotate(self.k_proj(x).unflatten(-1, kv_heads), rotary).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, kv_heads).transpose(1, 2)
        gqa = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)


class LLaDA(nn.Module):
    """A mask predictor: logits at position l are about the token at position l.

    A new module holds no memory (meta device), so building it draws nothing from the global generator: call
    ``init_weights(generator)``, or load a checkpoint (``unmaskrl.denoiser.load_denoiser``).
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config, self.cpu_chunk = config, _CPU_CHUNK
        with torch.device("meta"):
            parts: dict[str, nn.Module] = {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList([_Block(config) for _ in range(config.n_layers)]),
                "ln_f": _RMSNorm(config.d_model, config.rms_norm_eps),
            }
            if not config.weight_tying:
                parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)
            self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    @property
    def _parts(self) -> Any:
        return self.model["transformer"]

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> LLaDA:
        """Draw all weights on the generator's device: N(0, std), before residuals std / sqrt(2 n_layers)."""
        self.to_empty(device=generator.device)
        for name, parameter in self.named_parameters():
            kind, leaf = name.split(".")[-2:]
            with torch.no_grad():
                if leaf == "bias" or kind in ("attn_norm", "ff_norm", "ln_f"):
                    parameter.fill_(0.0 if leaf == "bias" else 1.0)
                    continue
                residual = "blocks" in name and kind in ("attn_out", "ff_out")
                scale = std / math.sqrt(2 * self.config.n_layers) if residual else std
                parameter.normal_(0.0, scale, generator=generator)
        return self

    def hidden(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm; keys where ``attention_mask`` is False are not attended.

        Rows at such positions are finite and mean nothing. Pass None when there are no pads: the mask is not
        inspected. ValueError beyond ``max_sequence_length`` positions.
        """
        (batch, length), limit = ids.shape, self.config.max_sequence_length
        if length > limit:
            raise ValueError(f"got {length} positions, the model has max_sequence_length {limit}")
        rows = batch if self.cpu_chunk is None else max(1, self.cpu_chunk // max(1, length))
        if batch <= rows or ids.device.type != "cpu":
            return self._hidden(ids, attention_mask)
        chunks = ids.split(rows)
        masks = [None] * len(chunks) if attention_mask is None else attention_mask.split(rows)
        return torch.cat([self._hidden(part, mask) for part, mask in zip(chunks, masks, strict=True)])

    def _hidden(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        parts = self._parts
        x = parts["wte"](ids)
        # Angles need at least float32: in bfloat16 neighbouring positions would share one.
        wide = torch.promote_types(x.dtype, torch.float32)
        rotary = _rotary_table(ids.shape[1], self.config.head_dim, self.config.rope_theta, x.device, wide)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        for block in parts["blocks"]:
            x = block(x, rotary, mask)
        return parts["ln_f"](x)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits over all V = ``embedding_size`` rows, as in the published code."""
        parts = self._parts
        if self.config.weight_tying:
            return F.linear(hidden, parts["wte"].weight)
        return parts["ff_out"](hidden)

    def forward(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L V"]:
        """head(hidden(ids))."""
        return self.head(self.hidden(ids, attention_mask))


@lru_cache(maxsize=64)
def _rotary_table(length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * theta^(-2i / head_dim): (L, 1, head_dim) each, halves repeated."""
    # The table outlives this call, so it must not be an inference tensor: those cannot be used in training.
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
        angle = torch.arange(length, device=device, dtype=dtype)[:, None] / theta**exponent
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def _rotate(x: Float[Tensor, "B L H C"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B L H C"]:
    cos, sin = rotary
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
