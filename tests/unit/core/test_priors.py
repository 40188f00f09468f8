"""Canvas builders and the choice of anchors against hand-worked cases; predictability against the
joint.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import HashDenoiser, seeded, tiny_llada
from unmaskrl.core.canvas import (
    SELECTIONS,
    anchored_canvas,
    blank_canvas,
    choose_anchors,
    predictability,
    random_scores,
)
from unmaskrl.core.toy import ToyDenoiser

TOY = ToyDenoiser.random(seeded(1), num_tokens=3, length=3)
M = TOY.mask_id
PAD = TOY.pad_id
REFERENCE = [10, 11, 12, 13, 14, 15, 99, 99]  # 99 is EOS
PROTECTED = [False, False, True, True, False, False, False, False]
SCORES = [-3.0, -1.0, -0.1, -0.2, -2.0, -1.5, 0.0, 0.0]


def test_blank_canvas_by_hand() -> None:
    canvas = blank_canvas([[0, 1, 2], [2]], gen_length=2, denoiser=TOY)
    assert canvas.ids.tolist() == [[0, 1, 2, M, M], [PAD, PAD, 2, M, M]]
    assert canvas.prompt_mask.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
    assert canvas.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert not canvas.fixed_mask.any()
    assert canvas.row_ids.tolist() == canvas.group_ids.tolist() == [0, 1]
    assert canvas.gen_length == 2


def test_anchored_canvas_by_hand() -> None:
    canvas = anchored_canvas(
        [[0], [1, 2]],
        [{2: 1, 0: 2}, {}],
        gen_length=3,
        denoiser=TOY,
        row_ids=[70, 60],
        group_ids=[4, 4],
    )
    assert canvas.ids.tolist() == [[PAD, 0, 2, M, 1], [1, 2, M, M, M]]
    assert canvas.fixed_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert (canvas.row_ids.tolist(), canvas.group_ids.tolist()) == ([70, 60], [4, 4])


@pytest.mark.parametrize(
    ("prompts", "anchors", "message"),
    [
        ([], [], "at least one"),
        ([[0]], [{}, {}], "2 and 1"),
        ([[0], []], [{}, {}], "a prompt is empty"),
        ([[0]], [{3: 1}], "offset 3 is outside"),
        ([[0]], [{-1: 1}], "offset -1 is outside"),
        ([[0]], [{0: M}], "cannot be an anchor"),
        ([[0]], [{0: TOY.eos_id}], "cannot be an anchor"),
        ([[0]], [{0: PAD}], "cannot be an anchor"),
        ([[M]], [{}], "a prompt contains the mask token"),
    ],
)
def test_bad_canvases_are_refused(prompts, anchors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anchored_canvas(prompts, anchors, gen_length=3, denoiser=TOY)


def test_eos_that_is_no_pad_cannot_be_an_anchor_either() -> None:
    denoiser = HashDenoiser(length=4)
    assert denoiser.eos_id != denoiser.pad_id
    for token in (denoiser.eos_id, denoiser.pad_id, denoiser.mask_id):
        with pytest.raises(ValueError, match="cannot be an anchor"):
            anchored_canvas([[0]], [{1: token}], gen_length=4, denoiser=denoiser)


def test_an_end_of_turn_id_cannot_be_an_anchor_either() -> None:
    """It ends the completion as EOS does: at offset 0 the row would have nothing to decide."""
    denoiser = tiny_llada()
    anchored_canvas([[0]], [{0: 4}], gen_length=3, denoiser=denoiser)
    ends_turns = replace(denoiser, end_ids=(denoiser.eos_id, 4))
    for token in ends_turns.end_ids:
        with pytest.raises(ValueError, match=f"token {token} .*end of turn.* cannot be an anchor"):
            anchored_canvas([[0]], [{0: token}], gen_length=3, denoiser=ends_turns)


@pytest.mark.parametrize(
    ("keep", "protected", "gen_length", "offsets"),
    [
        (0.0, None, 8, []),
        (0.5, None, 8, [1, 2, 3]),  # n = 6 (EOS does not count); the three highest scores
        (0.5, PROTECTED, 8, [1, 4, 5]),  # the answer span is never kept
        (1.0, None, 8, [0, 1, 2, 3, 4, 5]),  # EOS is never kept
        (1.0, PROTECTED, 8, [0, 1, 4, 5]),
        (0.24, None, 8, [2]),  # 1.44 rounds to 1
        (0.25, None, 8, [2, 3]),  # 1.5 rounds up
        (0.08, None, 8, []),  # 0.48 rounds to 0
        (0.5, None, 2, [0, 1]),  # beyond gen_length nothing is given, but it counts in n
        (1.0, PROTECTED, 5, [0, 1, 4]),
    ],
)
def test_choose_anchors_by_hand(
    keep: float, protected: list[bool] | None, gen_length: int, offsets: list[int]
) -> None:
    got = choose_anchors(
        REFERENCE, SCORES, keep=keep, gen_length=gen_length, protected=protected, never=(99,)
    )
    assert got == {i: REFERENCE[i] for i in offsets}
    assert list(got) == sorted(got)


@pytest.mark.parametrize(
    ("tokens", "answer", "keep", "published", "ours"),
    [
        (192, 12, 0.05, 9, 10),
        (192, 12, 0.1, 18, 19),
        (192, 12, 0.15, 27, 29),
        (60, 30, 0.05, 2, 3),
        (60, 30, 0.1, 3, 6),
        (60, 30, 0.15, 5, 9),
        (20, 16, 0.05, 1, 1),
        (20, 16, 0.1, 1, 2),
        (20, 16, 0.15, 1, 3),
        (20, 20, 0.1, 0, 0),  # nothing lies outside the answer
        (20, 0, 0.1, 2, 2),
    ],
)
def test_the_published_count_is_of_the_tokens_outside_the_answer(
    tokens, answer, keep, published, ours
) -> None:
    """maskd_data_utils.py masks int(num_rest * rho) of the num_rest tokens outside the answer, rho
    = 1 - keep.
    """
    protected = [i >= tokens - answer for i in range(tokens)]
    scores = [float(i % 7) for i in range(tokens)]
    for count, want in (("outside_answer", published), ("reference", ours)):
        got = choose_anchors(
            range(tokens), scores, keep=keep, gen_length=tokens, protected=protected, count=count
        )
        assert len(got) == min(want, tokens - answer) and not any(protected[i] for i in got)
    with pytest.raises(
        ValueError, match="count must be one of reference, outside_answer, got 'paper'"
    ):
        choose_anchors([1], [0.0], keep=0.5, gen_length=1, count="paper")


def test_choose_anchors_gives_ties_to_the_left() -> None:
    assert list(choose_anchors([5, 6, 7, 8], [0.0, 1.0, 1.0, 1.0], keep=0.5, gen_length=4)) == [
        1,
        2,
    ]


@pytest.mark.parametrize("keep", [-0.01, 1.01, float("nan")])
def test_choose_anchors_refuses_a_keep_outside_0_1(keep: float) -> None:
    with pytest.raises(ValueError, match="keep is the fraction"):
        choose_anchors(REFERENCE, SCORES, keep=keep, gen_length=8)


@pytest.mark.parametrize(("scores", "protected"), [(SCORES[1:], None), (SCORES, PROTECTED[1:])])
def test_choose_anchors_refuses_unequal_lengths(scores, protected) -> None:
    with pytest.raises(ValueError, match="must be equal"):
        choose_anchors(REFERENCE, scores, keep=0.5, gen_length=8, protected=protected)


def test_random_selection_is_uniform_over_subsets_and_keyed_by_row() -> None:
    counts = torch.zeros(6)
    for row in range(1000):
        scores = random_scores(6, seed=4, row_id=row)
        for offset in choose_anchors(list(range(6)), scores, keep=0.5, gen_length=6):
            counts[offset] += 1
    assert ((counts / 1000 - 0.5).abs() < 4 * (0.25 / 1000) ** 0.5).all()
    assert random_scores(6, seed=4, row_id=8) == random_scores(8, seed=4, row_id=8)[:6]
    assert random_scores(6, seed=4, row_id=8) != random_scores(6, seed=4, row_id=9)
    assert random_scores(6, seed=4, row_id=8) != random_scores(6, seed=5, row_id=8)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_of_a_recipe_is_a_choice_of_scores_and_protection(selection: str) -> None:
    """How the four names are composed: random or predictability scores, answer protected or not."""
    scores = SCORES if "most_predictable" in selection else random_scores(8, seed=0, row_id=3)
    protected = PROTECTED if "protect_answer" in selection else None
    got = choose_anchors(
        REFERENCE, scores, keep=0.5, gen_length=8, protected=protected, never=(99,)
    )
    assert len(got) == 3
    assert not set(got) & ({2, 3, 6, 7} if protected else {6, 7})


def test_predictability_is_the_marginal_of_the_joint() -> None:
    joint = TOY.log_joint().exp()
    references = [[0, 1, 2], [2, 2, 0]]
    got = predictability(TOY, [[1], [0, 1]], references)
    for reference, scores in zip(references, got, strict=True):
        for i, (token, score) in enumerate(zip(reference, scores, strict=True)):
            marginal = joint[TOY.completions[:, i] == token].sum()
            assert score == pytest.approx(float(marginal.log()), abs=1e-9)


def test_predictability_on_a_model_in_chunks_with_references_of_different_lengths(
    monkeypatch,
) -> None:
    denoiser = tiny_llada()
    prompts = [[1, 2, 3], [4]]
    references = [[5, 6, 7, 8, 9], [1, 0]]
    whole = predictability(denoiser, prompts, references)
    monkeypatch.setattr("unmaskrl.core.decoding.sample.CHUNK_ELEMENTS", 2 * denoiser.vocab_size)
    chunked = predictability(denoiser, prompts, references)
    ids = torch.tensor([[1, 2, 3] + [11] * 5, [13, 13, 4] + [11] * 5])
    logits = denoiser.logits(ids, ids != 13).detach()
    logits[..., 11] = float("-inf")
    logps = logits.log_softmax(-1)
    for row, reference in enumerate(references):
        want = [float(logps[row, 3 + i, token]) for i, token in enumerate(reference)]
        assert whole[row] == pytest.approx(want, abs=1e-10)
        assert chunked[row] == pytest.approx(want, abs=1e-10)
