"""What tests of likelihood estimators share: finished completions on the toy, oracles, and random
numbers set by hand.

An estimator is never sampled for an exact claim: its uniforms (one per row, one per position) are
replaced, so that each row of one batch is one of its possible outcomes.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.conftest import finished_rollout, seeded
from unmaskrl.core.estimators import Estimator, Update
from unmaskrl.core.estimators.base import ONLY
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout, Views

PROMPT = 2


@dataclass(frozen=True)
class Case:
    """A finished completion of 4 tokens. ``steps``: 0 = anchor; ``exit_step``: tokens of that call
    form the exit set E.
    """

    ids: tuple[int, ...]
    steps: tuple[int, ...]
    exit_step: int = 0
    eos_id: int = 4
    hide_anchors: bool = False
    noise: float = 0.0

    def rollout(self, copies: int = 1, row_ids: list[int] | None = None) -> Rollout:
        return finished_rollout(
            [self.ids] * copies,
            [self.steps] * copies,
            eos_id=self.eos_id,
            exit_step=[self.exit_step] * copies,
            row_ids=row_ids,
        )

    def toy(self, weights: Tensor | None = None) -> ToyDenoiser:
        if weights is None:
            weights = torch.randn(81, generator=seeded(31), dtype=torch.float64)
        return ToyDenoiser(weights, num_tokens=3, length=4, noise=self.noise, eos_id=self.eos_id)

    @property
    def end(self) -> int:
        """Offset after the first EOS."""
        return self.ids.index(self.eos_id) + 1 if self.eos_id in self.ids else 4

    @property
    def anchors(self) -> list[int]:
        return [i for i in range(self.end) if self.steps[i] == 0]

    @property
    def exits(self) -> list[int]:
        return [i for i in range(self.end) if self.exit_step and self.steps[i] == self.exit_step]

    @property
    def rest(self) -> list[int]:
        return [i for i in range(self.end) if self.steps[i] > 0 and i not in self.exits]

    @property
    def actions(self) -> list[int]:
        return sorted(self.rest + self.exits)

    @property
    def candidates(self) -> list[int]:
        """What the draws of an any-order ELBO choose from."""
        return sorted(self.rest + (self.anchors if self.hide_anchors else []))

    @property
    def maskable(self) -> list[int]:
        """What estimators choose from that know nothing of the exit call."""
        return sorted(self.actions + (self.anchors if self.hide_anchors else []))


CASES = {
    "free": Case((0, 2, 1, 1), (1, 2, 3, 4)),
    "inconsistent": Case((0, 2, 1, 1), (1, 2, 3, 4), noise=0.7),
    "anchors": Case((0, 2, 1, 1), (0, 2, 1, 3), noise=0.7),
    "two anchors": Case((0, 2, 1, 1), (1, 0, 0, 2)),
    "hidden anchors": Case((0, 2, 1, 1), (0, 2, 0, 1), hide_anchors=True, noise=0.7),
    "eos": Case((0, 1, 2, 2), (2, 1, 3, 4), eos_id=2, noise=0.7),
    "eos, anchors around it": Case((0, 1, 2, 1), (0, 1, 2, 0), eos_id=2, noise=0.7),
    "eos, hidden anchors around it": Case(
        (0, 1, 2, 1), (0, 1, 2, 0), eos_id=2, noise=0.7, hide_anchors=True
    ),
    "exit": Case((0, 2, 1, 1), (1, 3, 2, 3), exit_step=3, noise=0.7),
    "exit at once": Case((0, 2, 1, 1), (1, 1, 1, 1), exit_step=1, noise=0.7),
    "exit, anchors": Case((0, 2, 1, 1), (0, 3, 1, 3), exit_step=3, noise=0.7),
    "exit, hidden anchors": Case(
        (0, 2, 1, 1), (0, 3, 1, 3), exit_step=3, hide_anchors=True, noise=0.7
    ),
    "exit, eos": Case((0, 1, 2, 0), (1, 2, 2, 2), exit_step=2, eos_id=2, noise=0.7),
}


class FormulaDenoiser:
    """Token 0 has the log-probability ``logp(masked)`` (B, L) at every position; the prompt is
    ignored.

    Any table of log-probabilities per masked set and position is such a formula, whether or not a
    joint stands behind it. Token 1 is the other ordinary one, 2 the mask, 3 EOS.
    """

    mask_id = 2
    eos_id = 3
    pad_id = 3
    vocab_size = 4

    def __init__(self, length: int, logp: Callable[[Tensor], Tensor]) -> None:
        self.length = length
        self.logp = logp

    @classmethod
    def table(cls, seed: int, length: int = 5) -> FormulaDenoiser:
        """An independent -log p, exponential with mean 0.9 nats, for each masked set and
        position.
        """
        uniform = torch.rand(2**length, length, generator=seeded(seed), dtype=torch.float64)
        table = 0.9 * uniform.log()
        return cls(length, lambda masked: table[(masked * 2 ** torch.arange(length)).sum(-1)])

    @classmethod
    def joint(cls, seed: int, length: int = 5, noise: float = 0.0) -> FormulaDenoiser:
        """The conditionals of a random joint of 3 tokens for one completion drawn from it."""
        generator = seeded(100 + seed)
        toy = ToyDenoiser.random(generator, num_tokens=3, length=length, noise=noise)
        ids = toy.completions[
            torch.multinomial(toy.log_joint().exp(), 1, generator=generator)
        ].squeeze(0)
        hidden = (torch.arange(2**length)[:, None] >> torch.arange(length)) % 2 == 1
        logits = toy.hidden(torch.where(hidden, toy.mask_id, ids))
        logits[..., toy.mask_id] = float("-inf")
        table = (
            logits.log_softmax(-1).gather(-1, ids.expand(2**length, length)[..., None]).squeeze(-1)
        )
        return cls(length, lambda masked: table[(masked * 2 ** torch.arange(length)).sum(-1)])

    def rollout(self, copies: int = 1) -> Rollout:
        """Completions of token 0, one token per call."""
        steps = list(range(1, self.length + 1))
        return finished_rollout([[0] * self.length] * copies, [steps] * copies, eos_id=self.eos_id)

    def at(self, *masked: int) -> Tensor:
        """log p at every position (L,) when ``masked`` offsets are hidden."""
        return self.logp(torch.tensor([[i in masked for i in range(self.length)]]))[0]

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logp = self.logp(ids[:, -self.length :] == self.mask_id)
        never = torch.full_like(logp, -1e9)
        logits = torch.stack([logp, torch.log1p(-logp.exp()), never, never], -1)
        prompt = torch.zeros(len(ids), ids.shape[1] - self.length, 4, dtype=logits.dtype)
        return torch.cat([prompt, logits], 1)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids)


def log_p(toy: ToyDenoiser, case: Case, visible: set[int], position: int) -> Tensor:
    """log p(y_position | tokens at the visible offsets)."""
    ids = [0] * PROMPT + [case.ids[c] if c in visible else toy.mask_id for c in range(4)]
    logits = toy.logits(torch.tensor([ids]))[0, PROMPT + position]
    return logits.index_fill(0, torch.tensor(toy.mask_id), float("-inf")).log_softmax(-1)[
        case.ids[position]
    ]


def hidden_log_p(toy: ToyDenoiser, case: Case, hidden: set[int], position: int) -> float:
    """log p(y_position | everything up to the first EOS but the hidden offsets)."""
    return log_p(toy, case, set(range(case.end)) - hidden, position).item()


def any_order_elbo(toy: ToyDenoiser, case: Case) -> Tensor:
    """Mean over all orders of the candidates of sum_{i in R} log p(y_i | what came before), then E
    in one pass.
    """
    always = set() if case.hide_anchors else set(case.anchors)
    total = torch.zeros((), dtype=torch.float64)
    orders = list(itertools.permutations(case.candidates))
    for order in orders:
        for i, position in enumerate(order):
            if position in case.rest:
                total = total + log_p(toy, case, always | set(order[:i]), position)
    known = set(case.anchors) | set(case.rest)
    return total / len(orders) + sum(log_p(toy, case, known, position) for position in case.exits)


def table_elbo(denoiser: FormulaDenoiser) -> float:
    """Mean over all orders of sum_i log p(y_i | what came before); every position is open."""
    everything = set(range(denoiser.length))
    orders = list(itertools.permutations(range(denoiser.length)))
    steps = [
        float(denoiser.at(*(everything - set(o[:i])))[o[i]]) for o in orders for i in range(len(o))
    ]
    return sum(steps) / len(orders)


def subsets(items: list[int]) -> list[tuple[int, ...]]:
    """All subsets, the empty one first."""
    return [s for n in range(len(items) + 1) for s in itertools.combinations(items, n)]


@dataclass(frozen=True)
class Outcomes:
    """Equally likely outcomes: ``share`` (N,) is the row uniform, ``keys`` (N, L) rank each row's
    ``orders``.
    """

    orders: list[tuple[int, ...]]
    share: Tensor
    keys: Tensor


def every_order(offsets: list[int], pieces: int, length: int = 4) -> Outcomes:
    """Every order of ``offsets`` with every piece of the row uniform, (j + 1/2) / pieces.

    Draws of one row share the order, which leaves the mean of each draw as it is.
    """
    both = [(j, order) for j in range(pieces) for order in itertools.permutations(offsets)]
    share = torch.tensor([(j + 0.5) / pieces for j, _ in both], dtype=torch.float64)
    keys = torch.full((len(both), PROMPT + length), 0.5, dtype=torch.float64)
    for row, (_, order) in enumerate(both):
        for rank, offset in enumerate(order):
            keys[row, PROMPT + offset] = (rank + 1) / (length + 2)
    return Outcomes([order for _, order in both], share, keys)


def views_by_hand(
    monkeypatch,
    name: str,
    estimator: Estimator,
    rollout: Rollout,
    mask_id: int,
    *,
    row=None,
    position=None,
    update: Update = ONLY,
) -> Views:
    """The estimator's views with its row or position uniforms replaced by a tensor, or a function
    of (rollout, seed, *key).
    """
    module = importlib.import_module(f"unmaskrl.core.estimators.{name}")
    with monkeypatch.context() as patch:
        for function, value in (("row_uniform", row), ("position_uniform", position)):
            if value is not None:
                patch.setattr(
                    module, function, value if callable(value) else lambda *_, v=value, **__: v
                )
        return estimator.make_views(rollout, mask_id, seeded(), update)
