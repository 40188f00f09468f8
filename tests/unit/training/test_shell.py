"""Schedules, logs, recipes, costs, the supervised loss: the parts of the shell that can be checked
by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml

from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families.llada import LLaDA, LLaDAConfig
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import load_tokenizer
from unmaskrl.recipes.checks import warnings_for
from unmaskrl.recipes.cost import open_blocks, step_cost
from unmaskrl.recipes.load import build_recipe, load_recipe
from unmaskrl.recipes.optimizers import learning_rate
from unmaskrl.recipes.registry import component, make_task
from unmaskrl.recipes.schema import OptimizerConfig, Recipe
from unmaskrl.training.folder.config import check_changes, read_config
from unmaskrl.training.folder.run_folder import cut_log
from unmaskrl.training.rollouts.anchors import Anchors
from unmaskrl.training.rollouts.problems import Problems
from unmaskrl.training.sft.loss import masked_loss
from unmaskrl.utils.files import read_jsonl


def tiny_model() -> ModelDenoiser:
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 16}
    ids = {
        "vocab_size": 12,
        "embedding_size": 12,
        "mask_token_id": 11,
        "eos_token_id": 10,
        "pad_token_id": 10,
    }
    model = LLaDA(LLaDAConfig(**sizes, **ids)).init_weights(torch.Generator().manual_seed(0))
    return ModelDenoiser.from_model(model.eval())


def test_learning_rate() -> None:
    def rate(update: int, share_done: float, schedule: Literal["constant", "linear", "cosine"]):
        config = OptimizerConfig(lr=8.0, warmup=4, schedule=schedule)
        return learning_rate(config, update, share_done)

    assert [rate(update, 0.0, "constant") for update in range(6)] == [2, 4, 6, 8, 8, 8]
    assert rate(9, 0.25, "linear") == 6
    assert rate(9, 0.5, "cosine") == pytest.approx(4)
    assert rate(9, 1.0, "cosine") == 0


def test_logs_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert cut_log(path, 9) == []
    assert path.read_text() == '{"a": 1}\n'


def test_masked_loss_is_the_elbo_per_token() -> None:
    """Mean over many draws == enumeration over counts and subsets of a 3-token completion."""
    denoiser = tiny_model()
    prompt = torch.tensor([[1, 2]])
    answer = torch.tensor([[3, 4, 10]])
    exact = 0.0
    for bits in range(1, 8):
        masked = torch.tensor([[bool(bits >> i & 1) for i in range(3)]])
        count = int(masked.sum())
        subsets = {1: 3, 2: 3, 3: 1}
        ids = torch.cat([prompt, torch.where(masked, 11, answer)], 1)
        logps = (
            denoiser.logits(ids)[:, -3:].log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)
        )
        exact -= float((logps * masked).detach().sum()) / count / subsets[count] / 3
    rows = 3000
    many = [t.expand(rows, -1) for t in (prompt, torch.ones_like(prompt).bool(), answer)]
    draws = [
        float(masked_loss(denoiser, *many, torch.Generator().manual_seed(s)).detach())
        for s in range(6)
    ]
    assert sum(draws) / 6 == pytest.approx(exact, abs=4e-3)


def test_problems_cover_an_epoch_before_they_repeat() -> None:
    recipe = load_recipe("sudoku-mini", ["task.train_size=20", "train.prompts_per_step=8"])
    problems = Problems(recipe, make_task(recipe.task), load_tokenizer(ASSETS / "mini"), 4096)
    seen = [i for step in range(5) for i in problems.indices(step)]
    assert sorted(seen[:20]) == list(range(20)) and sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert problems.indices(3) == problems.indices(3)


def anchors(*overrides: str) -> Anchors:
    recipe = load_recipe("countdown-zero-elbo", ["prior.name=anchors", *overrides])
    return Anchors(
        recipe,
        Problems(recipe, make_task(recipe.task), load_tokenizer(ASSETS / "mini"), 4096),
        tiny_model(),
    )


def test_keep_is_annealed_or_adapted() -> None:
    fading = anchors("prior.keep=0.4", "prior.keep_end=0.0", "prior.anneal_until=0.5")
    assert [fading.keep(s) for s in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    steered = anchors("prior.keep=0.4", "prior.adapt_to=0.5")
    steered.adapt(0.9)
    assert steered.keep(0.0) == pytest.approx(0.4 - 0.3 * 0.4)
    steered.adapt(0.0)
    assert steered.keep(1.0) == pytest.approx(0.4)  # never above where it began
    with pytest.raises(ValueError, match=r"keep_end and prior\.adapt_to"):
        anchors("prior.keep_end=0.0", "prior.adapt_to=0.5")


def test_cost_counts_what_a_step_does() -> None:
    recipe = load_recipe(
        "sudoku-mini-elbo", ["loss.kl_coef=0.04", "train.prompts_per_step=2", "train.group_size=3"]
    )
    cost = step_cost(recipe)
    assert (cost.rollout_per_row, cost.rollout) == (20, 120)
    assert (cost.old, cost.ref, cost.new) == (6 * 3 * 3, 6 * 3 * 4, 6 * 3 * 4)
    assert cost.forwards == 120 + 54 + 72 + 3 * 72
    assert step_cost(load_recipe("sudoku-mini-elbo")).ref == 0
    assert open_blocks(load_recipe("sudoku-mini-elbo"), 0.25) == [8, 7]


def test_parameters_are_counted_from_the_config_alone() -> None:
    from unmaskrl import load_denoiser
    from unmaskrl.models.hub import ASSETS

    model = load_denoiser(ASSETS / "mini").model
    assert step_cost(load_recipe("sudoku-mini")).parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_exit_with_one_block_is_warned_about() -> None:
    data = {
        "task": {"name": "sudoku"},
        "decode": {"gen_length": 20, "block_length": 20, "steps": 20, "exit_at": 0.9},
    }
    assert any("block_length" in note for note in warnings_for(build_recipe(data)))
    data["decode"]["block_length"] = 10
    assert not warnings_for(build_recipe(data))


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "task: [\n"])
def test_broken_yaml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.yaml"):
        load_recipe(str(path))


def test_overrides_are_typed() -> None:
    recipe: Recipe = load_recipe(
        "sudoku-mini",
        ["optimizer.lr=1e-3", "decode.exit_at=null", "run.log_with=[]", "prior.keep=0.3"],
    )
    assert (recipe.optimizer.lr, recipe.decode.exit_at, recipe.run.log_with, recipe.prior.keep) == (
        1e-3,
        None,
        (),
        0.3,
    )


def test_another_component_drops_the_settings_of_the_one_it_replaces() -> None:
    recipe: Recipe = load_recipe(
        "diffu_grpo", ["estimator.name=elbo", "estimator.num_mc=2", "loss.name=token_clip"]
    )
    assert recipe.estimator == {"name": "elbo", "num_mc": 2}  # p_mask_prompt was mean_field's
    assert recipe.loss["clip_low"] == 0.5  # the same component keeps its settings


def test_a_wrong_type_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"loss f: \{'x': 'two'\} has a setting of the wrong type"
    ) as error:
        component({"name": "f", "x": "two"}, {"f": lambda x: x < 1}, "loss")
    assert "\n" not in str(error.value)


def test_resume_takes_defaults_for_settings_that_are_newer_than_the_run(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe("sudoku-mini")
    stored = recipe.model_dump(mode="json")
    del stored["sampler"], stored["run"]["variance_draws"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    path = tmp_path / "config.yaml"
    assert check_changes(recipe, read_config(path), path) == []
    other = load_recipe("sudoku-mini", ["decode.select=eb", "sampler.mode=joint"])
    with pytest.raises(ValueError, match=r"sampler\.mode"):
        check_changes(other, read_config(path), path)
