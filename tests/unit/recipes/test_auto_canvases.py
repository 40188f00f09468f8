"""``train.max_canvases=auto``: as many as fit a device by the plan, and as before on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.recipes.test_memory import FULL, LLADA_8B, LORA, mini_shape
from unmaskrl.core.decoding.sample import CHUNK_ELEMENTS
from unmaskrl.recipes.cost import step_cost
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.memory import (
    AUTO_ON_CPU,
    GIB,
    HEADROOM,
    Setup,
    largest_max_canvases,
    logits_bytes,
    memory_plan,
    on_device,
    verdict,
)

AUTO = replace(LORA, auto=True, max_canvases=AUTO_ON_CPU)


@pytest.mark.parametrize("gib", [40, 48, 64, 80, 141])
def test_as_many_as_fit_a_card_are_alive(gib: int) -> None:
    chosen = on_device(LLADA_8B, AUTO, gib)
    limit = HEADROOM * gib * GIB
    more = replace(chosen, max_canvases=chosen.max_canvases + 1)
    assert memory_plan(LLADA_8B, chosen).total <= limit
    assert chosen.max_canvases == 72 or memory_plan(LLADA_8B, more).total > limit
    assert chosen.max_canvases == largest_max_canvases(LLADA_8B, chosen, limit)
    assert verdict(LLADA_8B, AUTO, "card", gib).endswith(
        f"train.max_canvases=auto is {chosen.max_canvases} (an update has 72)"
    )


def test_one_is_alive_where_nothing_fits_and_numbers_are_kept() -> None:
    assert on_device(LLADA_8B, AUTO, 4).max_canvases == 1
    assert on_device(LLADA_8B, replace(LORA, max_canvases=24), 80).max_canvases == 24
    # what has to change is not the number that is chosen anyway
    assert "max_canvases" not in verdict(LLADA_8B, AUTO, "24 GB", 24)
    assert "train.max_canvases=" in verdict(LLADA_8B, LORA, "24 GB", 24)


def test_on_a_cpu_it_is_4096_as_before_unless_the_plan_says_that_they_do_not_fit() -> None:
    shape = mini_shape()
    setup = Setup.of(load_recipe("sudoku-mini"), shape, prompt_tokens=19, cuda=False)
    assert setup.auto and setup.canvases == 512
    assert on_device(shape, setup, 24).max_canvases == AUTO_ON_CPU == 4096
    some = memory_plan(shape, replace(setup, max_canvases=99)).total / HEADROOM / GIB
    assert on_device(shape, setup, some * (1 + 1e-9)).max_canvases == 99
    assert on_device(shape, setup, some * (1 - 1e-9)).max_canvases < 99


def test_decoding_in_a_plan_has_the_chunk_of_logits_of_the_card() -> None:
    rows = FULL.train_rows * FULL.window
    head = LLADA_8B.vocab
    large = on_device(LLADA_8B, FULL, 80)
    small = on_device(LLADA_8B, FULL, 8)
    # 80 GiB / 128 for 16 bytes an element
    assert large.chunk == 80 * 2**30 // 128 // 16 > 4 * CHUNK_ELEMENTS
    assert small.chunk == CHUNK_ELEMENTS == on_device(LLADA_8B, replace(FULL, cuda=False), 80).chunk
    assert logits_bytes(LLADA_8B, large) == large.chunk // head * head * (2 + 3 * 4)
    assert logits_bytes(LLADA_8B, small) == CHUNK_ELEMENTS // head * head * (2 + 3 * 4)
    few = replace(FULL, train_rows=1, eval_rows=1)
    assert logits_bytes(LLADA_8B, on_device(LLADA_8B, few, 80)) == rows // 24 * head * (2 + 3 * 4)
    # the loss has its own, which depends on no card
    assert memory_plan(LLADA_8B, large).logits == memory_plan(LLADA_8B, FULL).logits


def test_costs_of_a_recipe_with_auto_are_those_of_all_canvases() -> None:
    recipe = load_recipe("sudoku-mini")
    assert recipe.train.max_canvases == "auto"
    assert step_cost(recipe) == step_cost(load_recipe("sudoku-mini", ["train.max_canvases=4096"]))


@pytest.mark.parametrize("value", ["0", "-3", "many", "2.5", "true", "null"])
def test_what_is_no_count_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1, or auto, got"):
        load_recipe("sudoku-mini", [f"train.max_canvases={value}"])


def test_merged_rollouts_need_the_adapted_weights_once_more_while_they_last() -> None:
    shape = LLADA_8B
    plain = memory_plan(shape, LORA)
    merged = memory_plan(shape, replace(LORA, merged=True))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    sums = 3 * 4096 * 12288 * 4
    assert merged.rollout - plain.rollout == 2 * linear + sums
    assert (merged.update, merged.step, merged.stays) == (plain.update, plain.step, plain.stays)
    some = memory_plan(shape, replace(LORA, merged=True, roles=("q", "v")))
    bare = memory_plan(shape, replace(LORA, roles=("q", "v")))
    assert some.rollout - bare.rollout == 2 * 32 * 2 * 4096**2 + sums
    recipe = load_recipe("sudoku-mini", ["model.lora.merge_rollout=true"])
    assert Setup.of(recipe, mini_shape()).merged
