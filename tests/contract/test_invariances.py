"""What must never change a result: batch size, row order, padding, the split over ranks, a global
generator.

On a random LLaDA in fp64 with real attention over padded rows. Tokens, steps and counts must be
identical, log-probs equal to 1e-9 (other batch shapes round differently).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import QUOTA_RULES, seeded, tiny_llada
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import ESTIMATORS
from unmaskrl.core.scoring import token_logps, view_logps
from unmaskrl.core.types import Canvas, Rollout
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families.llada import LLaDA

DENOISER = tiny_llada()
GEN_LENGTH = 8
ROW_IDS = [12, 3, 45, 6, 78, 9, 100, 2]
OPTIONS = [
    {"block_length": 8, "steps": 8, "temperature": 0.9},
    {"block_length": 4, "steps": 5, "temperature": 1.2, "exit_at": 0.6},
    {"block_length": 2, "steps": 8, "temperature": 0.0},
]
SETTINGS = pytest.mark.parametrize(
    ("select", "options"),
    [(s, o) for s in QUOTA_RULES for o in OPTIONS],
    ids=lambda x: x if isinstance(x, str) else "",
)
ESTIMATOR = pytest.mark.parametrize(
    ("name", "kwargs"),
    [("elbo", {}), ("elbo", {"hide_anchors": True, "num_mc": 2}), ("mean_field", {})],
    ids=str,
)


def canvas_of(rows: list[int], extra_pad: int = 0) -> Canvas:
    """The canvas of these rows (indices into ROW_IDS); each row's prompt and anchors are its
    own.
    """
    prompts = [[(3 * r + k) % 11 for k in range(1 + r % 5)] for r in rows]
    anchors = [
        {} if r % 3 == 0 else {r % GEN_LENGTH: r % 11, (r + 3) % GEN_LENGTH: 1} for r in rows
    ]
    canvas = anchored_canvas(
        prompts,
        anchors,
        gen_length=GEN_LENGTH,
        denoiser=DENOISER,
        row_ids=[ROW_IDS[r] for r in rows],
        group_ids=[r // 2 for r in rows],
    )
    return pad_left(canvas, extra_pad)


def pad_left(canvas: Canvas, extra: int) -> Canvas:
    def wide(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([torch.full((len(tensor), extra), value, dtype=tensor.dtype), tensor], 1)

    return replace(
        canvas,
        ids=wide(canvas.ids, DENOISER.pad_id),
        prompt_mask=wide(canvas.prompt_mask, 0),
        fixed_mask=wide(canvas.fixed_mask, 0),
        attention_mask=wide(canvas.attention_mask, 0),
    )


def run(canvas: Canvas, select: str, options: dict) -> Rollout:
    return decode(DENOISER, canvas, select=select, generator=seeded(77), **options)


def same_completions(got: Rollout, want: Rollout, rows: list[int]) -> None:
    """Row i of ``got`` is row ``rows[i]`` of ``want``, whatever lies to the left of the
    completion.
    """
    for name in (
        "ids",
        "decoded_step",
        "completion_mask",
        "action_mask",
        "anchor_mask",
        "exit_mask",
    ):
        assert torch.equal(
            getattr(got, name)[:, -GEN_LENGTH:], getattr(want, name)[rows, -GEN_LENGTH:]
        ), name
    for name in ("nfe", "exit_step", "row_ids", "group_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)[rows]), name
    gap = got.behavior_logps[:, -GEN_LENGTH:] - want.behavior_logps[rows, -GEN_LENGTH:]
    assert gap.abs().max() < 1e-9


EVERYONE = list(range(len(ROW_IDS)))


@SETTINGS
def test_decoding_does_not_depend_on_the_batch(select: str, options: dict) -> None:
    """Each row alone, pairs, another order, ranks that take every second row, and more left
    padding.
    """
    want = run(canvas_of(EVERYONE), select, options)
    splits = [[r] for r in EVERYONE[:3]] + [EVERYONE[::2], EVERYONE[1::2], [5, 0, 7, 2, 6, 1, 4, 3]]
    for rows in splits:
        same_completions(run(canvas_of(rows), select, options), want, rows)
    same_completions(run(canvas_of(EVERYONE, extra_pad=5), select, options), want, EVERYONE)
    rows = [6, 1]
    same_completions(run(canvas_of(EVERYONE).rows(torch.tensor(rows)), select, options), want, rows)


def test_the_batch_above_is_not_trivial() -> None:
    want = run(canvas_of(EVERYONE), "entropy", OPTIONS[1])
    assert not canvas_of(EVERYONE).attention_mask.all()
    assert len(set(want.nfe.tolist())) > 1
    assert (want.completion_mask.sum(-1) < GEN_LENGTH).any()
    assert want.exit_mask.any() and want.anchor_mask.any()
    assert len({tuple(x) for x in want.ids[:, -GEN_LENGTH:].tolist()}) == len(ROW_IDS)


def test_rows_of_one_prompt_differ_by_their_id_and_repeat_with_it() -> None:
    def at(row_ids: list[int]) -> Rollout:
        canvas = anchored_canvas(
            [[1, 2]] * len(row_ids),
            [{}] * len(row_ids),
            gen_length=8,
            denoiser=DENOISER,
            row_ids=row_ids,
        )
        return run(canvas, "entropy", OPTIONS[0])

    first = at([5, 6, 7])
    second = at([7, 8, 5])
    assert torch.equal(first.ids[0], second.ids[2]) and torch.equal(first.ids[2], second.ids[0])
    assert len({tuple(x) for x in torch.cat([first.ids, second.ids]).tolist()}) == 4


@ESTIMATOR
def test_likelihoods_do_not_depend_on_the_batch(name: str, kwargs: dict) -> None:
    estimator = ESTIMATORS[name](**kwargs)

    def score(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        views = estimator.make_views(rollout, DENOISER.mask_id, seeded(5))
        with torch.no_grad():
            return views.ids, views.weight, token_logps(DENOISER, rollout, estimator, views)

    want_rollout = run(canvas_of(EVERYONE), "entropy", OPTIONS[1])
    want_ids, want_weight, want = score(want_rollout)
    for rows, pad in [
        ([0], 0),
        ([4, 1], 0),
        (EVERYONE[::2], 0),
        (EVERYONE[::-1], 0),
        (EVERYONE, 4),
        ([2, 7], 3),
    ]:
        rollout = run(canvas_of(rows, pad), "entropy", OPTIONS[1])
        ids, weight, got = score(rollout)
        width = min(ids.shape[-1], want_ids.shape[-1])
        views = ids.shape[1]
        real = rollout.attention_mask[:, None, -width:]
        same = (ids[..., -width:] == want_ids[rows, :views, -width:]) | ~real
        assert same.all()
        assert torch.equal(weight[..., -GEN_LENGTH:], want_weight[rows, :views, -GEN_LENGTH:])
        assert (got[:, -GEN_LENGTH:] - want[rows, -GEN_LENGTH:]).abs().max() < 1e-9
    assert want.abs().max() > 0.1


def test_global_generators_are_neither_read_nor_written() -> None:
    """Reseeding the global generator in between changes nothing, and its state stays."""
    canvas = canvas_of(EVERYONE)
    results = []
    saved = torch.get_rng_state()
    try:
        for seed in (1, 2):
            torch.set_rng_state(seeded(seed).get_state())
            before = torch.get_rng_state()
            rollout = run(canvas, "random", OPTIONS[1])
            logps = []
            for name in sorted(ESTIMATORS):
                views = ESTIMATORS[name]().make_views(rollout, DENOISER.mask_id, seeded(5))
                logps.append(view_logps(DENOISER, rollout, views).detach())
            assert torch.equal(before, torch.get_rng_state())
            results.append((rollout.ids, *logps))
    finally:
        torch.set_rng_state(saved)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpointed_backward_does_not_touch_global_generators(monkeypatch) -> None:
    monkeypatch.setattr("unmaskrl.core.decoding.sample.CHUNK_ELEMENTS", 2 * DENOISER.vocab_size)
    rollout = run(canvas_of([0, 1]), "entropy", OPTIONS[0])
    estimator = ESTIMATORS["elbo"]()
    views = estimator.make_views(rollout, DENOISER.mask_id, seeded(5))
    before = torch.get_rng_state()
    token_logps(DENOISER, rollout, estimator, views).sum().backward()
    DENOISER.model.zero_grad()
    assert torch.equal(before, torch.get_rng_state())


def test_the_models_own_row_chunks_change_nothing(monkeypatch) -> None:
    """On CPU the model runs large batches in chunks of rows."""
    want = run(canvas_of(EVERYONE), "entropy", OPTIONS[1])
    assert isinstance(DENOISER, ModelDenoiser) and isinstance(DENOISER.model, LLaDA)
    monkeypatch.setattr(DENOISER.model, "cpu_chunk", 3 * want.ids.shape[1])
    same_completions(run(canvas_of(EVERYONE), "entropy", OPTIONS[1]), want, EVERYONE)
