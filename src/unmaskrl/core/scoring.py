"""The only place where the model is called for a likelihood.

Logits exist only at rows that are scored, in chunks of bounded size whose activations are
recomputed in the backward pass, so memory does not grow with rows x vocabulary.
``backward_in_chunks`` bounds the activations of the body as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .block_causal import BlockCausal, hidden_beside_clean
from .decoding.sample import row_chunks
from .denoiser import Denoiser
from .estimators.base import NOT_BLOCKWISE, NOT_KEPT, Estimator
from .types import LossOutputs, Rollout, Views

# Noisy halves that share a clean one, at most. Attention over k of them costs (k n + L)^2 in place
# of k (n + L)^2, so that more would save little and, with many short blocks, lose.
MOST_COPIES = 4
# A chunk of canvases of unlike lengths is cut in two where that leaves out this share of its tokens
# and either part has so many: fewer leave a card idle, and cost on a CPU what they save.
CUT_SHARE = 1 / 16
CUT_TOKENS = 4096


def view_logps(denoiser: Denoiser, rollout: Rollout, views: Views) -> Float[Tensor, "B M L"]:
    """log p(ids[b, l] | view m of row b) in nats at rollout.temperature where weight != 0, else 0
    (differentiable).

    Of a truncated rollout (top_k, top_p), p is over the ids that each token was drawn from, where
    the rollout recorded them. One backward pass per result: the memory of the logits becomes their
    gradient. A second one (``retain_graph``, Jacobians by rows, gradcheck) raises RuntimeError
    ("modified by an inplace operation"): score again for it.
    """
    work = _Work.of(rollout, views)
    return work.score(denoiser, slice(None)).reshape(views.ids.shape)


def token_logps(
    denoiser: Denoiser, rollout: Rollout, estimator: Estimator, views: Views
) -> Float[Tensor, "B L"]:
    """The estimator's log-likelihood per action token (nats), reduced over its views; one backward
    pass (``view_logps``).

    Of a truncated rollout, estimators that score what was drawn (``probability_of``) score it over
    the recorded ids that it was drawn from (ValueError without them); others over every token.
    """
    work = _Work.of(rollout, views, estimator)
    logps = work.score(denoiser, slice(None)).reshape(views.ids.shape)
    return estimator.reduce(logps, views)


@torch.no_grad()
def frozen_token_logps(
    denoiser: Denoiser, rollout: Rollout, estimator: Estimator, views: Views, *, max_canvases: int
) -> Float[Tensor, "B L"]:
    """``token_logps`` without gradient, ``max_canvases`` canvases at a time: for the old and the
    reference policy.
    """
    return estimator.reduce(
        _chunked_view_logps(denoiser, _Work.of(rollout, views, estimator), views, max_canvases),
        views,
    )


def live_token_logps(
    denoiser: Denoiser, rollout: Rollout, estimator: Estimator, views: Views, *, max_canvases: int
) -> Float[Tensor, "B L"]:
    """Values of ``token_logps`` as a pass with gradient computes them, ``max_canvases`` canvases'
    activations at a time.
    """
    work = _Work.of(rollout, views, estimator)
    return estimator.reduce(
        _chunked_view_logps(denoiser, work, views, max_canvases, graph=True), views
    )


@torch.no_grad()
def frozen_token_logps_over(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    views: Sequence[Views],
    *,
    max_canvases: int,
) -> tuple[Float[Tensor, "N B L"], int]:
    """``frozen_token_logps`` on N sets of views of the same rollouts, and the canvases run: those
    they share are run once.
    """
    together = Views(
        ids=torch.cat([v.ids for v in views], 1), weight=torch.cat([v.weight for v in views], 1)
    )
    work = _Work.of(rollout, together, estimator)
    parts = _chunked_view_logps(denoiser, work, together, max_canvases).split(
        [v.ids.shape[1] for v in views], 1
    )
    logps = [estimator.reduce(part, v) for part, v in zip(parts, views, strict=True)]
    return torch.stack(logps), work.num_canvases


def backward_in_chunks(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    views: Views,
    loss_fn: Callable[[Tensor], LossOutputs],
    *,
    max_canvases: int,
    frozen: Callable[[], AbstractContextManager[Denoiser]] | None = None,
) -> LossOutputs:
    """loss_fn(token_logps) and its backward pass, with at most ``max_canvases`` canvases'
    activations alive.

    Exact for any loss and any ``reduce``: view log-probs are computed without gradient, d loss / d
    view_logps is taken, and each chunk is run again with that gradient. Costs one extra forward,
    which is skipped when all canvases fit. ``frozen()`` gives the denoiser for the passes without
    gradient, and asks for them even if all canvases fit.
    """
    work = _Work.of(rollout, views, estimator)
    if work.num_canvases == 0:  # other ranks may have some
        with nullcontext() if frozen is None else frozen():
            return loss_fn(torch.zeros_like(rollout.behavior_logps))
    if frozen is None and work.num_canvases <= max_canvases:
        out = loss_fn(
            estimator.reduce(work.score(denoiser, slice(None)).reshape(views.ids.shape), views)
        )
        if out.loss.requires_grad:
            out.loss.backward()
        return LossOutputs(loss=out.loss.detach(), metrics=out.metrics)
    with nullcontext(denoiser) if frozen is None else frozen() as policy:
        leaf = _chunked_view_logps(policy, work, views, max_canvases).requires_grad_()
    out = loss_fn(estimator.reduce(leaf, views))
    if out.loss.requires_grad:
        (grad,) = torch.autograd.grad(out.loss, leaf)
        for chunk in work.chunks(max_canvases):
            work.score(denoiser, chunk).backward(grad.flatten(0, 1))
    return LossOutputs(loss=out.loss.detach(), metrics=out.metrics)


def num_passes(rollout: Rollout, views: Views, max_canvases: int) -> int:
    """Passes with gradient that ``backward_in_chunks`` makes."""
    return -(-count_canvases(rollout, views) // max_canvases)


def count_canvases(rollout: Rollout, views: Views) -> int:
    """Canvases that the model is run on for these views: views that score nothing, and copies of
    others, cost nothing.
    """
    return _Work.of(rollout, views).num_canvases


def replay_views(rollout: Rollout, mask_id: int) -> Views:
    """The rollout's own latents: view t is the canvas before call t, scored at the tokens that call
    t revealed; for block-causal denoisers, every block before the t-th call that ran it.

    Their summed log-probs equal ``behavior_logps`` if scoring is sampling; max |difference| is a
    health metric.
    """
    step = rollout.local_step
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    ids = []
    weight = []
    for call in range(1, max(1, int((step * drawn).max())) + 1):  # one empty view without draws
        ids.append(torch.where(step < call, rollout.ids, mask_id))
        weight.append(((step == call) & drawn).float())
    return Views(ids=torch.stack(ids, 1), weight=torch.stack(weight, 1))


def behavior_gap(denoiser: Denoiser, rollout: Rollout, *, max_canvases: int = 4096) -> float:
    """max |log p replayed on the rollout's own latents - behavior_logps| over its drawn tokens, in
    nats.
    """
    if rollout.is_truncated and rollout.kept is None:
        raise ValueError(f"the gap: {NOT_KEPT}")
    views = replay_views(rollout, denoiser.mask_id)
    replayed = _chunked_view_logps(denoiser, _Work.of(rollout, views), views, max_canvases).sum(1)
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    return float(((replayed - rollout.behavior_logps).abs() * drawn).max())


def _chunked_view_logps(
    denoiser: Denoiser, work: _Work, views: Views, max_canvases: int, *, graph: bool = False
) -> Float[Tensor, "B M L"]:
    """View log-probs without gradient; ``graph`` builds each chunk's graph all the same, and drops
    it.
    """
    result = torch.zeros(work.used.shape, device=work.used.device)
    for chunk in work.chunks(max_canvases):
        with torch.set_grad_enabled(graph):
            result = result + work.score(denoiser, chunk).detach()
    return result.reshape(views.ids.shape)


@dataclass(frozen=True, slots=True)
class _Work:
    """The distinct canvases among (row, view) pairs, and which tokens are scored from each.

    Views that score nothing are left out; equal ones (the fully masked canvas of a group, say) are
    run once.
    """

    rollout: Rollout
    used: Bool[Tensor, "BM L"]
    ids: Int[Tensor, "C L"]
    clean: Int[Tensor, "C L"]  # the finished canvases, where the denoiser is block-causal
    attention: Bool[Tensor, "C L"]
    pair: Int[Tensor, " N"]  # the N (row, view) pairs that score anything, sorted by their canvas
    canvas: Int[Tensor, " N"]
    kept: Int[Tensor, "B G K"] | None  # what tokens are scored among; None: every token
    spans: list[tuple[int, int]]  # columns that a canvas needs; the shortest come first

    @classmethod
    def of(cls, rollout: Rollout, views: Views, estimator: Estimator | None = None) -> _Work:
        """Sort out the canvases of ``views``; ValueError where they mean nothing."""
        if rollout.block_length is not None and estimator and not estimator.blockwise:
            raise ValueError(f"the estimator: {NOT_BLOCKWISE}")
        of_draws = estimator is None or estimator.probability_of is not None
        if estimator and of_draws and rollout.is_truncated and rollout.kept is None:
            raise ValueError(f"the estimator: {NOT_KEPT}")
        used = (views.weight != 0).flatten(0, 1)
        num_views = views.ids.shape[1]
        pairs = used.any(-1).nonzero().squeeze(-1)
        noisy = views.ids.flatten(0, 1)[pairs]
        attention = rollout.attention_mask[pairs // num_views]
        clean = noisy if rollout.block_length is None else rollout.ids[pairs // num_views]
        # canvases that share their clean half follow each other
        both = torch.cat([clean, attention.long(), noisy], 1)
        distinct, canvas = both.unique(dim=0, return_inverse=True) if len(both) else (both, pairs)
        clean, attention, ids = distinct.split(views.ids.shape[2], 1)
        spans = _spans(rollout, attention)
        by_length = (spans[:, 1] - spans[:, 0]).argsort(stable=True)
        canvas = by_length.argsort()[canvas]
        order = canvas.argsort(stable=True)
        clean, attention, ids = distinct[by_length].split(views.ids.shape[2], 1)
        return cls(
            rollout,
            used,
            ids,
            clean,
            attention.bool(),
            pairs[order],
            canvas[order],
            rollout.kept if of_draws else None,
            [(start, stop) for start, stop in spans[by_length].tolist()],
        )

    @property
    def num_canvases(self) -> int:
        """How many rows a denoiser call over all of it has."""
        return len(self.ids)

    def chunks(self, size: int) -> list[slice]:
        """Ranges of at most ``size`` canvases."""
        return [slice(start, start + size) for start in range(0, self.num_canvases, size)]

    def score(self, denoiser: Denoiser, chunk: slice) -> Float[Tensor, "BM L"]:
        """Log-probs of the tokens that these canvases score, zero elsewhere."""
        num_views = len(self.used) // max(1, len(self.rollout.ids))
        parts = [self._rows(denoiser, part) for part in self._parts(denoiser, chunk)]
        hidden, pair, position = (
            one[0] if len(one) == 1 else torch.cat(one) for one in zip(*parts, strict=True)
        )
        row = pair // num_views
        offset = position - (self.used.shape[1] - self.rollout.gen_length)
        logps = target_logps(
            denoiser,
            hidden,
            self.rollout.ids[row, position],
            self.rollout.temperature,
            None if self.kept is None else self.kept[row, offset],
        )
        result = torch.zeros(self.used.shape, dtype=logps.dtype, device=logps.device)
        return result.index_put((pair, position), logps)

    def _parts(self, denoiser: Denoiser, chunk: slice) -> list[slice]:
        """A chunk in parts of like lengths, so that pads cost little. Ranks that make their passes
        together must not cut (``one_pass``).
        """
        start, stop, _ = chunk.indices(self.num_canvases)
        if getattr(denoiser, "one_pass", False):
            return [slice(start, stop)]
        ends = cuts(self.spans[start:stop])
        return [slice(start + a, start + b) for a, b in pairwise([0, *ends])]

    def _rows(
        self, denoiser: Denoiser, part: slice
    ) -> tuple[Float[Tensor, "R D"], Int[Tensor, " R"], Int[Tensor, " R"]]:
        """Hidden states at the R tokens that these canvases score, each with its (row, view) pair
        and position.
        """
        inside = (self.canvas >= part.start) & (self.canvas < part.stop)
        pair = self.pair[inside]
        canvas = self.canvas[inside] - part.start
        hidden, column = self._hidden(denoiser, part)
        n, position = self.used[pair].nonzero(as_tuple=True)
        return hidden[canvas[n], position - column], pair[n], position

    def _hidden(self, denoiser: Denoiser, part: slice) -> tuple[Float[Tensor, "C T D"], int]:
        """Hidden states of these canvases, and the column of the first one."""
        spans = self.spans[part]
        start = min((first for first, _ in spans), default=0)
        stop = max((last for _, last in spans), default=self.ids.shape[1])
        ids = self.ids[part, start:stop]
        attention = self.attention[part, start:stop]
        if self.rollout.block_length is None:
            whole = None if bool(attention.all()) else attention
            return denoiser.hidden(ids, whole), start
        assert isinstance(denoiser, BlockCausal)
        first = self.ids.shape[1] - self.rollout.gen_length
        line, slot = self._share(part, self.ids.shape[1] - first)
        begins = slot == 0
        noisy = ids.new_full(
            (int(begins.sum()), int(slot.max()) + 1, ids.shape[1]), denoiser.mask_id
        )
        noisy[line, slot] = ids
        hidden = hidden_beside_clean(
            denoiser, noisy, self.clean[part][begins], attention[begins], first
        )
        return hidden[line, slot], first

    def _share(self, chunk: slice, noisy: int) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
        """Which line of a batch each canvas is in, and which of its noisy halves it is.

        A line is a clean half and up to ``MOST_COPIES`` noisy ones of ``noisy`` tokens, as many in
        every line: the number with which the batch has the fewest tokens.
        """
        given = torch.cat([self.clean[chunk], self.attention[chunk].long()], 1)
        size = given.unique_consecutive(dim=0, return_counts=True)[1].cpu()
        copies = min(
            range(1, MOST_COPIES + 1),
            key=lambda k: int((-(-size // k)).sum()) * (self.ids.shape[1] + k * noisy),
        )
        place = torch.arange(len(given)) - (size.cumsum(0) - size).repeat_interleave(size)
        slot = place % copies
        return (slot == 0).cumsum(0) - 1, slot


def _spans(rollout: Rollout, attention: Int[Tensor, "C L"]) -> Int[Tensor, "C 2"]:
    """The first and the last column (exclusive) that each canvas needs: from its first token on.
    Those of block-causal denoisers stay whole, because they share their clean halves.
    """
    start = attention.argmax(-1) * (rollout.block_length is None)
    return torch.stack([start, torch.full_like(start, attention.shape[1])], 1)


def cuts(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where to cut canvases of rising length into parts: the end of each part, the last one too.

    A part is as wide as all of its spans together. Cut is where most tokens are left out, and again
    in the parts (``CUT_SHARE``, ``CUT_TOKENS``).
    """
    before = _tokens(spans)
    behind = _tokens(spans[::-1])[::-1]
    large = [
        (before[i - 1] + behind[i], i)
        for i in range(1, len(spans))
        if min(before[i - 1], behind[i]) >= CUT_TOKENS
    ]
    fewest, cut = min(large, default=(0, 0))
    if not cut or fewest > (1 - CUT_SHARE) * before[-1]:
        return [len(spans)]
    return cuts(spans[:cut]) + [cut + end for end in cuts(spans[cut:])]


def _tokens(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of the first 1, 2, ... canvases run together."""
    firsts = accumulate((start for start, _ in spans), min)
    lasts = accumulate((stop for _, stop in spans), max)
    both = zip(firsts, lasts, strict=True)
    return [n * (stop - start) for n, (start, stop) in enumerate(both, 1)]


def target_logps(
    denoiser: Denoiser,
    hidden_RD: Float[Tensor, "R D"],
    targets: Int[Tensor, " R"],
    temperature: float,
    kept: Int[Tensor, "R K"] | None = None,
) -> Float[Tensor, " R"]:
    """log p(target) per row in nats, fp32 at least, over every token or over ``kept`` ids (-1: no
    more); each chunk's logits are recomputed in the backward pass.
    """

    def chunk_logps(hidden: Tensor, target: Tensor, among: Tensor | None) -> Tensor:
        if among is not None:
            return _logps_among(denoiser.head(hidden), target, temperature, among.long())
        # a head may return its input, and these logits are overwritten
        logits = denoiser.head(hidden.clone())
        wide = logits if logits.dtype == torch.float64 else logits.float()
        wide = wide if temperature in (0.0, 1.0) else wide.div_(temperature)
        result = _TargetLogps.apply(wide, target, denoiser.mask_id)
        assert isinstance(result, Tensor)
        return result

    chunks = list(row_chunks(len(hidden_RD), denoiser.vocab_size))
    if len(chunks) <= 1:
        return chunk_logps(hidden_RD, targets, kept)
    parts = [
        checkpoint(
            chunk_logps,
            hidden_RD[rows],
            targets[rows],
            None if kept is None else kept[rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for rows in chunks
    ]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _logps_among(
    logits_RV: Float[Tensor, "R V"],
    targets: Int[Tensor, " R"],
    temperature: float,
    kept: Int[Tensor, "R K"],
) -> Float[Tensor, " R"]:
    """log p(target) among ``kept``, to which every target belongs."""
    logits = logits_RV.gather(-1, kept.clamp(min=0))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = (wide / temperature).masked_fill(kept < 0, float("-inf"))
    place = (kept == targets[:, None]).long().argmax(-1, keepdim=True)
    return wide.log_softmax(-1).gather(-1, place).squeeze(-1)


class _TargetLogps(torch.autograd.Function):
    """``masked_log_softmax`` at the targets, in the memory of the logits: they become exp(logits -
    max), then the gradient.

    d log p(y) / d logits = 1[v = y] - p(v), 0 at the mask token.
    """

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets: Tensor, mask_id: int) -> Tensor:
        logits_RV[:, mask_id] = float("-inf")
        picked = logits_RV.gather(-1, targets[:, None])
        top = logits_RV.amax(-1, keepdim=True)
        weights = logits_RV.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, targets)
        return (picked - top - total.log()).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weights, total, targets = ctx.saved_tensors
        (grad,) = grads
        grad_logits = weights.mul_(-grad[:, None] / total)
        grad_logits.scatter_add_(-1, targets[:, None], grad[:, None])
        return grad_logits, None, None
