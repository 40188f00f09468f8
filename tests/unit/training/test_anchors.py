"""How many rollouts of a prompt are anchored, and which stored answers are used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import finished_rollout
from tests.unit.training.test_shell import anchors
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import load_tokenizer
from unmaskrl.recipes.checks import warnings_for
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.rollouts.anchors import Anchors
from unmaskrl.training.rollouts.problems import Rewarded


def visit(steered: Anchors, step: int, right: list[list[int]]) -> list[int]:
    """One step's groups of 4, anchored rollouts first; ``right``: which of the blank ones succeed.
    Returns numbers anchored.
    """
    counts = [steered.num_anchored(index, 4) for index in steered.problems.indices(step)]
    anchored = torch.tensor([[i < n for i in range(4)] for n in counts]).flatten()
    correct = torch.tensor(
        [
            [i >= n and i - n in wins for i in range(4)]
            for n, wins in zip(counts, right, strict=True)
        ]
    ).flatten()
    ids = torch.arange(len(counts)).repeat_interleave(4) + step * len(counts)
    rollout = finished_rollout([(0, 1)] * len(ids), [(1, 2)] * len(ids), eos_id=9)
    steered.learn(
        Rewarded(
            rollout=replace(rollout, group_ids=ids),
            examples=[],
            texts=[],
            rewards=correct.float(),
            parts={},
            correct=correct,
            anchored=anchored,
        ),
        step,
        lambda counts: counts,
    )
    return counts


def test_prompts_that_are_solved_blank_get_fewer_anchored_rollouts() -> None:
    settings = (
        "prior.adapt_share=true",
        "prior.share=0.5",
        "train.num_prompts=2",
        "train.prompts_per_step=2",
    )
    steered = anchors(*settings)
    first, second = steered.problems.indices(0)
    assert visit(steered, 0, [[0, 1], []]) == [2, 2]
    # halfway from 1 - share to the 2 of 2 and 0 of 2 seen
    assert steered.solved == {first: 0.75, second: 0.25}
    right = {first: [0, 1, 2, 3], second: []}
    order = steered.problems.indices(1)
    assert visit(steered, 1, [right[i] for i in order]) == [{first: 1, second: 3}[i] for i in order]
    for step in range(2, 8):
        visit(steered, step, [right[i] for i in steered.problems.indices(step)])
    assert steered.num_anchored(first, 4) == 0
    assert steered.num_anchored(second, 4) == 3, (
        "one rollout stays blank: otherwise nothing could be learned"
    )
    steered.problems.tokenizer = load_tokenizer(ASSETS / "mini")
    of_group = steered.of_group(second, 9, 0.0, range(36, 40))
    assert [bool(a) for a in of_group] == [True, True, True, False]
    constant = anchors("prior.share=0.5", *settings[2:])
    assert (
        visit(constant, 0, [[0, 1], []]) == [2, 2] == visit(constant, 1, [[0, 1], []])
        and constant.solved == {}
    )
    assert (
        anchors("prior.adapt_share=true").num_anchored(0, 8) == 7
        and anchors().num_anchored(0, 8) == 8
    )


def test_what_is_told_about_priors_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "prior.jsonl"
    few = anchors("train.num_prompts=16").problems.examples
    rows = [
        {"id": e.id, "ids": [5, 6], "protected": [False, True], "correct": n < 5}
        for n, e in enumerate(few[:12])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"prior.source={file}", "train.num_prompts=16", "prior.keep=1")
    every = anchors(*settings)
    right = anchors(*settings, "prior.only_correct=true")
    assert every.notes() == [
        "prior.source: 4 of 16 problems have no answer in the file and start blank"
    ]
    assert (
        right.notes()[1]
        == "prior.only_correct: 7 of 16 answers are left out; their problems start blank"
    )
    assert every.reference(7) == ([5, 6], [False, True]) and right.reference(7) == ([], [])
    assert right.reference(4) == ([5, 6], [False, True])
    assert any(every.of_group(7, 0, 0.0, [0])) and not any(right.of_group(7, 0, 0.0, [0]))
    file.write_text(json.dumps({"id": few[0].id, "ids": [5], "protected": [False]}) + "\n")
    assert anchors(*settings).reference(0) == ([5], [False])
    with pytest.raises(
        ValueError, match=r"prior\.jsonl:1: expected an object with id, ids, protected and correct"
    ):
        anchors(*settings, "prior.only_correct=true")
    with pytest.raises(ValueError, match=r"prior\.only_correct needs prior\.source"):
        anchors("prior.only_correct=true")
    unused = warnings_for(
        load_recipe(
            "sudoku-mini",
            ["prior.name=none", "prior.adapt_share=true", "estimator.hide_anchors=false"],
        )
    )
    assert any("prior.adapt_share and prior.only_correct do nothing" in note for note in unused)
    (note,) = anchors("prior.adapt_share=true", "train.steps=3").notes()
    assert "no problem comes twice" in note and "train.num_prompts" in note
