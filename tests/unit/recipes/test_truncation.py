"""decode.top_k and decode.top_p in recipes, decode.json and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import seeded, tiny_llada
from tests.open_steps import restored
from unmaskrl.cli.main import main
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.rollouts import LocalRollouts
from unmaskrl.evaluation.decode_settings import checked_decode
from unmaskrl.recipes.checks import warnings_for
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.registry import settings_at

BOTH = ["decode.top_k=20", "decode.top_p=0.9"]


def test_wrong_values_are_refused_in_one_line() -> None:
    for word in ("top_k=0", "top_k=true", "top_k=2.5", "top_p=0", "top_p=1.1", "top_p=.nan"):
        key = word.split("=")[0]
        with pytest.raises(ValueError, match=rf"^decode\.{key}: [^\n]* got [^\n]*$"):
            load_recipe("sudoku-mini", [f"decode.{word}"])


def test_what_scores_draws_needs_a_bound_on_the_ids() -> None:
    draws = ["estimator.name=trajectory", "decode.select=entropy"]
    for word in ("decode.top_p=0.9", "decode.top_k=513"):
        with pytest.raises(ValueError, match=r"set decode\.top_k to at most 512"):
            load_recipe("espo", [*draws, word])
    recipe = load_recipe("espo", [*draws, *BOTH])
    assert not [note for note in warnings_for(recipe) if "top_k" in note]
    load_recipe("espo", [*draws, "decode.top_p=1"])
    notes = [note for note in warnings_for(load_recipe("espo", BOTH)) if "top_k" in note]
    assert len(notes) == 1 and "scores are of the policy over all" in notes[0]


def test_settings_reach_the_engine_and_a_checkpoint() -> None:
    config = checked_decode(None, {"gen_length": 4, "block_length": 4, "steps": 4, "top_k": 3})
    assert (config.model_dump()["top_k"], config.top_p) == (3, None)
    den = tiny_llada()
    canvas = blank_canvas([[1, 2], [3]], gen_length=4, denoiser=den)
    rollout = LocalRollouts(den).sample(canvas, settings_at(config, 1.0), seeded())
    assert rollout.kept is not None and rollout.kept.shape == (2, 4, 3)
    again = restored(rollout)
    assert (again.top_k, again.top_p) == (3, None)
    assert again.kept is not None and again.kept.equal(rollout.kept)


def test_the_flags_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one token there is no choice: hot decoding is greedy."""
    monkeypatch.chdir(tmp_path)
    words = ["sample", "mini", "--task", "sudoku", "--threads", "1", "decode.steps=10"]
    assert main(words) == 0
    greedy = capsys.readouterr().out
    assert main([*words, "--temperature", "3", "--top-k", "1"]) == 0
    assert (
        capsys.readouterr().out.replace("T=3", "T=0").split("\n")[3:-1]
        == (greedy.split("\n")[3:-1])
    )
    assert main([*words, "--temperature", "1", "--top-p", "1.5"]) == 2
    assert "top_p is a probability" in capsys.readouterr().err
