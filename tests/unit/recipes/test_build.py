"""Which combinations of settings are refused, with what to change; which are only warned about;
what a recipe costs.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import finished_rollout, seeded, tiny_llada
from unmaskrl.core.scoring import count_canvases
from unmaskrl.recipes.checks import check_blocks, warnings_for
from unmaskrl.recipes.cost import step_cost
from unmaskrl.recipes.files import is_method, recipe_names
from unmaskrl.recipes.load import load_method, load_recipe
from unmaskrl.recipes.registry import build_method
from unmaskrl.training.rollouts.collect import most_calls

METHODS = [name for name in recipe_names() if is_method(name)]
IN_ORDER = ["estimator.name=left_to_right", "decode.gamma=null", "decode.select=left_to_right"]
PRUNED = ["prior.name=anchors", "decode.exit_at=0.95"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("tracerl", ["train.num_iterations=1"], "that KL is 0.*use kl_to=ref, or more iterations"),
        (
            "spg_mix",
            ["loss.name=token_clip"],
            "a bound does not give; use loss.name=reinforce, or estimator.name=elbo",
        ),
        ("spg_eubo", ["loss={name: linear_bound}"], "estimator sandwich bounds log-likelihoods"),
        ("spg_mix", ["loss.kl_coef=0.1"], "estimator sandwich has no KL.*set loss.kl_coef=0"),
        (
            "spg_mix",
            ["estimator.block_length=32"],
            "block_length 32 does not divide decode.gen_length 20.*mask=random",
        ),
        ("spg_mix", ["estimator.block_length=7"], "block_length 7 does not divide"),
        (
            "wd1",
            ["loss={name: sequence_clip}"],
            "weighs log-likelihoods; use loss.name=reinforce, not sequence_clip",
        ),
        (
            "d2_stepmerge",
            ["estimator.num_segments=16"],
            "num_segments 16 exceeds the 10 calls of a rollout; lower it",
        ),
        ("d2_stepmerge", ["estimator.shrink=2"], "num_segments and shrink both say"),
        (
            "tracerl",
            [*PRUNED, "estimator.hide_anchors=true"],
            r"estimator\.hide_anchors: trajectory has no such setting",
        ),
        ("stp", ["prior.keep=0"], "nothing is anchored"),
        (
            "elbo_grpo",
            ["decode.select=confidence_threshold", "decode.gamma=1.5"],
            r"gamma of select='confidence_threshold' is a probability, in \[0, 1\]; got 1.5",
        ),
        (
            "diffpo-2mf-is",
            ["decode.select=confidence", "decode.gamma=null"],
            "which token is revealed then depends on the draw",
        ),
        ("diffpo-mf-is", ["estimator.p_mask_prompt=0.15"], "set estimator.p_mask_prompt=0"),
        *(
            (
                "diffpo-2mf-is",
                [f"estimator.name={name}"],
                f"is_cap with estimator {name}: its token scores are no probab",
            )
            for name in ("elbo", "espo", "coupled", "gauss", "unigrpo")
        ),
        (
            "diffpo-2mf-is",
            ["estimator={name: elbo, visible: true}"],
            "are no probabilities of the drawn tokens",
        ),
        (
            "diffpo-2mf-is",
            ["estimator={name: trajectory, p_mask_prompt: 0.1}"],
            "set estimator.p_mask_prompt=0",
        ),
        (
            "diffpo-2mf-is",
            ["estimator.name=left_to_right"],
            "set decode.select=left_to_right decode.steps=<gen_length>",
        ),
        (
            "diffpo-2mf-is",
            [*IN_ORDER, "decode.exit_at=0.9"],
            "tokens one by one in reading order, and rollouts",
        ),
        (
            "diffpo-2mf-is",
            [*IN_ORDER, "decode.steps=10"],
            "tokens one by one in reading order, and rollouts",
        ),
        ("diffpo-2mf-is", ["loss.is_cap=0.5"], "must be at least 1, got 0.5"),
        ("diffpo-joint", ["sampler.gammas=[0.1, 1]"], "sampler.gammas must start with 0"),
        ("diffpo-joint", ["sampler.gammas=[0, 1, 0.5]"], "and increase"),
        (
            "diffpo-joint",
            ["sampler.start=0.2"],
            "sampler.start is the gamma that training begins with",
        ),
        ("diffpo-joint", ["decode.gamma=0.1"], "set decode.select=eb decode.gamma=null"),
        ("diffpo-sampler", ["decode.select=confidence_threshold"], "needs decode.gamma"),
        ("elbo_grpo", ["decode.gamma=0.1"], "has a quota: set gamma=null"),
        ("stp", ["prior.keep_end=0", "prior.adapt_to=0.4"], "both steer prior.keep"),
        ("elbo_grpo", ["decode.temperature=0"], "all rollouts of a group would be the same"),
        (
            "elbo_grpo",
            ["estimator.num_mc=3", "estimator.antithetic=true"],
            "estimator elbo: antithetic views come in pairs",
        ),
        ("espo", ["loss.normaliser=mean"], "loss sequence_clip: normaliser must be one of"),
        ("rloo", ["advantage.name=leave_one"], "unknown 'leave_one'; did you mean 'leave_one_out'"),
    ],
)
def test_refused_combinations_say_what_to_change(
    recipe: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_recipe(recipe, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["estimator={name: two_mean_field, num_times: 3}"],
        ["estimator={name: mean_field, p_mask_prompt: 0.0}"],
        ["estimator.name=trajectory"],
        ["estimator={name: trajectory, num_segments: 2}"],
        IN_ORDER,
        [*IN_ORDER, "prior.name=anchors", "estimator.hide_anchors=true", "decode.exit_at=1"],
    ],
    ids=str,
)
def test_importance_weights_go_with_probabilities_of_the_drawn_tokens(overrides: list[str]) -> None:
    assert load_recipe("diffpo-2mf-is", overrides).loss["is_cap"] == 2.0


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("elbo_grpo", ["loss.kl=k1"], "pulls nowhere on average"),
        ("stp", [], "saves nothing: a blank rollout takes 11 calls with it and 10 without"),
        ("tracerl", [], "looks at the drawn tokens"),
        ("unigrpo", ["train.num_iterations=1"], "spreads its masking rate over the inner updates"),
        ("justgrpo", ["decode.select=entropy"], "one token at a time in reading order"),
        ("justgrpo", ["decode.exit_at=0.8"], "one token at a time in reading order"),
        ("elbo_grpo", ["estimator.hide_anchors=true"], "does nothing without anchors"),
        ("elbo_grpo", ["decode.block_length=20", "decode.exit_at=0.5"], "one full-length block"),
        ("sudoku-mini", ["model.dtype=bfloat16", "optimizer.lr=3e-6"], "most updates of this size"),
    ],
)
def test_odd_combinations_are_named(recipe: str, overrides: list[str], words: str) -> None:
    assert any(words in note for note in warnings_for(load_recipe(recipe, overrides)))


@pytest.mark.parametrize("name", METHODS)
def test_shipped_presets_are_quiet_but_for_what_the_papers_do(name: str) -> None:
    notes = warnings_for(load_recipe(name))
    assert len(notes) == (name in ("stp", "tracerl", "d2_stepmerge"))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "igpo"])
def test_two_keys_give_the_stp_version(name: str) -> None:
    recipe = load_recipe(name, PRUNED)
    assert (
        recipe.prior.name == "anchors"
        and recipe.prior.keep == 0.1
        and not recipe.estimator.get("hide_anchors")
    )
    assert recipe.prior.select == "most_predictable" and recipe.decode.exit_at == 0.95
    hidden = [*PRUNED, "estimator.hide_anchors=true"]
    if recipe.estimator["name"] == "trajectory":
        with pytest.raises(ValueError, match="trajectory has no such setting"):
            load_recipe(name, hidden)
    else:
        assert load_recipe(name, hidden).estimator["hide_anchors"]


def test_a_step_is_split_by_policy_and_update() -> None:
    cost = step_cost(load_recipe("diffu_grpo"))
    rows = 16 * 6
    assert (cost.rollout, cost.old, cost.ref, cost.new) == (rows * 10, rows * 7, rows * 8, rows * 8)
    assert (
        cost.per_update(cost.rollout) == 120
        and cost.per_update(cost.old) == 84
        and cost.per_update(cost.new) == 96
    )
    assert cost.forwards == 960 + 672 + 768 + 3 * 768
    assert cost.logits_bytes == 4 * rows * 20 * 120
    pruned = step_cost(load_recipe("elbo_grpo", [*PRUNED, "decode.steps=20"]))
    # one more view for the exit call
    assert pruned.rollout == rows * 18 and pruned.new == rows * 4 * 4
    assert step_cost(load_recipe("wd1")).old == step_cost(load_recipe("wd1")).ref == 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("diffu_grpo", ["estimator.p_mask_prompt=0.0"]),
        ("diffu_grpo", ["estimator.share_prompt_mask=true"]),
        ("diffu_grpo", []),
        ("coupled_grpo", []),
        ("justgrpo", []),
        ("tracerl", []),
        ("d2_stepmerge", []),
        ("elbo_grpo", []),
    ],
)
def test_counted_canvases_are_those_that_are_run(name: str, overrides: list[str]) -> None:
    """Two groups of three rows of 20 tokens, one token a call: canvases that a group shares count
    once.
    """
    size = [
        "train.prompts_per_step=2",
        "train.group_size=3",
        "train.num_iterations=2",
        "decode.steps=20",
    ]
    recipe = load_recipe(name, [*size, *overrides])
    denoiser = tiny_llada()
    length = 20
    ids = torch.randint(0, 11, (6, length), generator=seeded(1))
    ids[:, 0] = torch.arange(6)  # no two rows begin alike
    done = finished_rollout(
        ids.tolist(),
        [list(range(1, length + 1))] * 6,
        eos_id=denoiser.eos_id,
        prompt=40,
        row_ids=list(range(6)),
    )
    done.ids[3:, 0] = 1  # another prompt
    done.group_ids[3:] = 1
    views = build_method(recipe).estimator.make_views(done, denoiser.mask_id, seeded(2))
    assert step_cost(recipe).new == 2 * count_canvases(done, views)


def test_a_block_causal_model_cuts_its_last_block() -> None:
    """gen_length need not be a multiple of its block; of another model's block it must be."""
    recipe, method = load_method(
        "sdar-8b-gsm8k-dipo", ["decode.gen_length=254", "decode.steps=254"]
    )
    check_blocks(recipe, method, 4)
    # at most: three tokens of the prompt, then one of the completion, and 64 whole blocks
    assert step_cost(recipe, method).rollout_per_row == 1 + 64 * 4
    with pytest.raises(ValueError, match="block_length 4 does not divide gen_length 254"):
        check_blocks(recipe, method, None)


def test_exits_are_of_the_blocks_of_a_block_causal_model() -> None:
    """Two tokens of a block of four one by one, then the rest: 3 calls, which are a row's views."""
    words = [
        "decode.gen_length=256",
        "decode.steps=256",
        "decode.select=entropy",
        "decode.gamma=null",
    ]
    plain = step_cost(load_recipe("sdar-8b-gsm8k-dipo", words))
    recipe, method = load_method("sdar-8b-gsm8k-dipo", [*words, "decode.exit_at=0.5"])
    check_blocks(recipe, method, 4)
    cost = step_cost(recipe, method)
    # at most: one token of the prompt, then three of the completion, and 64 blocks
    assert cost.rollout_per_row == 65 * 3 == most_calls(recipe.decode, 4)
    assert cost.new * 4 == plain.new * 3
    assert not [note for note in warnings_for(recipe, method, 4) if "exit_at" in note]
    late, method = load_method("sdar-8b-gsm8k-dipo", [*words, "decode.exit_at=0.9"])
    (note,) = [note for note in warnings_for(late, method, 4) if "exit_at" in note]
    assert "saves nothing: a blank rollout takes 256 calls with it and 256 without" in note


@pytest.mark.parametrize(
    "setting", ["train.steps=true", "train.ema=false", "prior.chunk=[true,2]", "decode.top_k=true"]
)
def test_a_truth_value_is_no_number(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"{setting.split('=')[0]}.*true and false"):
        load_recipe("sudoku-mini", [setting])


def test_truth_values_stay_what_they_are() -> None:
    recipe = load_recipe("sudoku-mini", ["prior.adapt_share=true", "run.probe=false"])
    assert recipe.prior.adapt_share is True and recipe.run.probe is False
