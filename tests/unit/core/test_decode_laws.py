"""The law of decoded completions: against the exact joint, and against enumeration of every path of
the process.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from tests.conftest import QUOTA_RULES, chi_square_p, seeded
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import RULES, decode
from unmaskrl.core.decoding.sample import inverse_cdf, masked_log_softmax
from unmaskrl.core.rng import counter_uniform
from unmaskrl.core.toy import ToyDenoiser

ROWS = 4000
SMALL_P = 1e-4
EXACT = [name for name in QUOTA_RULES if not RULES[name].needs_draw]


def observed(toy: ToyDenoiser, ids: Tensor) -> Counter:
    return Counter(map(tuple, ids[:, -toy.length :].tolist()))


def p_value(counts: Counter, law: dict[tuple[int, ...], float]) -> float:
    assert set(counts) <= set(law), "a completion that is impossible under the law"
    keys = sorted(law)
    return chi_square_p(
        torch.tensor([counts[k] for k in keys]), torch.tensor([law[k] for k in keys])
    )


class PathLaw:
    """Law of the decoded completion, by following every possible path of the process on Python
    numbers.
    """

    def __init__(self, toy, *, block_length, steps, select, temperature, exit_at=None) -> None:
        self.toy = toy
        self.block_length = block_length
        self.steps = steps
        self.select = select
        self.temperature = temperature
        self.exit_at = exit_at
        self.tables = lru_cache(None)(self._tables)

    def law(self, start: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        orders = (
            list(itertools.permutations(range(len(start)))) if self.select == "random" else [()]
        )
        total: Counter = Counter()
        for order in orders:
            self._follow(
                start, start.count(self.toy.mask_id), order, (-1, ()), 1 / len(orders), total
            )
        return dict(total)

    def _follow(self, ids, free, order, clock, mass, total) -> None:
        mask = self.toy.mask_id
        eos = self.toy.eos_id
        opened = [c for c, v in enumerate(ids) if v == mask]
        if opened and eos in ids[: opened[0]]:
            ids = tuple(eos if v == mask else v for v in ids)
            opened = []
        if not opened:
            total[ids] += mass
            return
        block = opened[0] // self.block_length
        window = [c for c in opened if c // self.block_length == block]
        if block != clock[0]:
            calls = math.ceil(len(window) * self.steps / len(ids))
            clock = (
                block,
                tuple(len(window) // calls + (i < len(window) % calls) for i in range(calls)),
            )
        decided = free - len(opened)
        keep = free if self.exit_at is None else math.ceil(self.exit_at * free - 1e-9)
        if decided >= keep:
            window = opened
            count = len(opened)
        else:
            count = min(clock[1][0], keep - decided)
            clock = (clock[0], clock[1][1:])
        for chosen, tokens, p in self._moves(ids, window, count, order):
            after = list(ids)
            for c, v in zip(chosen, tokens, strict=True):
                after[c] = v
            self._follow(tuple(after), free, order, clock, mass * p, total)

    def _moves(self, ids, window, count, order):
        """(revealed positions, their tokens, probability) of one call."""
        plain, tempered = self.tables(ids)
        values = range(self.toy.num_tokens)
        if self.select != "confidence":
            chosen = sorted(window, key=lambda c: (-self._score(plain[c], c, order), c))[:count]
            for tokens in itertools.product(values, repeat=count):
                yield (
                    chosen,
                    tokens,
                    math.prod(tempered[c][v] for c, v in zip(chosen, tokens, strict=True)),
                )
            return
        for drawn in itertools.product(values, repeat=len(window)):
            token = dict(zip(window, drawn, strict=True))
            chosen = sorted(window, key=lambda c: (-plain[c][token[c]], c))[:count]
            yield (
                chosen,
                [token[c] for c in chosen],
                math.prod(tempered[c][token[c]] for c in window),
            )

    def _score(self, p, c, order) -> float:
        best = sorted(p)
        return {
            "max_prob": lambda: best[-1],
            "margin": lambda: best[-1] - best[-2],
            "entropy": lambda: sum(x * math.log(x) for x in p),
            "random": lambda: order[c],
            "left_to_right": lambda: -c,
        }[self.select]()

    def _tables(self, ids):
        logits = self.toy.logits(torch.tensor([[0, *ids]]))[0, 1:, : self.toy.num_tokens]
        return logits.softmax(-1).tolist(), (logits / self.temperature).softmax(-1).tolist()


@pytest.mark.parametrize("select", EXACT)
@pytest.mark.parametrize("block_length", [4, 2])
def test_exact_rules_sample_the_joint(select: str, block_length: int) -> None:
    toy = ToyDenoiser.random(seeded(21), num_tokens=3, length=4)
    canvas = blank_canvas([[0]] * 3000, gen_length=4, denoiser=toy)
    rollout = decode(
        toy,
        canvas,
        block_length=block_length,
        steps=4,
        select=select,
        temperature=1.0,
        generator=seeded(5),
    )
    assert rollout.exact and (rollout.nfe == 4).all()
    joint = dict(
        zip(map(tuple, toy.completions.tolist()), toy.log_joint().exp().tolist(), strict=True)
    )
    assert p_value(observed(toy, rollout.ids), joint) > SMALL_P
    # exact: the behaviour probabilities multiply to the probability of the completion
    index = (rollout.ids[:, 1:] * 3 ** torch.arange(3, -1, -1)).sum(-1)
    assert torch.allclose(rollout.behavior_logps.sum(-1), toy.log_joint()[index], atol=1e-10)


@pytest.mark.parametrize("select", EXACT)
def test_exact_rules_with_anchors_sample_the_conditional(select: str) -> None:
    toy = ToyDenoiser.random(seeded(22), num_tokens=3, length=4)
    canvas = anchored_canvas([[0]] * 2000, [{1: 2, 2: 0}] * 2000, gen_length=4, denoiser=toy)
    rollout = decode(
        toy, canvas, block_length=4, steps=4, select=select, temperature=1.0, generator=seeded(6)
    )
    mass = toy.log_joint().exp() * ((toy.completions[:, 1] == 2) & (toy.completions[:, 2] == 0))
    law = {
        tuple(c): float(m / mass.sum())
        for c, m in zip(toy.completions.tolist(), mass, strict=True)
        if m > 0
    }
    assert len(law) == 9
    assert p_value(observed(toy, rollout.ids), law) > SMALL_P


SETTINGS = [
    {"block_length": 4, "steps": 4, "temperature": 0.5},
    {"block_length": 2, "steps": 2, "temperature": 1.8},
    {"block_length": 4, "steps": 3, "temperature": 1.0},
    {"block_length": 2, "steps": 4, "temperature": 1.0, "exit_at": 0.5},
    {"block_length": 4, "steps": 4, "temperature": 0.7, "exit_at": 0.75},
]


@pytest.mark.parametrize("select", QUOTA_RULES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_setting_has_the_law_of_its_paths(select: str, setting: dict) -> None:
    """Also for tempered, several-at-once, pruned and inconsistent processes; token 1 is EOS."""
    toy = ToyDenoiser.random(seeded(23), num_tokens=2, length=4, noise=0.8, eos_id=1)
    canvas = blank_canvas([[0]] * ROWS, gen_length=4, denoiser=toy)
    rollout = decode(toy, canvas, select=select, generator=seeded(7), **setting)
    law = PathLaw(toy, select=select, **setting).law((toy.mask_id,) * 4)
    assert sum(law.values()) == pytest.approx(1.0)
    assert p_value(observed(toy, rollout.ids), law) > SMALL_P


def test_the_path_law_itself_is_the_joint_where_it_must_be() -> None:
    toy = ToyDenoiser.random(seeded(24), num_tokens=3, length=3)
    joint = dict(
        zip(map(tuple, toy.completions.tolist()), toy.log_joint().exp().tolist(), strict=True)
    )
    for select in EXACT:
        law = PathLaw(toy, block_length=3, steps=3, select=select, temperature=1.0).law(
            (toy.mask_id,) * 3
        )
        assert law == pytest.approx(joint, abs=1e-12)
    for wrong in ({"steps": 1, "temperature": 1.0}, {"steps": 3, "temperature": 0.5}):
        law = PathLaw(toy, block_length=3, select="left_to_right", **wrong).law((toy.mask_id,) * 3)
        assert p_value(Counter({k: round(ROWS * p) for k, p in joint.items()}), law) < SMALL_P


def test_confidence_is_not_the_joint() -> None:
    """Two masks, both (0.6, 0.4), one reveal: the 0.6 token appears with 0.84, and (0, 0) with 0.84
    * 0.6.
    """
    marginal = torch.tensor([0.6, 0.4], dtype=torch.float64)
    toy = ToyDenoiser((marginal[:, None] * marginal).flatten().log(), num_tokens=2, length=2)
    canvas = blank_canvas([[0]] * ROWS, gen_length=2, denoiser=toy)
    for select, first, both in (("confidence", 0.84, 0.504), ("max_prob", 0.6, 0.36)):
        rollout = decode(
            toy,
            canvas,
            block_length=2,
            steps=2,
            select=select,
            temperature=1.0,
            generator=seeded(9),
        )
        revealed = rollout.ids[rollout.decoded_step == 1]
        assert len(revealed) == ROWS
        for share, p in (((revealed == 0), first), ((rollout.ids[:, 1:] == 0).all(-1), both)):
            assert abs(float(share.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / ROWS)
        assert rollout.exact == (select != "confidence")
    # The recorded log-probabilities multiply to 0.36: as the probability of (0, 0) that is wrong,
    # hence exact=False.
    assert math.exp(
        rollout.behavior_logps[(rollout.ids[:, 1:] == 0).all(-1)][0].sum()
    ) == pytest.approx(0.36)


VOCAB = 126_464
DRAWS = 1200
HEAD = 50


def peaked_logits() -> Tensor:
    """A model-like distribution: half the mass on a few tokens, a long tail over the whole
    vocabulary.
    """
    rank = torch.arange(VOCAB, dtype=torch.float64)
    logits = torch.logaddexp(-1.1 * rank, -0.9 * (rank + 10).log() - 2.5)
    return logits.float()


def law_check(tokens: Tensor) -> tuple[float, float]:
    """p-value over the top-50 cells and the rest; |entropy estimate - entropy| in standard
    errors.
    """
    logps = peaked_logits().double().log_softmax(-1)
    probs = torch.cat([logps[:HEAD].exp(), logps[HEAD:].exp().sum()[None]])
    counts = torch.bincount(tokens.clamp(max=HEAD), minlength=HEAD + 1)
    surprise = -logps[tokens]
    entropy = -(logps.exp() * logps).sum()
    error = (surprise.mean() - entropy).abs() / (surprise.std() / len(tokens) ** 0.5)
    return chi_square_p(counts, probs), float(error)


def test_inverse_cdf_keeps_the_law_on_a_large_peaked_vocabulary() -> None:
    uniform = counter_uniform(17, torch.zeros(DRAWS, dtype=torch.int64), torch.arange(DRAWS))
    logps = masked_log_softmax(peaked_logits()[None], VOCAB - 1, 1.0)
    chunks = [inverse_cdf(logps.expand(len(u), -1), u) for u in uniform.split(25)]
    p, errors = law_check(torch.cat(chunks))
    assert p > SMALL_P
    assert errors < 4


def test_bf16_gumbel_fails_the_same_check() -> None:
    """The control: noise in bf16, as published dLLM trainers draw it, cannot reach the tail."""
    generator = seeded(18)
    logits = peaked_logits().bfloat16()
    tokens = []
    for _ in range(15):
        uniform = torch.rand(20, VOCAB, generator=generator, dtype=torch.bfloat16)
        tokens.append((logits - (-uniform.log()).log()).argmax(-1))
    p, errors = law_check(torch.cat(tokens))
    assert p < 1e-12
    assert errors > 4
