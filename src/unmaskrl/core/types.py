"""Data that flows through the library: Canvas -> Rollout -> Views / TrainBatch -> LossOutputs.

Shape suffixes: B rows, G completion positions, L canvas positions (prompt + completion), M views, V
vocabulary, D hidden. (B, L) tensors carry no suffix. Masks are True where something belongs.
Prompts are padded on the left, so that every row's completion occupies the last ``gen_length``
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .precision import finest


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Canvas:
    """A batch of prompts with open completions, ready to be decoded.

    ``ids`` holds mask_id where a token is open; ``fixed_mask`` is True at anchors (given completion
    tokens); ``attention_mask`` is False only at left pads; ``row_ids`` name the rows: every random
    draw of a row is keyed by its id, so a row decodes the same in any batch.
    """

    ids: Int[Tensor, "B L"]
    prompt_mask: Bool[Tensor, "B L"]
    fixed_mask: Bool[Tensor, "B L"]
    attention_mask: Bool[Tensor, "B L"]
    row_ids: Int[Tensor, " B"]
    group_ids: Int[Tensor, " B"]
    gen_length: int

    def __repr__(self) -> str:
        rows, length = self.ids.shape
        anchors = int(self.fixed_mask.sum())
        return (
            f"Canvas({rows} rows, {length - self.gen_length} + {self.gen_length} tokens, "
            f"{anchors} anchors)"
        )

    def validate(self, mask_id: int) -> Canvas:
        """Check what the shapes cannot say; return self so that it can be chained."""
        completion = completion_columns(self.ids, self.gen_length)
        if not 0 < self.gen_length < self.ids.shape[1]:
            raise ValueError(
                f"gen_length {self.gen_length} leaves no prompt in a canvas of {self.ids.shape[1]}"
            )
        if bool((self.prompt_mask & completion).any()):
            raise ValueError("prompt_mask reaches into the last gen_length columns")
        if bool((self.fixed_mask & ~completion).any()):
            raise ValueError("anchors must lie in the completion (the last gen_length columns)")
        if bool((self.prompt_mask & (self.ids == mask_id)).any()):
            raise ValueError(
                f"a prompt contains the mask token ({mask_id}): its positions cannot be told from "
                "open ones"
            )
        if bool(((self.ids == mask_id) != (completion & ~self.fixed_mask)).any()):
            raise ValueError(
                "the open positions (mask_id) must be exactly the completion without its anchors"
            )
        if bool((self.attention_mask != (self.prompt_mask | completion)).any()):
            raise ValueError(
                "attention_mask must be True at the prompt and the completion, False at left pads"
            )
        if len(self.row_ids.unique()) != len(self.row_ids):
            raise ValueError(
                "row_ids repeat: rows with the same id draw the same tokens; give every row its own"
            )
        return self

    def rows(self, index: Tensor) -> Canvas:
        """The rows at ``index``, in that order."""
        return _take_rows(self, index)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Rollout:
    """What happened during decoding; facts, never edited.

    ``decoded_step``: 0 = given (pad, prompt, anchor); t >= 1 = revealed by the row's t-th denoiser
    call; nfe + 1 = never revealed, because the row had ended before (such positions hold eos_id).
    ``exit_step``: the call of temporal pruning that filled the rest, 0 if there was none; the last
    such call of a block-causal row, whose blocks exit by themselves. ``block_exits``: what they
    filled, None where no block may exit.
    ``gamma``: the bound of an adaptive position rule, 0 without one. ``behavior_logps``:
    log-probability (nats) of the revealed token under the distribution it was drawn from (greedy
    tokens: under temperature 1); 0 where nothing was drawn. ``top_k``, ``top_p``: what left tokens
    out of that distribution, None where nothing did (so always for greedy tokens). ``kept`` (B,
    gen_length, K): the ids that each token was drawn from, filled up with -1; None where they are
    not recorded (``decoding.law``). ``nfe``: denoiser calls of the row.
    ``completion_mask``: True up to and including the first EOS or end-of-turn token. ``exact``: the
    revealed positions did not depend on the drawn tokens, so the product of behavior probabilities
    is the rollout's probability. ``pieces``: how ids read, for display only, if the denoiser says.
    ``block_length``: that of a block-causal denoiser, None for full attention. Such a rollout ends
    with ``block_length`` - 1 more columns, which complete each row's last block and are no part of
    the completion (``block_causal.completed``); ``gen_length`` counts them.
    """

    ids: Int[Tensor, "B L"]
    prompt_mask: Bool[Tensor, "B L"]
    completion_mask: Bool[Tensor, "B L"]
    attention_mask: Bool[Tensor, "B L"]
    decoded_step: Int[Tensor, "B L"]
    behavior_logps: Float[Tensor, "B L"]
    nfe: Int[Tensor, " B"]
    exit_step: Int[Tensor, " B"]
    row_ids: Int[Tensor, " B"]
    group_ids: Int[Tensor, " B"]
    gamma: Float[Tensor, " B"]
    gen_length: int
    temperature: float
    exact: bool
    pieces: Callable[[Sequence[int]], list[str]] | None = None
    block_length: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    kept: Int[Tensor, "B G K"] | None = None
    block_exits: Bool[Tensor, "B L"] | None = None

    def __repr__(self) -> str:
        calls = float(finest(self.nfe).mean())
        anchors = int(self.anchor_mask.sum())
        tokens = self.asked.stop - self.asked.start
        return (
            f"Rollout({len(self.ids)} rows, {tokens} completion tokens, {anchors} "
            f"anchors, {calls:.1f} calls per row, temperature {self.temperature:g}, "
            f"{'truncated, ' if self.is_truncated else ''}"
            f"{'exact' if self.exact else 'not exact'})"
        )

    def _repr_html_(self) -> str:
        """The decodings in colours, for notebooks. The package's front door loads the renderer: the
        core knows no HTML.
        """
        from .. import rollout_html

        return rollout_html(self)

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were left out of the distribution that others were drawn from."""
        return self.top_k is not None or self.top_p is not None

    @property
    def asked(self) -> slice:
        """Columns of the completion that was asked for: what completes the last block of a
        block-causal row is left out.
        """
        length = self.ids.shape[1]
        return slice(length - self.gen_length, length + 1 - (self.block_length or 1))

    @property
    def fixed_mask(self) -> Bool[Tensor, "B L"]:
        """Given positions, anchors included."""
        return self.decoded_step == 0

    @property
    def anchor_mask(self) -> Bool[Tensor, "B L"]:
        """Given completion tokens (spatial pruning)."""
        completion = completion_columns(self.ids, self.gen_length)
        return self.fixed_mask & completion & self.attention_mask

    @property
    def action_mask(self) -> Bool[Tensor, "B L"]:
        """Tokens the policy chose and is trained on: the completion up to its first EOS, without
        anchors.
        """
        return self.completion_mask & (self.decoded_step > 0)

    @property
    def exited(self) -> Bool[Tensor, "B L"]:
        """Tokens filled by an exit call of temporal pruning, those behind the first EOS too."""
        if self.block_exits is not None:
            return self.block_exits
        exit_step = self.exit_step[:, None]
        return (exit_step > 0) & (self.decoded_step == exit_step)

    @property
    def exit_mask(self) -> Bool[Tensor, "B L"]:
        """Action tokens filled by an exit call."""
        return self.action_mask & self.exited

    @property
    def block_ids(self) -> Int[Tensor, "B L"]:
        """Which block each token is in, counted from the row's first real token; all 0 for full
        attention.
        """
        positions = block_positions(self.attention_mask)
        return positions // self.block_length if self.block_length else positions * 0

    @property
    def local_step(self) -> Int[Tensor, "B L"]:
        """Which of the calls that ran a token's block revealed it, from 1; 0 = given.

        For full attention it is ``decoded_step``. A block is finished before the next is begun, so
        that its calls follow each other.
        """
        if self.block_length is None:
            return self.decoded_step
        blocks = self.block_ids
        far = torch.iinfo(torch.int64).max
        decoded = self.decoded_step
        first = torch.full_like(decoded, far).scatter_reduce(
            1, blocks, torch.where(decoded > 0, decoded, far), "amin"
        )
        return torch.where(decoded > 0, decoded - first.gather(1, blocks) + 1, 0)

    def latent(self, step: Int[Tensor, " B"], mask_id: int) -> Int[Tensor, "B L"]:
        """z_s: the canvas after ``step`` calls, z_s = where(local_step <= s, ids, mask_id): every
        block after so many of its own calls, for block-causal denoisers.
        """
        return torch.where(self.local_step <= step[:, None], self.ids, mask_id)

    @property
    def num_local_steps(self) -> Int[Tensor, " B"]:
        """Calls of each row's longest block; for full attention, of the row (``nfe``)."""
        if self.block_length is None:
            return self.nfe
        drawn = self.decoded_step <= self.nfe[:, None]
        return (self.local_step * drawn).amax(-1)

    def rows(self, index: Tensor) -> Rollout:
        """The rows at ``index``, in that order."""
        return _take_rows(self, index)

    def completions(self) -> list[list[int]]:
        """Completion ids of every row, up to and including the first EOS."""
        return [
            ids[mask].tolist() for ids, mask in zip(self.ids, self.completion_mask, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """M masked copies of each finished canvas and a weight per scored token (0 = not scored).

    ``upper`` (sandwiched bounds only): the upper bound's share in a row's value, 0 = the lower
    bound alone.
    """

    ids: Int[Tensor, "B M L"]
    weight: Float[Tensor, "B M L"]
    upper: Float[Tensor, " B"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What a policy loss may look at, beside the current token log-probs.

    ``group_actions``: action tokens in the row's whole group. ``num_actions``, ``num_rows``,
    ``num_groups``: global counts of a step (over micro-batches, ranks and rows that were left out
    because their advantage is 0) that losses are normalised by; ``num_scored``: action tokens that
    are really scored, which metrics are averaged over. ``behavior_logps`` and ``progress``
    (decoded_step / nfe): the rollout's own, for importance weights.
    """

    action_mask: Bool[Tensor, "B L"]
    advantages: Float[Tensor, " B"]
    old_logps: Float[Tensor, "B L"]
    ref_logps: Float[Tensor, "B L"] | None
    group_actions: Float[Tensor, " B"]
    num_actions: float
    num_rows: float
    num_groups: float
    num_scored: float
    behavior_logps: Float[Tensor, "B L"] | None = None
    progress: Float[Tensor, "B L"] | None = None
    calls: Int[Tensor, "B L"] | None = None

    def rows(self, index: Tensor) -> TrainBatch:
        """The rows at ``index``; the global counts stay."""
        return _take_rows(self, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """A scalar loss and detached metrics; each metric is a sum that adds up over micro-batches."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def completion_columns(ids: Tensor, gen_length: int) -> Bool[Tensor, "B L"]:
    """True at the last ``gen_length`` columns."""
    columns = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - gen_length
    return columns.expand(ids.shape[0], -1)


def block_positions(attention_mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Positions counted from each row's first real token; 0 at left pads."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def first_eos_mask(ids: Tensor, gen_length: int, *end_ids: int) -> Bool[Tensor, "B L"]:
    """True at completion positions up to and including the first of ``end_ids`` (all of them if
    there is none).
    """
    completion = completion_columns(ids, gen_length)
    ends = is_any(ids, end_ids) & completion
    return completion & (ends.long().cumsum(-1) - ends.long() == 0)


def is_any(ids: Int[Tensor, "*shape"], tokens: Sequence[int]) -> Bool[Tensor, "*shape"]:
    """True where an id is one of ``tokens``."""
    return reduce(torch.logical_or, [ids == token for token in tokens])


def _take_rows(data, index: Tensor):
    tensors = {f.name: getattr(data, f.name) for f in fields(data)}
    return replace(data, **{k: v[index] for k, v in tensors.items() if isinstance(v, Tensor)})
