"""What the shipped families share: their config, RMSNorm, rotary attention, chunks on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..low_rank import linears
from .family import GIVEN

Config = TypeVar("Config", bound="TransformerConfig")
_TYPES = {"int": (int,), "float": (float, int), "bool": (bool,)}
_SIZES = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size")
GIVEN_IN = {key: name for name, key in GIVEN.items()}
# what config.json calls the sizes of a transformer of Qwen's kind
QWEN_KEYS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and token ids of a Llama-like transformer; a family's class says how its config.json
    calls them.

    ``raw`` keeps what was read, verbatim.
    """

    name: ClassVar[str]  # in messages
    # what config.json calls a field, where it is another name
    keys: ClassVar[dict[str, str]] = {}
    # settings that change the maths, and the values that are computed here (None: the key is absent
    # or null); the first value is the one that is written
    supported: ClassVar[dict[str, tuple[Any, ...]]]
    written: ClassVar[dict[str, Any]]

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    max_sequence_length: int
    rope_theta: float
    rms_norm_eps: float
    weight_tying: bool = False
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse sizes and ids that do not fit together (ValueError)."""
        for name in (*_SIZES, "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.key(name)} is {getattr(self, name)}; expected at least 1")
        self.check_heads()
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.key('n_heads')} {self.n_heads} must be a multiple of "
                f"{self.key('n_kv_heads')} {self.n_kv_heads}"
            )
        config: Any = self
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < config.embedding_size:
                setting = GIVEN_IN.get(name)
                raise ValueError(
                    f"{name} {getattr(self, name)} is not in 0..{config.embedding_size - 1}"
                    + (f"; model.{setting} sets another" if setting else "")
                )

    def check_heads(self) -> None:
        """Refuse a width of heads that cannot be rotated (ValueError)."""
        d = self.d_model
        h = self.n_heads
        if d % h or (d // h) % 2:
            raise ValueError(
                f"{self.key('d_model')} {d} / {self.key('n_heads')} {h} must be an even whole "
                "number"
            )

    @classmethod
    def key(cls, name: str) -> str:
        """What config.json calls a field."""
        return cls.keys.get(name, name)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def derived(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What the published configuration class fills in for absent (or null) keys."""
        return {
            cls.key("n_kv_heads"): raw.get(cls.key("n_heads")),
            "pad_token_id": raw.get("eos_token_id"),
        }

    @classmethod
    def from_dict(cls: type[Config], raw: dict[str, Any]) -> Config:
        """Read config.json; ValueError on missing keys, wrong types, and settings not computed
        here.
        """
        refuse_unsupported(cls.name, raw, cls.supported)
        filled = cls.derived(raw) | {key: value for key, value in raw.items() if value is not None}
        values = {}
        for item in fields(cls):
            key = cls.key(item.name)
            if item.name == "raw":
                continue
            if filled.get(key) is not None:
                values[item.name] = filled[key]
            elif item.default is MISSING:
                raise ValueError(f"{cls.name} config lacks {key}; add it to config.json")
            if item.name in values and type(values[item.name]) not in _TYPES[str(item.type)]:
                raise ValueError(
                    f"{cls.name} config has {key}={values[item.name]!r}; expected {item.type}"
                )
            if str(item.type) == "float" and item.name in values:
                values[item.name] = float(values[item.name])
        return cls(**values, raw=dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """The config.json: the keys that were read, verbatim, except values that were replaced
        since.
        """
        if self.raw and type(self).from_dict(self.raw) == self:
            return dict(self.raw)
        fixed = self.written | {key: values[0] for key, values in self.supported.items()}
        own = {self.key(f.name): getattr(self, f.name) for f in fields(self) if f.name != "raw"}
        return fixed | self.raw | own

    def tiny(self: Config) -> Config:
        """The same settings and vocabulary at sizes for a dry run; the share of key/value heads is
        kept.
        """
        # the nearest divisor of 4 to the same share, at least 1
        kv_heads = min((1, 2, 4), key=lambda n: abs(n * self.n_heads - 4 * self.n_kv_heads))
        raw = {key: value for key, value in self.raw.items() if key != "head_dim"}
        return replace(
            self,
            d_model=64,
            n_layers=2,
            n_heads=4,
            n_kv_heads=kv_heads,
            mlp_hidden_size=160,
            raw=raw,
        )

    def with_vocabulary(
        self: Config, vocab_size: int, mask_id: int, eos_id: int, pad_id: int
    ) -> Config:
        """The same architecture for another tokenizer."""
        widths = {f.name for f in fields(self)} & {"vocab_size", "embedding_size"}
        return replace(
            self,
            mask_token_id=mask_id,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            **dict.fromkeys(widths, vocab_size),
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Undrawn(nn.Linear):
    """A linear layer whose weights are not drawn as it is made: for thousands that takes seconds,
    and a model's weights are drawn or read later.
    """

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Undrawn(d_model, width, bias=False)
        self.up_proj = Undrawn(d_model, width, bias=False)
        self.down_proj = Undrawn(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(next(inner)) * next(inner))


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
        return rotary_at(torch.arange(length, device=device), head_dim, theta, dtype)


def rotary_at(
    positions: Int[Tensor, "*B T"], size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * theta^(-2i / size): (*B, T, 1, size) each, halves
    repeated.

    ``dtype``: float32 at least; in bfloat16 neighbouring positions would share an angle.
    """
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=dtype) / size
    angle = positions[..., None, None].to(dtype) / theta**exponent
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Float[Tensor, "B L H C"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B L H C"]:
    """Rotate each pair (x_i, x_{i + C/2}) by its position's angle; the tables broadcast against x.

    Products are taken in the tables' float32 at least, and no copy of x is made in it.
    """
    cos, sin = rotary
    if torch.compiler.is_compiling():  # one kernel, which rounds once
        first, second = x.chunk(2, -1)
        cos_1, cos_2 = cos.chunk(2, -1)
        sin_1, sin_2 = sin.chunk(2, -1)
        halves = first * cos_1 + second * sin_1, second * cos_2 + first * sin_2
        return torch.cat([half.to(x.dtype) for half in halves], -1)
    turned: Any = _Rotation.apply(x, cos, sin)
    return turned


class _Rotation(torch.autograd.Function):
    """Three kernels that read x as it is and write in its dtype; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, -1)
        return _turn(x, cos, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, -1)
        return _turn(grads[0], cos, high, low), None, None


def _turn(x: Tensor, cos: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x cos + (second half of x low, first half of x high)."""
    out = torch.mul(x, cos, out=torch.empty_like(x))
    first, second = x.chunk(2, -1)
    into_first, into_second = out.chunk(2, -1)
    into_first.addcmul_(second, low)
    into_second.addcmul_(first, high)
    return out


def in_chunks(
    body: Callable[..., Tensor],
    chunk: int | None,
    ids: Int[Tensor, "B L"],
    *others: Tensor | None,
) -> Float[Tensor, "B L D"]:
    """``body(ids, *others)``, on a CPU in rows of ``chunk`` tokens (None: all at once)."""
    batch, length = ids.shape
    rows = batch if chunk is None else max(1, chunk // max(1, length))
    if batch <= rows or ids.device.type != "cpu":
        return body(ids, *others)
    chunks = ids.split(rows)
    parts = [[None] * len(chunks) if t is None else t.split(rows) for t in others]
    return torch.cat([body(*part) for part in zip(chunks, *parts, strict=True)])


def check_room(length: int, limit: int, limit_name: str) -> None:
    """ValueError beyond a model's positions."""
    if length > limit:
        raise ValueError(f"got {length} positions, the model has {limit_name} {limit}")


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
            run: Any = checkpoint  # typed for outputs of any kind
            x = run(block, x, rotary, mask, use_reentrant=False, preserve_rng_state=False)
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


def with_plain_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with ``rope_theta`` where it was before transformers 5 wrote it into
    ``rope_parameters``.
    """
    new = raw.get("rope_parameters")
    if (
        not isinstance(new, dict)
        or new.keys() != {"rope_type", "rope_theta"}
        or new["rope_type"] != "default"
    ):
        return raw
    return {key: value for key, value in raw.items() if key != "rope_parameters"} | {
        "rope_theta": new["rope_theta"]
    }


def refuse_unsupported(
    family: str, raw: dict[str, Any], supported: dict[str, tuple[Any, ...]]
) -> None:
    """Refuse settings that change the maths and are not computed here (ValueError)."""
    for key, values in supported.items():
        if raw.get(key) not in values:
            raise ValueError(
                f"{family} config has {key}={raw.get(key)!r}; only {values[0]!r} is supported"
            )
