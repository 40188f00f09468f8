"""How much memory a run needs, counted from a recipe and config.json alone: no model is built.

    peak = what stays + max(update, rollout, optimiser step)

What stays: weights, adapters, gradients, optimiser state, weight average, reference. The other
three follow one another. Every figure is of one process. Caches, fragmentation and the CUDA context
are left to ``HEADROOM``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

from ..core.decoding.sample import CHUNK_ELEMENTS, card_elements
from ..utils.torch_setup import DTYPES
from .cost import described_model, step_cost
from .optimizers import state_share
from .registry import Method, build_method
from .schema import AUTO, ModelConfig, Recipe
from .shape import READS, ModelShape, adapted_layers

GIB = 2**30
CARDS = {"80 GB": 80.0, "24 GB": 24.0}  # GiB: vendors' GB of memory are binary
HEADROOM = 0.9  # share of a card that a plan may fill
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and one fp32 scale per 64 of them
CPU_TOKENS = 2048  # models/families runs a batch in parts of about so many tokens on CPU
AUTO_ON_CPU = 4096  # train.max_canvases=auto, unless the plan says that so many do not fit
ASSUMED_PROMPT = 256  # tokens, where no tokenizer is at hand to count them


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a recipe says about memory, for one of ``processes``; ``rank`` 0 trains all weights."""

    dtype: int  # bytes
    rollout_dtype: int
    rank: int
    roles: tuple[str, ...]  # layers with adapters
    adapter_dtype: int
    nf4: bool
    checkpointing: bool
    reference: bool  # a frozen copy, which adapters do not need
    ema: bool
    optimizer: str
    state_share: float  # bytes of the optimiser's state per byte of trained weights
    shard: str  # none, fsdp, zero2
    gather_rollout: bool
    processes: int
    max_canvases: int
    canvases: int  # of an update, before max_canvases
    scored: int  # rows of hidden states that a canvas is scored at, at most
    length: int  # tokens of a canvas
    gen_length: int
    window: int  # open positions of a row that a call looks at, at most
    train_rows: int
    eval_rows: int
    cuda: bool
    doubled: bool = False  # canvases are scored as [noisy ; clean]
    merged: bool = False  # rollouts on a copy of the adapted weights
    auto: bool = False  # max_canvases is chosen: see ``on_device``
    chunk: int = CHUNK_ELEMENTS  # elements of a chunk of logits while decoding

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        shape: ModelShape,
        *,
        processes: int = 1,
        prompt_tokens: int = ASSUMED_PROMPT,
        cuda: bool = True,
        method: Method | None = None,
    ) -> Setup:
        """Upper bounds: every group trains, no EOS, every token of a completion is scored."""
        m = recipe.model
        t = recipe.train
        e = recipe.eval
        gen = recipe.decode.gen_length
        method = method or build_method(recipe)
        trained = m.dtype if m.lora is None or m.dtype == "float64" else "float32"
        shares = recipe.prior.name == "none" and shape.block_length is None
        shared = bool(method.estimator.num_shared) and shares
        rows = ceil(t.prompts_per_step / processes) * t.group_size
        wants_base = method.loss.uses_ref or "most_predictable" in recipe.prior.select
        return cls(
            dtype=BYTES[m.dtype],
            rollout_dtype=BYTES[m.rollout_dtype or m.dtype],
            rank=m.lora.rank if m.lora else 0,
            roles=adapted_layers(m.lora.targets, shape) if m.lora else (),
            adapter_dtype=max(BYTES[m.dtype], BYTES["float32"]),
            nf4=m.quantize == "nf4",
            checkpointing=m.activation_checkpointing,
            reference=wants_base and m.lora is None,
            ema=t.ema > 0,
            optimizer=recipe.optimizer.name,
            state_share=state_share(recipe.optimizer, DTYPES[trained]),
            shard=t.shard,
            gather_rollout=t.gather_rollout,
            processes=processes,
            max_canvases=AUTO_ON_CPU if t.max_canvases == AUTO else t.max_canvases,
            auto=t.max_canvases == AUTO,
            merged=m.lora is not None and m.lora.merge_rollout,
            canvases=max(1, ceil(step_cost(recipe, method).new / t.num_iterations / processes)),
            scored=gen * (t.group_size if shared else 1),
            length=prompt_tokens + gen,
            doubled=shape.block_length is not None,
            gen_length=gen,
            window=recipe.decode.block_length
            if recipe.decode.exit_at is None or shape.block_length is not None
            else gen,
            train_rows=rows,
            eval_rows=min(e.batch_size, max(e.size, e.size_during)),
            cuda=cuda,
        )

    @property
    def scored_length(self) -> int:
        """Tokens of a canvas's pass when it is scored."""
        return self.length * (2 if self.doubled else 1)

    @property
    def alive(self) -> int:
        """Canvases of the largest backward chunk."""
        return min(self.max_canvases, self.canvases)

    @property
    def rows(self) -> int:
        """Rows that are decoded at once."""
        return max(self.train_rows, self.eval_rows)

    def together(self, tokens: int) -> int:
        """How many of a batch's tokens pass through the body at once."""
        return tokens if self.cuda else min(tokens, max(CPU_TOKENS, self.scored_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes of one process. ``stays`` is there all the time; of ``update``, ``rollout`` and
    ``step`` one at a time.
    """

    setup: Setup
    stays: dict[str, float]
    activations: float
    logits: float
    update: float
    rollout: float
    step: float

    @property
    def total(self) -> float:
        """The peak, in bytes."""
        return sum(self.stays.values()) + max(self.update, self.rollout, self.step)


def memory_plan(shape: ModelShape, s: Setup) -> Plan:
    """The plan of one process: what stays, then each phase at its peak."""
    sharded = s.shard != "none"
    # of the blocks; embedding, last norm and head stay whole
    part = 1 / s.processes if sharded else 1.0
    outer = shape.vocab * shape.d_model * (1 if shape.tied else 2) + shape.d_model
    body = (shape.parameters - outer) * s.dtype
    body -= shape.in_linears * (s.dtype - NF4_BYTES) * s.nf4
    weights = outer * s.dtype + body
    adapters = shape.adapter_parameters(s.rank, s.roles) * part
    trained, size = (
        (adapters, s.adapter_dtype)
        if s.rank
        else (outer + (shape.parameters - outer) * part, s.dtype)
    )
    head = shape.vocab * shape.d_model * s.dtype
    largest = shape.largest * s.dtype
    stays = {
        "weights": outer * s.dtype + body * part,
        "adapters": adapters * s.adapter_dtype,
        "gradients": trained * size,
        f"optimiser state ({s.optimizer})": s.state_share * trained * size,
        "weight average (EMA)": trained * max(size, 4) * s.ema,
        "reference copy": weights * s.reference,
        "whole copy for rollouts": (weights + adapters / part * s.adapter_dtype)
        * (sharded and s.gather_rollout),
        # fsdp gathers a block ahead of its use; zero2 keeps all of them for the backward pass
        "gathered blocks": {"none": 0.0, "fsdp": 2 * body / shape.n_layers, "zero2": body}[s.shard],
        "largest layer out of 4 bits": largest * s.nf4,
    }
    tokens = s.alive * s.scored_length
    kept = saved_bytes(shape, s)
    recomputed = recomputed_bytes(shape, s)
    logits = chunk_elements(shape.vocab, s.alive * s.scored) * train_logits_bytes(s.dtype)
    full = not s.rank
    chunks = ceil(s.alive * s.scored * shape.vocab / CHUNK_ELEMENTS)
    # gradients of the head's weights: of one chunk, and of those before
    at_head = logits + head * full * min(2, chunks)
    cast = shape.parameters * max(s.dtype, s.rollout_dtype) * (s.dtype != s.rollout_dtype)
    return Plan(
        setup=s,
        stays={name: value for name, value in stays.items() if value},
        activations=kept + recomputed,
        logits=logits,
        update=kept + max(at_head, recomputed + backward_bytes(shape, s, tokens) + largest * full),
        rollout=cast + merged_bytes(shape, s) + rollout_bytes(shape, s),
        step=trained
        * size
        * s.cuda,  # a foreach optimiser's temporary; on CPU it goes tensor by tensor
    )


def saved_per_token(shape: ModelShape, s: Setup) -> tuple[float, float]:
    """Bytes that a block, and that a norm, keeps per token for the backward pass.

    Block: two norms; q, k, v, the attention's output and its log-sum-exp; what trained linear
    layers read; silu's input and both factors of the product. Block-causal: q and k before their
    norms, and k and v once per query head. Experts: each one's input and output. An adapter keeps
    its ``rank`` numbers.
    """
    b = s.dtype
    d = shape.d_model
    wide = max(s.dtype, 4)
    full = not s.rank
    fused = s.cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward")

    # not fused: x and, if the norm's own weight is trained, x / rms, both in fp32 at least
    def normed(width: int) -> float:
        return width * b + 4 if fused else width * wide * (1 + full) + wide

    norm = normed(d)
    q = shape.heads
    attention = (2 * q + 2 * shape.kv) * b + shape.n_heads * wide
    if shape.block_length is not None:
        attention = 4 * q * b + shape.n_heads * wide + normed(q) + normed(shape.kv)
    experts = 2 * shape.experts * d * b
    read = {READS[role] for role in (READS if full else s.roles)}
    # the attention keeps its own output
    width = {"x1": d, "x2": d, "product": shape.mlp, "attention": 0}
    inputs = sum(width[name] for name in read) * b
    adapters = s.rank * len(s.roles) * b
    return 2 * norm + attention + inputs + 3 * shape.mlp * b + experts + adapters, norm


def cast_bytes(shape: ModelShape, s: Setup) -> float:
    """What one block's adapters keep for the backward pass beside activations: A and B in the
    dtype of the products. In float32 that is B, scaled, and A of layers that share their input.
    """
    shared = [[r for r in s.roles if r in group] for group in (("q", "k", "v"), ("gate", "up"))]
    together = [role for group in shared if len(group) > 1 for role in group]
    copied = s.roles if s.adapter_dtype != s.dtype else together
    inputs = sum(shape.linear(role)[0] for role in copied)
    return s.dtype * s.rank * (inputs + sum(shape.linear(role)[1] for role in s.roles))


def saved_bytes(shape: ModelShape, s: Setup) -> float:
    """Saved activations of a backward chunk of ``alive`` canvases: blocks, last norm, ids, and the
    rows that are scored.

    With activation checkpointing a block saves its input.
    """
    block, norm = saved_per_token(shape, s)
    casts = 0.0 if s.checkpointing else shape.n_layers * cast_bytes(shape, s)
    block = shape.d_model * s.dtype if s.checkpointing else block
    # hidden states; indices of rows, positions and targets
    scored = s.alive * s.scored * (shape.d_model * s.dtype + 8 * 5)
    seen = mask_bytes(shape, s, s.scored_length, s.scored_length) * s.alive
    return s.alive * s.scored_length * (shape.n_layers * block + norm + 8) + scored + seen + casts


def mask_bytes(shape: ModelShape, s: Setup, tokens: int, columns: int) -> float:
    """What one row's tokens see, as a boolean and as numbers; full attention has no such mask."""
    return 0.0 if shape.block_length is None else tokens * columns * (1 + s.dtype)


def recomputed_bytes(shape: ModelShape, s: Setup) -> float:
    """What one block saves, beside its input, when it is run again in the backward pass; 0 without
    activation checkpointing.
    """
    own = saved_per_token(shape, s)[0] - shape.d_model * s.dtype
    return s.checkpointing * (own * s.together(s.alive * s.scored_length) + cast_bytes(shape, s))


def pass_bytes(shape: ModelShape, s: Setup, tokens: int) -> float:
    """Working set of a block without gradient: the wider of its MLP (3 inner tensors) and its
    attention (queries and keys twice, as they were and turned).
    """
    b = s.dtype
    d = shape.d_model
    kv = shape.kv
    q = shape.heads
    mlp = (2 * d + 3 * shape.mlp + 2 * shape.experts * d) * b + adapter_work(shape, s)
    attention = (2 * d + 3 * q + 3 * kv) * b
    return max(mlp, attention) * s.together(tokens)


def backward_bytes(shape: ModelShape, s: Setup, tokens: int) -> float:
    """Working set of a block's backward pass beside what it saved: gradients of the residual and of
    two inner tensors.
    """
    return ((shape.d_model + 2 * shape.mlp) * s.dtype + adapter_work(shape, s)) * s.together(tokens)


def adapter_work(shape: ModelShape, s: Setup) -> int:
    """Bytes per token: an adapter's output, and the sum with the layer's."""
    return max((2 * s.dtype * shape.linear(role)[1] for role in s.roles), default=0)


def merged_bytes(shape: ModelShape, s: Setup) -> float:
    """Adapted weights once more, with the adapters added in; while it is made, the largest one and
    what is added to it in the adapters' dtype, and their sum.
    """
    sums = 3 * shape.largest * s.adapter_dtype
    return s.merged * (shape.adapted_weights(s.roles) * s.dtype + sums)


def rollout_bytes(shape: ModelShape, s: Setup) -> float:
    """Working set of decoding ``rows`` canvases together: one block, the hidden states twice, one
    chunk of logits. Block-causal: the cache, and a pass over the prompts or one block's tokens.
    """
    tokens = s.rows * s.length
    if (block := shape.block_length) is not None:
        columns = s.length + block
        tokens = s.rows * max(s.length - s.gen_length, block)
        seen = mask_bytes(shape, s, tokens, columns)
        kept = shape.cache_bytes(s.rows, columns, s.rollout_dtype)
        return kept + seen + pass_bytes(shape, s, tokens) + logits_bytes(shape, s)
    hidden = (tokens + s.rows * s.gen_length) * shape.d_model * s.dtype
    return max(pass_bytes(shape, s, tokens), logits_bytes(shape, s)) + hidden


def logits_bytes(shape: ModelShape, s: Setup) -> float:
    """One chunk of a rollout's logits: the model's; in fp32 the same, without the mask token, and
    their log-softmax.
    """
    elements = chunk_elements(shape.vocab, s.rows * s.window, s.chunk)
    return elements * (s.dtype + 3 * max(s.dtype, 4))


def chunk_elements(vocab: int, rows: int, chunk: int = CHUNK_ELEMENTS) -> int:
    """Elements of the largest block of logits when ``rows`` rows are needed
    (``core/decoding/sample.py``).
    """
    return vocab * min(rows, max(1, chunk // vocab))


def train_logits_bytes(dtype: int) -> int:
    """Bytes per logit in the backward pass: fp32 at least, overwritten in place, plus
    half-precision logits or gradients.
    """
    return max(dtype, 4) + dtype * (dtype < 4)


def largest_max_canvases(shape: ModelShape, s: Setup, limit: float) -> int:
    """The largest ``max_canvases`` whose plan is within ``limit`` bytes, up to all canvases of an
    update; 0 if none is.
    """
    low = 0
    high = s.canvases
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_plan(shape, replace(s, max_canvases=middle)).total <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def on_device(shape: ModelShape, s: Setup, gib: float) -> Setup:
    """The same on a device of ``gib`` GiB: decoding's chunk of logits is a share of a card's
    memory, and ``max_canvases`` is chosen if that is set to auto.

    Chosen are as many as fit, at most all of an update: passes without gradient are of so many as
    well. In a CPU's RAM, where those are cut into small parts, it is AUTO_ON_CPU if all fit.
    """
    if s.cuda:
        s = replace(s, chunk=card_elements(int(gib * GIB)))
    if not s.auto:
        return s
    most = largest_max_canvases(shape, s, HEADROOM * gib * GIB)
    chosen = AUTO_ON_CPU if most == s.canvases and not s.cuda else max(1, most)
    return replace(s, max_canvases=chosen)


def verdict(shape: ModelShape, s: Setup, name: str, gib: float) -> str:
    """One line: does the plan fit a device of ``gib`` GiB, and if not, the mildest settings that
    do.
    """
    limit = HEADROOM * gib * GIB
    s = on_device(shape, s, gib)
    need = memory_plan(shape, s).total
    if need <= limit:
        most = largest_max_canvases(shape, s, limit)
        bound = f"is {s.max_canvases}" if s.auto else f"may be up to {most}"
        return (
            f"{name}: fits ({size_text(need)}); train.max_canvases{f'={AUTO}' * s.auto} {bound} "
            f"(an update has {s.canvases})"
        )
    smaller = smaller_settings(shape, s, limit)
    change = (
        f"smaller: {smaller}"
        if smaller
        else "no setting here makes it fit: share the weights over more processes"
    )
    return f"{name}: does not fit ({size_text(need)}); {change}"


def smaller_settings(shape: ModelShape, s: Setup, limit: float) -> str:
    """The first of these changes, with the largest ``max_canvases``, that fits: exact ones before
    those that train less.

    ``max_canvases`` and checkpointing change time alone, sharding needs processes, adapters and 4
    bits change what is learnt.
    """
    checkpoint = ("model.activation_checkpointing=true", {"checkpointing": True})
    shard = ("train.shard=fsdp", {"shard": "fsdp"})
    alone = ("train.gather_rollout=false", {"gather_rollout": False})
    adapters = {"rank": 128, "roles": adapted_layers(None, shape), "reference": False}
    lora = ("model.lora={rank: 128}", adapters)
    nf4 = ("model.quantize=nf4", {"nf4": True})
    ladder = [[], [checkpoint]]
    if s.processes > 1 and not s.nf4:
        ladder += [[shard], [shard, checkpoint], [shard, alone, checkpoint]]
    if not s.rank:
        ladder += [[lora], [lora, checkpoint]]
    if not s.nf4 and s.cuda and s.shard == "none":  # 4-bit blocks cannot be split
        first = [] if s.rank else [lora]
        ladder += [[*first, nf4], [*first, nf4, checkpoint]]
    for changes in ladder:
        changed = s
        words = []
        for text, fields in changes:
            if any(getattr(s, key) != value for key, value in fields.items()):
                changed = replace(changed, **fields)
                words = [*words, text]
        for rows in (s.eval_rows, min(s.eval_rows, s.train_rows)):
            tried = replace(changed, eval_rows=rows)
            most = largest_max_canvases(shape, tried, limit)
            if most:
                words = [f"eval.batch_size={rows}"] * (rows < s.eval_rows) + words
                fewer = most < s.alive and not s.auto
                return " ".join([f"train.max_canvases={most}"] * fewer + words)
    return ""


def model_shape(model: ModelConfig) -> ModelShape | None:
    """The shape of a recipe's model, from its config.json; None if its family does not say what its
    linear layers are.
    """
    config, family = described_model(model)
    return ModelShape.of(config, family) if family.linears else None


def size_text(size: float) -> str:
    """GiB, or MiB below a tenth of one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
