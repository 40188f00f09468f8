"""What the families share: RMSNorm, rotary attention, chunks on a CPU, and how a config.json is
read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# On CPU a batch runs in chunks of about this many tokens, so that activations stay in the cache:
# 10-50 % faster at d_model 128, forward and backward; the optimum is flat between 1,000 and 3,000
# tokens.
CPU_CHUNK = 2048
_TYPES = {"int": (int,), "float": (float, int), "bool": (bool,)}


class MaskPredictor(nn.Module):
    """What every family has besides its layers: how its forward pass is run, which changes no
    number.
    """

    # None: a batch is one pass, as ranks with sharded weights need it
    cpu_chunk: int | None = CPU_CHUNK
    recompute: bool = False  # activation checkpointing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_attention(
    q: Float[Tensor, "B L Q"],
    k: Float[Tensor, "B L K"],
    v: Float[Tensor, "B L K"],
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    mask: Bool[Tensor, "B 1 1 L"] | None,
) -> Float[Tensor, "B L Q"]:
    """Attention in both directions over rotated queries and keys; fewer key than query heads are
    shared.
    """
    heads = (-1, head_dim)
    q = rotate(q.unflatten(-1, heads), rotary).transpose(1, 2)
    k = rotate(k.unflatten(-1, heads), rotary).transpose(1, 2)
    v = v.unflatten(-1, heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(2)


def rotary_table(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * theta^(-2i / head_dim): (L, 1, head_dim) each, halves
    repeated.

    Attention sees differences of positions only, so left pads need no position ids: columns are
    positions.
    """
    # Angles need at least float32: in bfloat16 neighbouring positions would share one.
    return _rotary_table(
        length, head_dim, theta, like.device, torch.promote_types(like.dtype, torch.float32)
    )


@lru_cache(maxsize=64)
def _rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # The table outlives this call, so it must not be an inference tensor: those cannot be used in
    # training.
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
        angle = torch.arange(length, device=device, dtype=dtype)[:, None] / theta**exponent
        cos = angle.cos()
        sin = angle.sin()
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Float[Tensor, "B L H C"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B L H C"]:
    """Rotate each pair (x_i, x_{i + C/2}) by its position's angle."""
    cos, sin = rotary
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def in_chunks(
    body: Callable[[Tensor, Tensor | None], Tensor],
    ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"] | None,
    limit: int,
    limit_name: str,
    chunk: int | None,
) -> Float[Tensor, "B L D"]:
    """``body(ids, attention_mask)``, on a CPU in rows of ``chunk`` tokens (None: all at once);
    ValueError beyond ``limit``.
    """
    batch, length = ids.shape
    if length > limit:
        raise ValueError(f"got {length} positions, the model has {limit_name} {limit}")
    rows = batch if chunk is None else max(1, chunk // max(1, length))
    if batch <= rows or ids.device.type != "cpu":
        return body(ids, attention_mask)
    chunks = ids.split(rows)
    masks = [None] * len(chunks) if attention_mask is None else attention_mask.split(rows)
    return torch.cat([body(part, mask) for part, mask in zip(chunks, masks, strict=True)])


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "B L D"],
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    recompute: bool,
) -> Float[Tensor, "B L D"]:
    """All blocks in turn; with ``recompute`` each keeps only its input and is run again in the
    backward pass.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, rotary, mask, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
        else:
            x = block(x, rotary, mask)
    return x


@torch.no_grad()
def draw_weights(
    model: nn.Module,
    generator: torch.Generator,
    std: float,
    num_layers: int,
    residual: tuple[str, ...],
) -> None:
    """Draw all weights on the generator's device: N(0, std), std / sqrt(2 num_layers) in the
    blocks' ``residual`` layers.

    Biases become 0, norms 1.
    """
    model.to_empty(device=generator.device)
    norms = {name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" or owner in norms:
            parameter.fill_(0.0 if leaf == "bias" else 1.0)
            continue
        into_residual = (
            any(part.isdigit() for part in owner.split("."))
            and owner.rpartition(".")[-1] in residual
        )
        parameter.normal_(
            0.0, std / math.sqrt(2 * num_layers) if into_residual else std, generator=generator
        )


def refuse_unsupported(
    family: str, raw: dict[str, Any], supported: dict[str, tuple[Any, ...]]
) -> None:
    """Refuse settings that change the maths and are not computed here (ValueError)."""
    for key, values in supported.items():
        if raw.get(key) not in values:
            raise ValueError(
                f"{family} config has {key}={raw.get(key)!r}; only {values[0]!r} is supported"
            )


def read_fields(
    family: str, kind: Any, raw: dict[str, Any], derived: dict[str, Any]
) -> dict[str, Any]:
    """Values of a config dataclass's fields from config.json, absent or null ones from ``derived``
    or the default.

    ValueError on what is missing or of another type.
    """
    filled = derived | {key: value for key, value in raw.items() if value is not None}
    values = {}
    for item in fields(kind):
        if item.name == "raw":
            continue
        if filled.get(item.name) is not None:
            values[item.name] = filled[item.name]
        elif item.default is MISSING:
            raise ValueError(f"{family} config lacks {item.name}; add it to config.json")
        if item.name in values and type(values[item.name]) not in _TYPES[str(item.type)]:
            raise ValueError(
                f"{family} config has {item.name}={values[item.name]!r}; expected {item.type}"
            )
    return values


def written_config(config: Any, fixed: dict[str, Any]) -> dict[str, Any]:
    """The config.json of ``config``: the keys that were read, verbatim, except values that were
    replaced since.
    """
    if config.raw and type(config).from_dict(config.raw) == config:
        return dict(config.raw)
    return (
        fixed
        | config.raw
        | {f.name: getattr(config, f.name) for f in fields(config) if f.name != "raw"}
    )


def check_sizes(config: Any, sizes: tuple[str, ...], width: str, heads: str, kv_heads: str) -> None:
    """Refuse sizes and token ids that do not fit together (ValueError)."""
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; expected at least 1")
    d, h, kv = (getattr(config, name) for name in (width, heads, kv_heads))
    if d % h or (d // h) % 2:
        raise ValueError(f"{width} {d} / {heads} {h} must be an even whole number")
    if h % kv:
        raise ValueError(f"{heads} {h} must be a multiple of {kv_heads} {kv}")
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= getattr(config, name) < config.embedding_size:
            raise ValueError(
                f"{name} {getattr(config, name)} is not in 0..{config.embedding_size - 1}"
            )


def tiny_kv_heads(heads: int, kv_heads: int) -> int:
    """Key/value heads of a model cut down to 4 heads: the nearest divisor of 4 to the same share,
    at least 1.
    """
    return min((1, 2, 4), key=lambda count: abs(count * heads - 4 * kv_heads))
