"""Groups that are all wrong are decoded again, anchored (IGPO)."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from tests.conftest import rounded
from tests.unit.training.test_shell import anchors
from unmaskrl.core.rollouts import LocalRollouts
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import load_tokenizer
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.registry import make_task
from unmaskrl.training.rollouts.anchors import Anchors, chunked
from unmaskrl.training.rollouts.collect import rescued, rollout_step
from unmaskrl.training.rollouts.problems import Problems, Rewarded

SIZE = 4


@lru_cache
def step(*settings: str, rank: int = 0, ranks: int = 1) -> Rewarded:
    """One step of 8 groups of the demo's base."""
    recipe = load_recipe(
        "igpo",
        ["task.train_size=40", "train.prompts_per_step=8", f"train.group_size={SIZE}", *settings],
    )
    denoiser = load_denoiser(ASSETS / "mini")
    tokenizer = load_tokenizer(ASSETS / "mini")
    problems = Problems(recipe, make_task(recipe.task), tokenizer, denoiser.max_length)
    given = Anchors(recipe, problems, denoiser)
    engine = LocalRollouts(denoiser)
    return rollout_step(recipe, problems, given, engine, denoiser, {}, 0, 0.0, rank, ranks)


@pytest.mark.parametrize("most", [1, 3])
def test_right_ones_take_the_place_of_wrong_ones(most: int) -> None:
    """Nearly all of the reference is fixed, so most second decodings are right."""
    blank = step("prior.when=always", "prior.name=none")
    done = step("prior.keep=0.9", "prior.keep_to=0.9", f"prior.most_replaced={most}")
    before = blank.correct.view(-1, SIZE)
    wrong = ~before.any(-1)
    assert 0 < int(wrong.sum()) < len(wrong), "some groups are wrong and some are not"
    changed = done.anchored.view(-1, SIZE)
    assert not bool(changed[~wrong].any()), "a group with a right rollout stays"
    assert done.asked_again == SIZE * int(wrong.sum())
    assert done.replaced == int(changed.sum()) > 0
    assert set(changed[wrong].sum(-1).tolist()) <= set(range(most + 1))
    assert int(changed.sum(-1).max()) == most
    assert bool(done.correct[done.anchored].all())
    for i, replaced in enumerate(done.anchored.tolist()):
        same = done.rollout.ids[i].equal(blank.rollout.ids[i])
        assert same != replaced and (done.texts[i] != blank.texts[i]) == replaced
        total = sum(part[i] or 0.0 for part in done.parts.values())
        assert float(done.rewards[i]) == rounded(total, dtype=torch.float32)
    assert done.rollout.row_ids.equal(blank.rollout.row_ids)
    # anchors are given, so rows that were replaced took fewer calls than those that were dropped
    assert done.dropped_calls + int(done.rollout.nfe.sum()) > int(blank.rollout.nfe.sum())
    assert done.dropped_calls >= int((blank.rollout.nfe * done.anchored).sum())


def test_ranks_change_nothing() -> None:
    whole = step()
    for rank in range(2):
        part = step(rank=rank, ranks=2)
        rows = [i for i in range(len(whole.texts)) if i // SIZE % 2 == rank]
        assert part.texts == [whole.texts[i] for i in rows]
        assert part.rollout.row_ids.equal(whole.rollout.row_ids[rows])


def test_grades_of_other_parts_are_merged() -> None:
    """A task may name parts by what a text holds; a part that a text does not have abstains."""
    done = step()
    rows = len(done.texts)
    silent = [None] * rows
    before = replace(
        done,
        correct=torch.zeros(rows, dtype=torch.bool),
        parts={"short": [1.0] * rows, "old": list(silent)},
        rewards=torch.ones(rows),
    )
    again = replace(
        before,
        correct=torch.tensor([True] + [False] * (rows - 1)),
        parts={"long": list(silent)},
        rewards=torch.zeros(rows),
        unscored=1.0,
    )
    merged = rescued(before, again, list(range(rows)), SIZE, 1)
    assert merged.parts == {
        "short": [None] + [1.0] * (rows - 1),
        "old": silent,
        "long": silent,
    }
    assert merged.replaced == 1
    assert merged.unscored == 1 / rows


def test_chunks_are_fixed_together() -> None:
    scores = chunked(400, (2, 4), seed=1, row_id=0)
    sizes = Counter(scores)
    whole = [n for score, n in sizes.items() if score != scores[-1]]
    assert len(scores) == 400 and set(whole) == {2, 3, 4}
    # 3 sizes as often as each other: each within 5 standard deviations of its mean
    share = len(whole) / 3
    assert all(abs(Counter(whole)[n] - share) < 5 * share**0.5 for n in (2, 3, 4))
    runs = len([score for score, _ in itertools.groupby(scores)])
    assert runs == len(sizes), "a chunk is in one piece"
    # a size that no answer has, and no memory holds, is the whole answer
    assert len(set(chunked(9, (10**12, 10**12), seed=1, row_id=0))) == 1
    assert chunked(9, (1, 1), seed=1, row_id=0) != chunked(9, (1, 1), seed=1, row_id=1)


def test_every_rollout_is_given_a_share_of_its_own() -> None:
    given = anchors("prior.select=random", "prior.keep=0.2", "prior.keep_to=0.8")
    index = given.problems.indices(0)[0]
    tokens = sum(token != given.base.eos_id for token in given.reference(index)[0])
    counts = [len(one) for one in given.of_group(index, 0, 0.0, range(400))]
    mean = torch.tensor(counts).double().mean() / tokens
    assert min(counts) >= int(0.2 * tokens) and max(counts) <= int(0.8 * tokens) + 1
    # uniform: standard deviation 0.6 / sqrt(12) of a share, and what rounding adds
    assert abs(float(mean) - 0.5) < 5 * (0.18 / 20) + 0.5 / tokens / 20
    assert len(set(counts)) > tokens // 3


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("prior.keep_to=0.1", "keep_to 0.1 is below prior.keep 0.2"),
        ("prior.chunk=[4,2]", "chunk"),
        ("prior.chunk=[0,2]", "prior.chunk"),
        ("prior.select=most_predictable", "prior.chunk is for random selections"),
        ("prior.adapt_share=true", "only wrong groups are given anything"),
        ("decode.select=eb", "set decode.gamma to a number"),
    ],
)
def test_what_does_not_fit_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe("igpo", [setting])
