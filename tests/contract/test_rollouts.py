"""Rollout engines: the local one and one from outside pass the checker, and mistakes fail it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import own_engine
from tests.conftest import seeded, tiny_llada
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.rollouts import DecodeSettings, LocalRollouts, check_truncation_served
from unmaskrl.core.scoring import behavior_gap
from unmaskrl.core.types import Rollout
from unmaskrl.models.adapters import add_lora, lora_layers, merged_tensors
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.recipes.engines import make_rollouts
from unmaskrl.recipes.load import load_recipe
from unmaskrl.testing import check_rollouts
from unmaskrl.training.rollouts.engine import Converted, Merged

FILE = Path(own_engine.__file__)
OUTSIDE = f"{FILE}:LeftToRight"


def test_the_local_engine_passes_the_checker() -> None:
    check_rollouts(LocalRollouts)


def test_so_it_does_on_a_model() -> None:
    check_rollouts(LocalRollouts, tiny_llada(torch.float32))


def test_an_engine_from_outside_passes_the_checker() -> None:
    check_rollouts(lambda denoiser: make_rollouts({"name": OUTSIDE, "greeting": "hi"}, denoiser))


def edited(edit: Any, **stated: Any) -> Any:
    """A factory of engines whose rollouts are edited, or that claim more than they serve."""

    class Edited(LocalRollouts):
        def sample(self, canvas, settings, generator=None, gamma=None):
            return edit(super().sample(canvas, settings, generator, gamma))

    for name, value in stated.items():
        setattr(Edited, name, value)
    return Edited


class Stale(LocalRollouts):
    """Samples from the weights that it was built with."""

    def __init__(self, denoiser: Any) -> None:
        frozen = type(denoiser)(
            denoiser.log_weights.clone(), num_tokens=4, length=6, eos_id=denoiser.eos_id
        )
        super().__init__(frozen)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda denoiser: denoiser, "a ToyDenoiser is no engine"),
        (edited(lambda r: r, features=frozenset({"speed"})), "features names .'speed'."),
        (edited(lambda r: r, rules=frozenset({"best"})), "rules is .'best'."),
        (edited(lambda r: replace(r, ids=r.ids.roll(1, 0))), "were changed"),
        (edited(lambda r: replace(r, nfe=r.nfe + 1)), "every call of 1..nfe reveals a token"),
        (edited(lambda r: replace(r, nfe=r.nfe * 0)), "made no call"),
        (edited(lambda r: replace(r, behavior_logps=r.behavior_logps * 0.5)), "behavior_logps are"),
        (edited(lambda r: replace(r, behavior_logps=r.behavior_logps + 1)), "at most 0"),
        (edited(lambda r: replace(r, row_ids=r.row_ids + 1)), "row_ids is not the canvas'"),
        (edited(lambda r: replace(r, completion_mask=~r.prompt_mask)), "completion_mask does not"),
        (edited(lambda r: replace(r, exit_step=r.exit_step * 0)), "left no row early"),
        (Stale, "greedy completions are not those of decode"),
    ],
)  # fmt: skip
def test_the_checker_finds_mistakes(factory: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_rollouts(factory)


def test_the_checker_finds_an_engine_that_draws_by_batch() -> None:
    class ByBatch(LocalRollouts):
        def sample(self, canvas, settings, generator=None, gamma=None) -> Rollout:
            rows = torch.arange(len(canvas.row_ids))
            own = super().sample(replace(canvas, row_ids=rows), settings, generator, gamma)
            return replace(own, row_ids=canvas.row_ids)

    with pytest.raises(AssertionError, match="row_keys: in another batch"):
        check_rollouts(ByBatch)
    ByBatch.features = LocalRollouts.features - {"row_keys"}
    check_rollouts(ByBatch)


def test_rollouts_in_another_precision_are_decode_on_a_copy() -> None:
    denoiser = tiny_llada(torch.float32)
    canvas = blank_canvas([[1, 2], [3]], gen_length=4, denoiser=denoiser)
    settings = DecodeSettings(block_length=4, steps=4, temperature=1.0)
    rollout = Converted(denoiser, torch.bfloat16).sample(canvas, settings, seeded())
    want = LocalRollouts(tiny_llada(torch.bfloat16)).sample(canvas, settings, seeded())
    assert torch.equal(rollout.ids, want.ids)
    assert next(denoiser.model.parameters()).dtype == torch.float32


def with_adapters(dtype: torch.dtype) -> ModelDenoiser:
    """Adapters that change what is decoded."""
    denoiser = tiny_llada(dtype)
    add_lora(denoiser.model, seeded(), rank=2, alpha=4.0)
    for _, layer in lora_layers(denoiser.model):
        torch.nn.init.normal_(layer.b, std=0.3, generator=seeded(1))
    return denoiser


def test_rollouts_on_merged_adapters_are_decode_on_merged_weights() -> None:
    denoiser = with_adapters(torch.float64)
    plain = tiny_llada(torch.float64)
    before = LocalRollouts(plain)
    canvas = blank_canvas([[1, 2], [3]], gen_length=8, denoiser=denoiser)
    settings = DecodeSettings(block_length=4, steps=8, temperature=1.0)
    base = before.sample(canvas, settings, seeded())
    rollout = Merged(denoiser).sample(canvas, settings, seeded())
    plain.model.load_state_dict(merged_tensors(denoiser.model))
    want = before.sample(canvas, settings, seeded())
    assert torch.equal(rollout.ids, want.ids) and not torch.equal(rollout.ids, base.ids)
    assert torch.equal(rollout.behavior_logps, want.behavior_logps)
    # nothing is left behind: a run that goes on samples the same
    assert torch.equal(rollout.ids, Merged(denoiser).sample(canvas, settings, seeded()).ids)
    # scoring multiplies by A and B: in float64 the same to rounding
    assert behavior_gap(denoiser, rollout) < 1e-12
    assert behavior_gap(tiny_llada(torch.float64), rollout) > 1e-3
    coarse = with_adapters(torch.bfloat16)
    assert 1e-4 < behavior_gap(coarse, Merged(coarse).sample(canvas, settings, seeded())) < 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.quantize=nf4"], "model.quantize=nf4 has others: drop one"),
        (["model.rollout_dtype=bfloat16"], "model.rollout_dtype=bfloat16 has others"),
        (
            ["train.shard=fsdp", "train.gather_rollout=false"],
            "merge_rollout needs whole weights, and train.gather_rollout=false keeps them in shar",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(changes: list[str], said: str) -> None:
    merging = "model.lora.merge_rollout=true"
    with pytest.raises(ValueError, match=said):
        load_recipe("sudoku-mini", [merging, *changes])
    load_recipe("sudoku-mini", [merging, "train.shard=fsdp"])  # on whole copies


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["rollouts.name=remote"], "rollouts.name: unknown 'remote'; known: local"),
        (["rollouts.port=3"], "rollouts: expected .name: ..., settings., got"),
        ([f"rollouts={{name: '{OUTSIDE}', port: 3}}"], "LeftToRight has no such setting"),
        ([f"rollouts.name={OUTSIDE}"], "does not serve decode.select=confidence; it serves left_"),
        (
            [f"rollouts.name={OUTSIDE}", "decode.select=left_to_right", "decode.exit_at=0.85"],
            "decode.exit_at=0.85 needs rollouts with exit_at",
        ),
        (
            [f"rollouts.name={OUTSIDE}", "model.rollout_dtype=bfloat16"],
            "model.rollout_dtype=bfloat16 is the precision of the engine 'local'",
        ),
    ],
)
def test_recipes_are_held_against_what_an_engine_serves(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_recipe("sudoku-mini-elbo", changes)
    assert "\n" not in str(caught.value)


def test_every_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_engine.LeftToRight, "features", frozenset())
    plain = ["decode.select=left_to_right", "decode.exit_at=null", "prior.name=none"]
    for changes, said in (
        (["prior.name=anchors"], "prior.name=anchors needs rollouts with anchors"),
        (["estimator.name=trajectory"], "estimator.name=trajectory needs rollouts with step_maps"),
        (["estimator.name=two_mean_field", "loss.is_cap=2.0"], "needs rollouts with step_maps"),
        (["estimator.name=mean_field", "loss.is_cap=2.0"], "loss.is_cap needs rollouts with behav"),
        (["decode.top_p=0.9"], "decode.top_p=0.9 needs rollouts with truncation"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recipe(
                "sudoku-mini-elbo",
                ["rollouts.name=tests.own_engine:LeftToRight", *plain, *changes],
            )
    load_recipe("sudoku-mini-elbo", ["rollouts.name=tests.own_engine:LeftToRight", *plain])


def test_an_engine_without_truncation_is_not_asked_for_it() -> None:
    """By the commands, which hold no recipe against it; greedy decoding asks for nothing."""
    engine = own_engine.LeftToRight(tiny_llada())
    settings = DecodeSettings(block_length=4, steps=4, temperature=1.0, top_k=2)
    with pytest.raises(ValueError, match="needs rollouts with truncation"):
        check_truncation_served(engine, settings)
    check_truncation_served(engine, replace(settings, temperature=0.0))
    check_truncation_served(LocalRollouts(tiny_llada()), settings)


def test_what_is_no_engine_is_refused() -> None:
    denoiser: ModelDenoiser = tiny_llada()
    with pytest.raises(ValueError, match="returns a ModelDenoiser; expected features, rules, sync"):
        make_rollouts({"name": f"{FILE}:not_an_engine"}, denoiser)
