"""top_k and top_p: the law that is drawn from is the one that is recorded and scored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.block_rows import PROMPTS, decoded
from tests.block_rows import toy as block_toy
from tests.conftest import rounded, seeded
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import RULES, decode, law
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.estimators import (
    Estimator,
    elbo,
    left_to_right,
    mean_field,
    trajectory,
    two_mean_field,
)
from unmaskrl.core.scoring import behavior_gap, token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout

ROWS = 300
CUTS = [(2, None), (None, 0.6), (3, 0.8), (3, 0.35)]


def kept_by_hand(probabilities: Sequence[float], top_k: int | None, top_p: float | None):
    """{token: probability}, one token after the other from the most probable one."""
    order = sorted(range(len(probabilities)), key=lambda v: (-probabilities[v], v))
    order = [v for v in order if probabilities[v] > 0][:top_k]
    total = sum(probabilities[v] for v in order)
    chosen: list[int] = []
    for v in order:
        if top_p is not None and sum(probabilities[c] for c in chosen) / total >= top_p:
            break
        chosen.append(v)
    rest = sum(probabilities[v] for v in chosen)
    return {v: probabilities[v] / rest for v in chosen}


def run(den: Denoiser, select: str = "entropy", rows: int = ROWS, **options: Any) -> Rollout:
    canvas = blank_canvas([[0, 1]] * rows, gen_length=4, denoiser=den)
    settings: dict[str, Any] = {"block_length": 2, "steps": 4, "temperature": 0.7, **options}
    if RULES[select].prefix is not None:
        settings.setdefault("gamma", 0.4)
    return decode(den, canvas, select=select, generator=seeded(5), **settings)


def table(den: Any, ids: list[int]) -> Tensor:
    """Probabilities of the completion's tokens at temperature 0.7, the mask token left out."""
    logits = den.logits(torch.tensor([ids]))[0, 2:].clone()
    logits[:, den.mask_id] = -torch.inf
    return torch.stack([(logits / 0.7).softmax(-1), logits.softmax(-1)])


def whole_law(den: Any, top_k: int | None, top_p: float | None, per_call: int = 1):
    """The probability of every completion: blocks of 2, least entropy at temperature 1 first."""
    result: dict[tuple[int, ...], float] = {}

    def go_on(ids: list[int], probability: float) -> None:
        places = [i for i, token in enumerate(ids) if token == den.mask_id]
        if not places:
            result[tuple(ids)] = result.get(tuple(ids), 0.0) + probability
            return
        tempered, plain = table(den, [0, 1, *ids])
        block = [i for i in places if i // 2 == places[0] // 2]
        entropy = -(plain * plain.clamp(min=1e-300).log()).sum(-1)
        chosen = sorted(block, key=lambda i: (float(entropy[i]), i))[:per_call]
        laws = [kept_by_hand(tempered[i].tolist(), top_k, top_p) for i in chosen]
        for tokens in itertools.product(*laws):
            more = list(ids)
            for place, token in zip(chosen, tokens, strict=True):
                more[place] = token
            chances = [of[token] for of, token in zip(laws, tokens, strict=True)]
            go_on(more, probability * math.prod(chances))

    go_on([den.mask_id] * 4, 1.0)
    return result


def toys() -> dict[str, Any]:
    return {
        "full": ToyDenoiser.random(seeded(2), num_tokens=4, length=4, noise=0.5),
        "blocks": block_toy(2, num_tokens=4),
    }


def scored(den: Denoiser, rollout: Rollout, estimator: Estimator) -> Tensor:
    views = estimator.make_views(rollout, den.mask_id, seeded(1))
    return token_logps(den, rollout, estimator, views)


def close(ours: Tensor, theirs: Tensor) -> None:
    for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
        assert a == rounded(b, size=100.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["full", "blocks"])
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
@pytest.mark.parametrize("per_call", [1, 2])
def test_the_law_of_completions_is_the_recorded_one_and_sums_to_1(
    kind: str, top_k: int | None, top_p: float | None, per_call: int
) -> None:
    den = toys()[kind]
    rollout = run(den, steps=4 // per_call, top_k=top_k, top_p=top_p)
    exact = whole_law(den, top_k, top_p, per_call)
    assert sum(exact.values()) == rounded(1.0, size=1.0, dtype=torch.float64)
    assert len(exact) < 4**4, "something is left out"
    assert (rollout.top_k, rollout.top_p) == (top_k, top_p) and rollout.is_truncated
    recorded = rollout.behavior_logps.sum(-1).exp().tolist()
    completions = [tuple(row) for row in rollout.ids[:, 2:6].tolist()]
    for row, probability in zip(completions, recorded, strict=True):
        assert probability == rounded(exact[row], size=100.0, dtype=torch.float64)
    seen = sum(exact[row] for row in set(completions))
    assert seen > 0.9, "rows go where the law is"


@pytest.mark.parametrize("kind", ["full", "blocks"])
@pytest.mark.parametrize("select", ["confidence", "entropy", "eb", "left_to_right", "random"])
@pytest.mark.parametrize("exit_at", [None, 0.5])
def test_trajectory_is_what_was_recorded(kind: str, select: str, exit_at: float | None) -> None:
    """The ratio of the first update is 1, and every token is one of the ids it was drawn from."""
    den = toys()[kind]
    rollout = run(den, select, rows=40, top_k=3, top_p=0.8, exit_at=exit_at)
    assert rollout.kept is not None
    close(scored(den, rollout, trajectory()), rollout.behavior_logps * rollout.action_mask)
    assert behavior_gap(den, rollout) < 1e-12
    drawn = rollout.action_mask[:, -rollout.gen_length :]
    tokens = rollout.ids[:, -rollout.gen_length :, None]
    assert bool((rollout.kept == tokens).any(-1)[drawn].all())
    sizes = (rollout.kept >= 0).sum(-1)[drawn]
    assert len(sizes.unique()) > 1, "top_p cuts here and there"


def test_left_to_right_is_exact_where_rollouts_are() -> None:
    den = toys()["full"]
    rollout = run(den, "left_to_right", rows=40, top_k=3, top_p=0.8, block_length=4)
    close(scored(den, rollout, left_to_right()), rollout.behavior_logps * rollout.action_mask)
    many = two_mean_field(num_times=4)
    close(scored(den, rollout, many), rollout.behavior_logps * rollout.action_mask)


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_a_policy_that_moved_is_scored_over_the_ids_of_the_draw(kind: str) -> None:
    """Its own set is another one: no chosen token falls out, and the law over the old set sums
    to 1.
    """
    old = toys()[kind]
    rollout = run(old, "left_to_right", rows=60, top_k=2, top_p=0.9)
    new = toys()[kind]
    if kind == "full":
        new.log_weights = torch.randn(256, generator=seeded(8), dtype=torch.float64)
    else:
        new.bias = new.bias + torch.randn(new.bias.shape, generator=seeded(8)).double()
    logps = scored(new, rollout, trajectory())
    actions = rollout.action_mask
    assert bool(logps.isfinite().all()) and bool((logps[actions] <= 0).all())
    assert rollout.kept is not None
    left_out = 0
    for row, place in itertools.product(range(60), range(4)):
        ids = rollout.ids[row, 2:6].tolist()
        seen = [*ids[:place], *[new.mask_id] * (4 - place)]
        tempered = table(new, [0, 1, *seen])[0, place]
        kept = [v for v in rollout.kept[row, place].tolist() if v >= 0]
        want = float(tempered[ids[place]] / tempered[kept].sum())
        got = float(logps[row, 2 + place].exp())
        assert got == rounded(want, size=100.0, dtype=torch.float64)
        left_out += ids[place] not in kept_by_hand(tempered.tolist(), 2, 0.9)
    assert left_out > 2, "the new policy would have left some of them out"


def test_the_gradient_is_that_of_the_law_over_the_kept_ids() -> None:
    weights = torch.randn(256, generator=seeded(2), dtype=torch.float64).requires_grad_()
    den = ToyDenoiser(weights, num_tokens=4, length=4)
    rollout = run(den, "left_to_right", rows=8, top_k=3, block_length=4)
    (ours,) = torch.autograd.grad(scored(den, rollout, trajectory()).sum(), weights)
    assert rollout.kept is not None
    total = torch.zeros((), dtype=torch.float64)
    for row, place in itertools.product(range(8), range(4)):
        ids = rollout.ids[row, 2:6].tolist()
        seen = torch.tensor([[0, 1, *ids[:place], *[den.mask_id] * (4 - place)]])
        logits = den.logits(seen)[0, 2 + place] / 0.7
        kept = rollout.kept[row, place].long()
        total = total + logits[ids[place]] - logits[kept].logsumexp(-1)
    (theirs,) = torch.autograd.grad(total, weights)
    close(ours, theirs)


@pytest.mark.parametrize("estimator", [elbo(num_mc=2), mean_field()], ids=["elbo", "mean_field"])
def test_estimators_of_the_policy_itself_score_every_token(estimator: Estimator) -> None:
    den = toys()["full"]
    rollout = run(den, rows=20, top_p=0.5)
    plain = replace(rollout, top_p=None)
    assert scored(den, rollout, estimator).equal(scored(den, plain, estimator))


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": law.MAX_KEPT + 1}])
def test_what_scores_draws_is_refused_where_the_ids_are_not_recorded(cut: dict[str, Any]) -> None:
    den = toys()["full"]
    rollout = run(den, rows=2, **cut)
    assert rollout.kept is None
    for estimator in (trajectory(), left_to_right(), mean_field(p_mask_prompt=0.0)):
        with pytest.raises(ValueError, match="set top_k beside top_p"):
            scored(den, rollout, estimator)
    with pytest.raises(ValueError, match="set top_k beside top_p"):
        behavior_gap(den, rollout)


@pytest.mark.parametrize("kind", ["full", "blocks"])
@pytest.mark.parametrize("select", sorted(set(RULES) - {"random"}))
def test_one_token_kept_is_greedy(kind: str, select: str) -> None:
    den = toys()[kind]
    greedy = run(den, select, rows=3, temperature=0.0)
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 4, "top_p": 1e-9}):
        rollout = run(den, select, rows=3, temperature=1.3, **cut)
        assert rollout.ids.equal(greedy.ids)
        assert rollout.decoded_step.equal(greedy.decoded_step)
        assert not bool(rollout.behavior_logps.any()), "the only token has probability 1"


def test_greedy_decoding_and_settings_at_off_are_as_before(monkeypatch) -> None:
    den = toys()["full"]

    def none_is_asked(*_: Any) -> Tensor:
        raise AssertionError("work that nobody asked for")

    monkeypatch.setattr(law, "kept_tokens", none_is_asked)
    for select, temperature in (("confidence", 0.0), ("confidence", 1.0), ("entropy", 0.7)):
        plain = run(den, select, rows=20, temperature=temperature)
        cuts: list[dict[str, Any]] = [{"top_k": None, "top_p": None}, {"top_p": 1.0}]
        for cut in cuts + [{"top_k": 2, "top_p": 0.3}] * (temperature == 0):
            again = run(den, select, rows=20, temperature=temperature, **cut)
            for name in ("ids", "decoded_step", "behavior_logps"):
                assert getattr(again, name).equal(getattr(plain, name))
            assert again.kept is None and not again.is_truncated


def test_of_equal_tokens_the_lower_ids_stay() -> None:
    # by math, which gives equal numbers equal logarithms on every processor
    rows = ([0.1, 0.3, 0.1, 0.3, 0.2], [0.2] * 5)
    logps = torch.tensor([[math.log(p) for p in row] for row in rows], dtype=torch.float64)
    for top_k, wanted in (
        (1, [[1], [0]]),
        (2, [[1, 3], [0, 1]]),
        (4, [[0, 1, 3, 4], [0, 1, 2, 3]]),
        (9, [[0, 1, 2, 3, 4]] * 2),
    ):
        kept = law.kept_tokens(logps, top_k, None)
        assert [row.nonzero().squeeze(-1).tolist() for row in kept] == wanted
    for top_p, wanted in (
        (0.25, [[1], [0, 1]]),
        (0.5, [[1, 3], [0, 1, 2]]),
        (0.85, [[0, 1, 3, 4]]),
    ):
        kept = law.kept_tokens(logps, None, top_p)
        chosen = [row.nonzero().squeeze(-1).tolist() for row in kept]
        assert chosen[: len(wanted)] == wanted
    assert law.kept_tokens(logps, 2, 0.5).sum(-1).tolist() == [1, 1], "top_p of what top_k left"


def test_tokens_without_probability_never_stay() -> None:
    logps = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert law.kept_tokens(logps, 2, None).tolist() == [[True, False, False]]
    assert law.kept_tokens(logps, None, 0.999).tolist() == [[True, False, False]]


@pytest.mark.parametrize(("top_k", "top_p"), [(20, None), (None, 0.9), (20, 0.9), (50, 0.3)])
def test_the_kept_tokens_are_those_of_transformers(top_k: int | None, top_p: float | None) -> None:
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(16, 400, generator=seeded(1), dtype=torch.float64)
    scores = logits / 0.7
    ids = torch.zeros(16, 1, dtype=torch.int64)
    if top_k is not None:
        scores = transformers.TopKLogitsWarper(top_k)(ids, scores)
    if top_p is not None:
        scores = transformers.TopPLogitsWarper(top_p)(ids, scores)
    kept = law.kept_tokens((logits / 0.7).log_softmax(-1), top_k, top_p)
    assert kept.equal(scores > -torch.inf)
    close(
        law.Law(0.7, top_k, top_p).logps(logits, 0)[:, 1:].exp(),
        law_without_0(logits, top_k, top_p),
    )


def law_without_0(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Rows of probabilities by hand, token 0 being the mask token."""
    rows = []
    for row in (logits[:, 1:] / 0.7).softmax(-1).tolist():
        kept = kept_by_hand(row, top_k, top_p)
        rows.append([kept.get(v, 0.0) for v in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": True},
        {"top_k": 2.0},
        {"top_p": 0.0},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_p": True},
    ],
)
def test_wrong_values_are_refused_in_one_line(cut: dict[str, Any]) -> None:
    message = f"^{next(iter(cut))} is a .* got [^\\n]*$"
    with pytest.raises(ValueError, match=message):
        law.check_truncation(**{"top_k": None, "top_p": None, **cut})
    if type(next(iter(cut.values()))) is (int if "top_k" in cut else float):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=message):
                run(toys()["full"], rows=1, temperature=temperature, **cut)


def test_a_truncated_row_is_the_same_in_any_batch_and_without_a_cache() -> None:
    den = block_toy(3, num_tokens=4)
    together = decoded(den, top_k=3, top_p=0.8)
    assert together.kept is not None
    uncached = decoded(den, top_k=3, top_p=0.8, cached=False)
    assert together.ids.equal(uncached.ids) and uncached.kept is not None
    assert together.kept.sort(-1).values.equal(uncached.kept.sort(-1).values)
    order = torch.tensor([3, 1])
    some = together.rows(order)
    assert some.kept is not None and some.kept.equal(together.kept[order])
    assert len(PROMPTS) == len(together.ids)
    close(scored(den, together, trajectory()), together.behavior_logps * together.action_mask)
