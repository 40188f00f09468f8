"""The one denoising loop: blocks, quotas, position rules, temporal pruning, rows that leave when
they are done.

Every row runs on its own clock. Its active block is the block of its first open position; a block
with n open tokens takes k = ceil(n * steps / gen_length) calls of n // k or n // k + 1 tokens
(LLaDA's schedule when n = block_length). With ``exit_at`` (temporal pruning, STP, arXiv 2602.08905)
a row that has decided ceil(exit_at * f) of its f open tokens fills all others in one more call. A
row whose tokens up to the first EOS are all decided leaves the batch: nothing after it can change
what is before it, and later tokens are no part of the completion.

Block-causal denoisers (``block_causal``) have blocks of their own, counted from each row's first
token, and run the active block alone over cached keys and values; the law is the same. An exit is
one of a block there, f its open tokens: no block is begun before the one before it is finished. A
row is done when what was asked for is decided: the rest of its last block is decoded while it can
be seen.

Adaptive rules (eb, threshold, factor) take the place of the quota: how much of the active block a
call reveals follows from the row's ``gamma``. Otherwise the count of denoiser calls of a row
without EOS is ``planned_calls``.

A drawn token whose log-probability is not finite, and the mask token, raise ``NotFiniteError``. No
call waits for the check: each call's verdict is added to a flag on the device, and no row is
active once it is set, so that the loop ends before the next call. The flag itself is read once,
after the loop.

The host waits for the device once per call, for ``Sizes``: with these numbers every tensor of the
call has a known shape. Adaptive rules wait once more, for how many tokens they reveal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ..block_causal import BlockCausal, CachedBlocks, block_length_of, completed
from ..denoiser import Denoiser, end_ids
from ..finite import NotFiniteError, where_from
from ..precision import finest
from ..rng import draw_seed
from ..types import Canvas, Rollout, completion_columns, first_eos_mask, is_any
from .choose import draw_tokens, highest, score_positions, uniform
from .law import Law
from .plan import Plan, Sizes, places
from .schedule import check_decode, exit_counts, named
from .select import Rule

_TOKEN_STREAM = 0
_ORDER_STREAM = 1
# or (hidden of the first call (A, L, D), rows (A,)) -> (A,)
Gamma = float | Tensor | Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    canvas: Canvas,
    *,
    block_length: int,
    steps: int,
    select: str | Rule = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    exit_at: float | None = None,
    gamma: Gamma | None = None,
    stop_at_eos: bool = True,
    generator: torch.Generator | None = None,
    cached: bool = True,
) -> Rollout:
    """Decode a canvas and record which call revealed each token, its log-probability (nats), and
    the calls per row.

    ``steps``: calls for a fully open completion (quota gen_length / steps tokens per call).
    ``select``: a rule, or its name in ``select.RULES``. ``gamma``: how bold an adaptive rule is, a
    number, one per row, or a function of what the first call sees (a threshold policy: no extra
    call).
    ``temperature`` 0 is greedy; above it, ``top_k`` and ``top_p`` leave out improbable tokens
    (``law``). ``generator`` is needed if anything is random; one seed is drawn from it.
    ``stop_at_eos=False`` decodes every position, as LLaDA's published generate does.
    ``cached=False`` runs block-causal denoisers on whole canvases, with the same result. Raises
    ValueError on bad settings, NotFiniteError (a ValueError) on logits that are not finite.
    """
    canvas.validate(denoiser.mask_id)
    fixed = gamma if isinstance(gamma, float | int) else None
    grid = block_length_of(denoiser)
    rule = check_decode(
        canvas.gen_length, block_length, steps, select, temperature, exit_at, fixed, grid
    )
    if (rule.prefix is None) != (gamma is None):
        raise ValueError(
            f"select={named(select)} needs gamma"
            if rule.prefix
            else f"select={named(select)} takes no gamma: it has a quota"
        )
    law = Law.of(temperature, top_k, top_p)
    seed = None
    if temperature > 0 or rule.is_random:
        seed = _seed(generator, f"temperature {temperature} and select={named(select)}")
    state = _State.start(denoiser, canvas, law, gamma, exit_at, cached)
    if grid is not None:  # rows of which only the rest of the last block is open
        state.finish(torch.arange(len(state.done), device=state.ids.device), denoiser, False)
    for _ in range(state.canvas.gen_length + 1):  # every call reveals a token of every row in it
        plan = _plan(state, denoiser.mask_id, block_length, steps, rule.prefix is not None)
        sizes = state.sizes(plan)
        if not sizes.rows:
            break
        rows = places(state.active(), sizes.rows)[0]
        hidden, column = state.hidden(denoiser, rows, sizes, gamma)
        _reveal(denoiser, state, rows, plan.of(rows), sizes, hidden, column, rule, law, seed)
        state.finish(rows, denoiser, stop_at_eos)
    state.check(denoiser)
    return state.rollout(denoiser, law, exact=not rule.needs_draw)


def _seed(generator: torch.Generator | None, how: str) -> int:
    if generator is None:
        raise ValueError(f"decoding with {how} is random: pass generator=")
    return draw_seed(generator)


@dataclass(slots=True)
class _State:
    canvas: Canvas
    gen_length: int  # of the completion; a block-causal canvas has columns beyond it
    shift: Tensor  # tokens of each row in the block that its completion begins in
    prompt_blocks: Tensor  # blocks of each row before that one
    grid: int | None  # block length of a block-causal denoiser
    blocks: CachedBlocks | None
    padded: bool
    ids: Tensor
    decoded_step: Tensor
    behavior_logps: Tensor
    kept: Tensor | None  # ids that each token was drawn from, as far as they are recorded
    nfe: Tensor
    exit_step: Tensor
    block_exits: Tensor | None  # what exits of blocks filled; None where there can be none
    num_open: Tensor  # open tokens at the start, f
    keep: Tensor | None  # decided before the exit, of 0, 1, ... open tokens; None without one
    done: Tensor
    block: Tensor  # active block of each row, and its open tokens and calls since it became active
    block_open: Tensor
    block_calls: Tensor
    gamma: Tensor  # of each row; 0 without an adaptive rule
    broken: Tensor  # (): whether anything that was drawn is not finite
    first: bool = True

    @classmethod
    def start(
        cls,
        denoiser: Denoiser,
        canvas: Canvas,
        law: Law,
        gamma: Gamma | None,
        exit_at: float | None,
        cached: bool,
    ) -> _State:
        gen_length = canvas.gen_length
        grid = block_length_of(denoiser)
        blocks = None
        if grid is not None:
            assert isinstance(denoiser, BlockCausal)
            canvas = completed(canvas, grid, denoiser.mask_id, denoiser.pad_id)
            if cached:
                blocks = CachedBlocks.of(denoiser, grid, canvas.attention_mask)
        prompt = canvas.prompt_mask.sum(-1)
        open_mask = canvas.attention_mask & ~canvas.prompt_mask & ~canvas.fixed_mask
        num_open = open_mask.sum(-1)
        zeros = torch.zeros_like(num_open)
        kept = law.num_kept(denoiser.vocab_size)
        given = finest(zeros) + (0.0 if gamma is None or callable(gamma) else gamma)
        return cls(
            canvas=canvas,
            gen_length=gen_length,
            shift=prompt % grid if grid else zeros.clone(),
            prompt_blocks=prompt // (grid or 1),
            grid=grid,
            blocks=blocks,
            padded=not bool(canvas.attention_mask.all()),
            ids=canvas.ids.clone(),
            decoded_step=torch.zeros_like(canvas.ids),
            behavior_logps=torch.zeros(
                canvas.ids.shape, dtype=torch.float32, device=canvas.ids.device
            ),
            kept=zeros.new_full((len(zeros), canvas.gen_length, kept), -1, dtype=torch.int32)
            if kept
            else None,
            nfe=zeros.clone(),
            exit_step=zeros.clone(),
            block_exits=torch.zeros_like(open_mask)
            if grid is not None and exit_at is not None and exit_at < 1
            else None,
            num_open=num_open,
            keep=None if exit_at is None else exit_counts(canvas.gen_length, exit_at, zeros.device),
            done=num_open == 0,
            block=zeros - 1,
            block_open=zeros.clone(),
            block_calls=zeros.clone(),
            gamma=given,
            broken=given.isnan().any(),
        )

    def active(self) -> Bool[Tensor, " B"]:
        return ~self.done & ~self.broken

    def sizes(self, plan: Plan) -> Sizes:
        """The one synchronisation of a call."""
        active = self.active()
        facts = [active.long(), plan.width, torch.minimum(plan.count, plan.width)]
        if self.blocks is not None:
            facts += self.blocks.reach(self.block + self.prompt_blocks)
        of_rows = (torch.stack(facts) * active).tolist()
        behind, end = map(max, of_rows[3:] or [[0], [0]])
        rows, width, reveal = of_rows[:3]
        return Sizes(sum(rows), sum(width), max(width), sum(reveal), behind, end)

    def hidden(
        self, denoiser: Denoiser, rows: Tensor, sizes: Sizes, gamma: Gamma | None
    ) -> tuple[Float[Tensor, "A T D"], Int[Tensor, " A"]]:
        """Hidden states of the next call and the column of each row's first one; the first call
        tells ``gamma``.
        """
        ids = self.ids[rows]
        column = torch.zeros_like(rows)
        if self.blocks is not None and not self.first:
            block = self.block[rows] + self.prompt_blocks[rows]
            hidden = self.blocks.go_on(ids, rows, block, sizes.behind, sizes.end)
            return hidden, self.blocks.column(rows, block)
        if self.blocks is not None:
            block = self.block[rows] + self.prompt_blocks[rows]
            hidden = self.blocks.start(ids, rows, block, sizes.end)
            rest = ids.shape[1] - hidden.shape[1]
            hidden = pad(hidden, (0, 0, 0, rest))
        else:
            hidden = denoiser.hidden(ids, self.canvas.attention_mask[rows] if self.padded else None)
        if callable(gamma) and self.first:
            length = ids.shape[1] - self.canvas.gen_length + self.gen_length
            self.gamma[rows] = gamma(hidden[:, :length], rows).to(self.gamma.dtype)
            self.broken |= self.gamma.isnan().any()
        self.first = False
        return hidden, column

    def check(self, denoiser: Denoiser) -> None:
        """NotFiniteError in one line if the loop ended for another reason than that all rows are
        done.
        """
        if not bool(self.broken | ~self.done.all()):
            return
        call = int(self.nfe.max())
        rows = len(self.done)
        bad = int((~self.behavior_logps.isfinite()).any(-1).sum())
        nan = int(self.gamma.isnan().sum())
        if bad:
            reason = f"logits are not finite in {bad} of {rows} rows: {where_from(denoiser)}"
        elif nan:
            reason = (
                f"gamma is NaN in {nan} of {rows} rows: the threshold head, or what it sees, "
                "is not finite"
            )
        elif self.broken:
            reason = (
                f"the mask token {denoiser.mask_id} was drawn: the denoiser's mask_id is not "
                "that of its logits"
            )
        else:
            reason = (
                f"{int((~self.done).sum())} of {rows} rows have open tokens left: a call "
                "revealed none"
            )
        raise NotFiniteError(f"decoding stopped after call {call}: {reason}")

    def completions(self) -> Int[Tensor, "B G"]:
        return self.ids[:, -self.canvas.gen_length :]

    def finish(self, rows: Tensor, denoiser: Denoiser, stop_at_eos: bool) -> None:
        """Mark rows done: nothing open that was asked for, or everything up to the first end token
        decided (the rest then becomes EOS).
        """
        ids = self.completions()[rows]
        open_mask = ids == denoiser.mask_id
        done = ~open_mask[:, : self.gen_length].any(-1)
        if stop_at_eos:
            before_open = open_mask.long().cumsum(-1) == 0
            ends = is_any(ids, end_ids(denoiser))
            done = done | (ends & before_open).any(-1)
        if stop_at_eos or self.grid is not None:
            self._fill(rows, open_mask & done[:, None], denoiser.eos_id)
        self.done[rows] = done

    def _fill(self, rows: Tensor, tail: Bool[Tensor, "A G"], eos_id: int) -> None:
        tail = pad(tail, (self.ids.shape[1] - self.canvas.gen_length, 0))
        self.ids[rows] = torch.where(tail, eos_id, self.ids[rows])
        step = self.nfe[rows, None] + 1
        self.decoded_step[rows] = torch.where(tail, step, self.decoded_step[rows])

    def rollout(self, denoiser: Denoiser, law: Law, exact: bool) -> Rollout:
        return Rollout(
            ids=self.ids,
            prompt_mask=self.canvas.prompt_mask,
            completion_mask=first_eos_mask(self.ids, self.canvas.gen_length, *end_ids(denoiser))
            & ~completion_columns(self.ids, self.canvas.gen_length - self.gen_length),
            attention_mask=self.canvas.attention_mask,
            decoded_step=self.decoded_step,
            behavior_logps=self.behavior_logps,
            nfe=self.nfe,
            exit_step=self.exit_step,
            block_exits=self.block_exits,
            row_ids=self.canvas.row_ids,
            group_ids=self.canvas.group_ids,
            gamma=self.gamma,
            gen_length=self.canvas.gen_length,
            temperature=law.temperature,
            top_k=law.top_k,
            top_p=law.top_p,
            kept=self.kept,
            exact=exact,
            pieces=getattr(denoiser, "pieces", None),
            block_length=self.grid,
        )


def _plan(state: _State, mask_id: int, block_length: int, steps: int, adaptive: bool) -> Plan:
    """Active block, quota (or all of the window, for adaptive rules) and exit of each row; of rows
    that are done it means nothing.
    """
    open_mask = state.completions() == mask_id
    offsets = state.shift[:, None] + torch.arange(state.canvas.gen_length, device=state.ids.device)
    # argmax: the first open position
    block = (state.shift + open_mask.long().argmax(-1)) // block_length
    window = open_mask & (offsets // block_length == block[:, None])
    width = window.sum(-1)
    fresh = block != state.block
    state.block = block
    state.block_open = torch.where(fresh, width, state.block_open)
    state.block_calls = torch.where(fresh, 0, state.block_calls)
    n = state.block_open
    i = state.block_calls
    # rows that are done have n = 0
    k = ((n * steps + state.gen_length - 1) // state.gen_length).clamp(min=1)
    count = width if adaptive else n // k + (i < n % k)
    state.block_calls = i + 1
    exits = torch.zeros_like(fresh)
    if state.keep is not None:
        # an exit is one of the row, or of the block where blocks see no masks in earlier ones
        scope = open_mask if state.grid is None else window
        total = state.num_open if state.grid is None else state.block_open
        left = scope.sum(-1)
        # tokens still to decide before the exit
        missing = state.keep[total] - (total - left)
        exits = missing <= 0
        window = torch.where(exits[:, None], scope, window)
        width = torch.where(exits, left, width)
        count = torch.where(exits, left, torch.minimum(count, missing))
    return Plan(window, width, count, exits)


def _reveal(
    denoiser: Denoiser,
    state: _State,
    rows: Tensor,
    plan: Plan,
    sizes: Sizes,
    hidden: Float[Tensor, "A T D"],
    column: Int[Tensor, " A"],
    rule: Rule,
    law: Law,
    seed: int | None,
) -> None:
    """Choose the positions of this call, draw their tokens, and record them.

    ``column``: where each row's first hidden state belongs.
    """
    start = state.ids.shape[1] - state.canvas.gen_length
    r, c = places(plan.window, sizes.open)
    row_ids = state.canvas.row_ids[rows]
    call = state.nfe[rows] + 1
    order = uniform(seed, _ORDER_STREAM, row_ids[r], c)  # one order per row: no call in the key
    noise = uniform(seed, _TOKEN_STREAM, row_ids[r], call[r], c)
    hidden_RD = hidden[r, start + c - column[r]]
    scores, statistic, every = score_positions(denoiser, hidden_RD, rule, law, noise, order, c)
    chosen = highest(scores, r, c, plan, sizes, statistic, rule, state.gamma[rows])
    draws = (
        draw_tokens(denoiser, hidden_RD[chosen], law, noise[chosen])
        if every is None
        else every.at(chosen)
    )
    r_plan = r[chosen]
    r = rows[r_plan]
    c = c[chosen]
    state.nfe[rows] += 1
    state.exit_step[rows] = torch.where(plan.exits, state.nfe[rows], state.exit_step[rows])
    if state.block_exits is not None:
        state.block_exits[r, start + c] = plan.exits[r_plan]
    if state.kept is not None and draws.kept is not None:
        state.kept[r, c] = draws.kept
    state.ids[r, start + c] = draws.tokens
    state.decoded_step[r, start + c] = state.nfe[r]
    # fp64 stays fp64; otherwise it is fp32 already
    state.behavior_logps = state.behavior_logps.to(draws.logps.dtype)
    state.behavior_logps[r, start + c] = draws.logps
    state.broken |= ~(draws.logps.isfinite() & (draws.tokens != denoiser.mask_id)).all()
