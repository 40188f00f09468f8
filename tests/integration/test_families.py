"""Recipes on other families: dry runs with random weights, from nothing but a name or a
config.json; the probe in a run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmaskrl import load_denoiser, save_model
from unmaskrl.cli.main import main
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import Dream, LLaDA
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.loading import random_tiny
from unmaskrl.models.tokenizer import build_byte_tokenizer, copy_tokenizer
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.setup import start_run

TINY = (
    "train.steps=1 train.prompts_per_step=2 train.group_size=2 train.num_iterations=1 "
    "run.threads=1 run.log_with=[] "
    "eval.size=2 eval.size_during=2 decode.steps=10"
).split()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("a download was started")
    )


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("hub_id", ["GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"])
def test_a_dry_run_of_a_released_model_by_name(
    hub_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = [*TINY, f"run.out={out}", f"model.path={hub_id}", "model.random_init=tiny"]
    code, said = run(capsys, "train", "sudoku-mini", *settings)
    assert code == 0, said
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert row["health/behavior_gap"] < 1e-4
    model = load_denoiser(out / "model").model
    assert isinstance(model, LLaDA if "LLaDA" in hub_id else Dream)
    code, said = run(capsys, "eval", str(out / "model"), "--task", "sudoku", "--size", "2")
    assert code == 0, said
    before = (out / "model" / "model.safetensors").read_bytes()
    code, said = run(capsys, "train", "sudoku-mini", *settings, "--resume")
    assert code == 0, said
    assert (out / "model" / "model.safetensors").read_bytes() == before


def test_a_dry_run_of_a_folder_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dream"
    out = tmp_path / "run"
    folder.mkdir()
    build_byte_tokenizer(folder)
    shutil.copyfile(
        Path(__file__).parents[1] / "data" / "dream-tiny" / "config.json", folder / "config.json"
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(raw | {"mask_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    )
    settings = [*TINY, f"run.out={out}", f"model.path={folder}"]
    code, said = run(capsys, "train", "sudoku-mini", *settings)
    assert code == 2 and "holds neither model.safetensors nor" in said and not out.exists()
    code, said = run(capsys, "train", "sudoku-mini", *settings, "model.random_init=tiny")
    assert code == 0, said
    assert load_denoiser(out / "model").vocab_size == 512
    assert (out / "model" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_check_prices_a_released_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "check", "sudoku-mini", "model.path=GSAI-ML/LLaDA-8B-Instruct")
    assert code == 0 and "8015.58M parameters" in said
    code, said = run(capsys, "check", "sudoku-mini", "model.path=apple/DiffuCoder-7B-cpGRPO")
    assert code == 0 and "7615.62M parameters" in said


def test_a_threshold_head_has_the_width_of_either_family(tmp_path: Path) -> None:
    for family in ("llada", "Dream"):
        settings = [
            f"model.path={family}",
            "model.random_init=tiny",
            f"run.out={tmp_path / family}",
            "run.threads=1",
        ]
        sampler = start_run(
            load_recipe("diffpo-joint", settings), resume=False, force=False
        ).sampler
        assert sampler is not None and {
            p.shape[-1] for p in sampler.head.parameters() if p.ndim == 2
        } & {64}


def recipe_for(path: str, out: Path, *more: str) -> Any:
    return load_recipe(
        "countdown-mini", [f"model.path={path}", f"run.out={out}", "run.threads=1", *more]
    )


def test_a_run_refuses_shifted_logits_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = LLaDA.hidden

    def shifted(self: LLaDA, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return straight(self, ids, attention_mask).roll(1, 1)

    assert start_run(recipe_for("mini", tmp_path / "a"), resume=False, force=False).notes == []
    monkeypatch.setattr(LLaDA, "hidden", shifted)
    with pytest.raises(ValueError, match="logits look shifted by one"):
        start_run(recipe_for("mini", tmp_path / "b"), resume=False, force=False)
    assert not (tmp_path / "b").exists()
    assert (
        start_run(
            recipe_for("mini", tmp_path / "b", "run.probe=false"), resume=False, force=False
        ).notes
        == []
    )


def test_a_run_names_a_model_at_chance_and_goes_on(tmp_path: Path) -> None:
    model = random_tiny(str(ASSETS / "mini"), torch.Generator().manual_seed(0))
    save_model(ModelDenoiser.from_model(model).model, tmp_path / "model")
    copy_tokenizer(ASSETS / "mini", tmp_path / "model")
    recipe = recipe_for(str(tmp_path / "model"), tmp_path / "out")
    notes = start_run(recipe, resume=False, force=False).notes
    assert len(notes) == 1 and notes[0].startswith(
        f"model.path {tmp_path / 'model'}: masked-token accuracy 0."
    )


def test_a_family_from_outside_is_checked_trained_resumed_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that the package does not know: tests/own_family.py, copied."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "mine.py"
    shutil.copyfile(Path(__file__).parents[1] / "own_family.py", source)
    out = tmp_path / "run"
    own = f"model.family={source}:family"
    settings = [*TINY, f"run.out={out}", "model.path=bag", "model.random_init=tiny"]
    settings.append("train.reward_functions=[mine:count_letters]")
    code, said = run(capsys, "check", "sudoku-mini", *settings, own)
    assert code == 0 and "no memory plan: the model's family does not say" in said
    code, said = run(capsys, "check", "sudoku-mini", *settings)
    assert code == 2 and "bag is not a folder" in said
    code, said = run(capsys, "train", "sudoku-mini", *settings, own)
    assert code == 0 and "no memory plan" in said, said
    with pytest.raises(ValueError, match="model_type 'bag'; shipped families: llada, Dream"):
        load_denoiser(out / "model")
    assert load_denoiser(out / "model", family=f"{source}:family").vocab_size == 262
    code, said = run(capsys, "train", "sudoku-mini", *settings, own, "train.steps=2", "--resume")
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    code, said = run(capsys, "eval", str(out), "--task", "sudoku", "--size", "2")
    assert code == 2 and "(another is named by model.family or --family" in said
    own_eval = ["eval", str(out), "--task", "sudoku", "--family", f"{source}:family"]
    code, said = run(capsys, *own_eval, "--size", "2", "--dtype", "auto", "--device", "cpu")
    assert code == 0, said
    decode = "eval_decode={sudoku: {gen_length: 20, block_length: 20, steps: 2}}"
    learn = ["train.steps=1", "model.random_init=tiny", "run.log_with=[]", "run.threads=1", decode]
    learn += ["model.path=bag", "data.0.num_examples=8", "data.0.gen_length=200", own]
    part = "data=[{task: {name: sudoku, eval_size: 2}, gen_length: 200, batch_size: 4}]"
    code, said = run(capsys, "sft", "mini-base", part, *learn, f"run.out={tmp_path / 'sft'}")
    assert code == 0 and "sudoku, greedy" in said, said
    model = [*TINY, f"model.path={out}", own, "run.probe=false", f"run.out={tmp_path / 'on'}"]
    code, said = run(capsys, "train", "sudoku-mini", *model)
    assert code == 0, said
