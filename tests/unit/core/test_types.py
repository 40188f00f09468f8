"""Canvas validation, what a Rollout derives, row slicing, and that shape checks are on in tests."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch

from tests.conftest import finished_rollout, train_batch
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Canvas, LossOutputs, Views, completion_columns, first_eos_mask

TOY = ToyDenoiser(torch.zeros(81), num_tokens=3, length=4)
MASK = TOY.mask_id
EOS = TOY.eos_id


def canvas() -> Canvas:
    """Columns: pad, prompt, prompt | completion of 4; the second prompt is one shorter; anchors in
    row 1.
    """
    return anchored_canvas(
        [[0, 1, 2], [1, 2]], [{}, {0: 2, 3: 1}], gen_length=4, denoiser=TOY, row_ids=[7, 9]
    )


def changed(name: str, row: int, column: int, value: int | bool) -> Canvas:
    tensor = getattr(canvas(), name).clone()
    tensor[row, column] = value
    return replace(canvas(), **{name: tensor})


def test_the_canvas_of_these_tests_is_valid() -> None:
    assert canvas().validate(MASK).ids.tolist() == [
        [0, 1, 2, MASK, MASK, MASK, MASK],
        [TOY.pad_id, 1, 2, 2, MASK, MASK, 1],
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: replace(canvas(), gen_length=0), "gen_length 0"),
        (lambda: replace(canvas(), gen_length=7), "gen_length 7 leaves no prompt"),
        (lambda: changed("prompt_mask", 0, 3, True), "prompt_mask reaches into"),
        (lambda: changed("fixed_mask", 0, 1, True), "anchors must lie in the completion"),
        (lambda: changed("ids", 0, 1, MASK), "a prompt contains the mask token"),
        (lambda: changed("ids", 1, 0, MASK), "open positions"),  # a left pad that looks open
        (lambda: changed("ids", 0, 4, 1), "open positions"),  # a given token that is not marked
        # an anchor that holds the mask
        (lambda: changed("fixed_mask", 0, 4, True), "open positions"),
        (lambda: changed("attention_mask", 1, 0, True), "attention_mask"),
        (lambda: changed("attention_mask", 0, 0, False), "attention_mask"),
        (lambda: changed("attention_mask", 0, 6, False), "attention_mask"),
    ],
)
def test_validate_refuses(bad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad().validate(MASK)


def test_shape_and_dtype_checks_are_on() -> None:
    good = canvas()
    for wrong in (
        {"row_ids": torch.arange(3)},
        {"prompt_mask": good.prompt_mask.long()},
        {"fixed_mask": good.fixed_mask[:, 1:]},
        {"ids": good.ids.double()},
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            replace(good, **wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        Views(ids=torch.zeros(2, 3, 4, dtype=torch.int64), weight=torch.zeros(2, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        LossOutputs(loss=torch.zeros(2), metrics={})


def test_rows_take_every_field_in_the_asked_order() -> None:
    picked = canvas().rows(torch.tensor([1, 0, 1]))
    assert picked.row_ids.tolist() == [9, 7, 9]
    assert picked.group_ids.tolist() == [9, 7, 9]
    assert picked.ids[0].tolist() == canvas().ids[1].tolist()
    assert picked.fixed_mask.sum(-1).tolist() == [2, 0, 2]
    assert picked.attention_mask[:, 0].tolist() == [False, True, False]
    assert picked.gen_length == 4


def test_rows_of_a_train_batch_keep_the_global_counts_and_a_missing_reference() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    old = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    batch = train_batch(mask, torch.tensor([1.0, -1.0]), old, num_actions=30.0, num_rows=12.0)
    half = batch.rows(torch.tensor([1]))
    assert (half.num_actions, half.num_rows, half.ref_logps) == (30.0, 12.0, None)
    assert half.advantages.tolist() == [-1.0]
    assert half.old_logps.tolist() == [pytest.approx([0.3, 0.4])]


def test_first_eos_mask_by_hand() -> None:
    # EOS 9, prompt 1 token
    ids = torch.tensor([[9, 1, 9, 2, 9], [9, 9, 1, 2, 3], [9, 1, 2, 3, 4], [1, 9, 9, 9, 9]])
    assert first_eos_mask(ids, 4, 9).int().tolist() == [
        [0, 1, 1, 0, 0],  # an EOS in the prompt does not count
        [0, 1, 0, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 0, 0, 0],
    ]
    assert completion_columns(ids, 4)[2].tolist() == [False, True, True, True, True]


def test_what_a_rollout_derives_by_hand() -> None:
    # Offsets 0..3. Row 0: anchor, two calls, exit call 3. Row 1: EOS (id 9) at offset 1, the rest
    # never revealed (nfe 2). Row 2: exit call at 1; an anchor behind the EOS.
    rollout = finished_rollout(
        [[1, 2, 0, 1], [2, 9, 9, 9], [9, 1, 2, 0]],
        [[0, 1, 3, 2], [1, 2, 3, 3], [1, 1, 0, 1]],
        eos_id=9,
        left_pad=1,
        exit_step=[3, 0, 1],
    )
    rollout = replace(rollout, nfe=torch.tensor([3, 2, 1]))
    completion = rollout.ids[:, 3:]
    assert completion.shape == (3, 4)
    assert rollout.completion_mask[:, 3:].int().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert rollout.fixed_mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
    ]
    assert rollout.anchor_mask.int().tolist() == [
        [0, 0, 0, 1, 0, 0, 0],
        [0] * 7,
        [0, 0, 0, 0, 0, 1, 0],
    ]
    assert rollout.action_mask[:, 3:].int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert rollout.exit_mask[:, 3:].int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not (rollout.action_mask | rollout.exit_mask | rollout.anchor_mask)[:, :3].any()
    assert rollout.completions() == [[1, 2, 0, 1], [2, 9], [9]]


def test_latents_by_hand() -> None:
    rollout = finished_rollout(
        [[1, 2, 0, 1], [2, 9, 9, 9]], [[0, 1, 3, 2], [1, 2, 3, 3]], eos_id=9, prompt=1
    )
    m = 3
    assert rollout.latent(torch.tensor([0, 0]), m).tolist() == [[0, 1, m, m, m], [0, m, m, m, m]]
    assert rollout.latent(torch.tensor([2, 1]), m).tolist() == [[0, 1, 2, m, 1], [0, 2, m, m, m]]
    assert rollout.latent(torch.tensor([3, 2]), m).tolist() == [[0, 1, 2, 0, 1], [0, 2, 9, m, m]]
