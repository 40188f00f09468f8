"""u.load and u.evaluate: what a user gets of a name, a folder or a run, and how it reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import unmaskrl as u
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import encode_prompt


@pytest.fixture(scope="module")
def mini() -> u.Model:
    return u.load("mini", device="cpu")


def test_a_shipped_name_a_folder_and_a_run_are_the_same_model(
    mini: u.Model, tmp_path: Path
) -> None:
    shutil.copytree(ASSETS / "mini", tmp_path / "run" / "model")
    ids = torch.arange(12)[None]
    for path in (ASSETS / "mini", tmp_path / "run"):
        other = u.load(path, device="cpu")
        assert torch.equal(other.denoiser.logits(ids), mini.denoiser.logits(ids))
        assert other.decode_settings == mini.decode_settings
    assert mini.decode_settings["sudoku"]["gen_length"] == 20 and mini.head is None
    text = repr(mini)
    assert text.startswith("Model(LLaDA, 0.") and "float32 on cpu, decode settings for" in text


def test_dtype_auto_is_what_the_checkpoint_has(mini: u.Model, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        folder = tmp_path / str(dtype)
        shutil.copytree(ASSETS / "mini", folder)
        u.save_model(mini.denoiser.model, folder, dtype)
        assert next(u.load(folder, dtype="auto").denoiser.model.parameters()).dtype == dtype
        assert next(u.load(folder).denoiser.model.parameters()).dtype == torch.float32
    assert next(u.load("mini", dtype=torch.float64).denoiser.model.parameters()).dtype.itemsize == 8


def test_blocks_in_four_bits(mini: u.Model) -> None:
    pytest.importorskip("bitsandbytes")
    small = u.load("mini", device="cpu", quantize="nf4")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exact = mini.denoiser.logits(ids)
        error = (small.denoiser.logits(ids) - exact).norm() / exact.norm()
    assert 0 < error < 0.5
    assert len(u.evaluate(small, "sudoku", size=2).items) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or mps, got 'tpu'"),
        ({"device": "mps"}, "sees no mps; use cpu"),
        ({"dtype": "int8"}, "dtype: expected float32, bfloat16, float64 or auto, got 'int8'"),
        ({"quantize": "gguf"}, "quantize: expected nf4 or nothing, got 'gguf'"),
        ({"family": "lada"}, "family: unknown 'lada'; did you mean 'llada'"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, str], said: str) -> None:
    if settings.get("device") == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=said) as caught:
        u.load("mini", **settings)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_evaluate_is_the_commands_own(mini: u.Model) -> None:
    result = u.evaluate(mini, "sudoku", size=6)
    assert len(result.items) == 6 and result.decode["exit_at"] == 0.85
    assert repr(result).startswith(f"EvalResult({100 * result.accuracy:.1f}% right [")
    assert "6 problems, " in repr(result)
    slow = u.evaluate(mini, u.tasks.load("sudoku"), size=6, exit_at=None, steps=10)
    assert {item.nfe for item in slow.items} != {item.nfe for item in result.items}
    with pytest.raises(ValueError, match="block_length 7 does not divide gen_length 20"):
        u.evaluate(mini, "sudoku", size=6, block_length=7)
    several = u.evaluate(mini, "sudoku", size=2, temperature=1.0, samples=2)
    assert "2 problems x 2 samples" in repr(several)


def test_a_rollout_shows_itself_in_a_notebook(mini: u.Model) -> None:
    den = mini.denoiser
    prompt = encode_prompt(mini.tokenizer, u.tasks.load("sudoku").prompt(
        u.tasks.load("sudoku").examples("test")[0]))  # fmt: skip
    canvas = u.anchored_canvas([prompt, prompt], [{}, {0: 7}], gen_length=20, denoiser=den)
    assert repr(canvas) == f"Canvas(2 rows, {len(prompt)} + 20 tokens, 1 anchors)"
    rollout = u.decode(den, canvas, block_length=10, steps=20)
    assert repr(rollout).startswith("Rollout(2 rows, 20 completion tokens, 1 anchors, ")
    page = rollout._repr_html_()
    assert page.count("row 0, ") == page.count("row 1, ") == 1 and "background:#" in page
    words = mini.tokenizer.batch_decode([[i] for i in rollout.ids[0, -20:].tolist()])
    assert all(f">{word.strip() or word}<" in page for word in words if word.isalnum())
    assert "given" in page and "http" not in page
    toy = ToyDenoiser.random(torch.Generator().manual_seed(0))
    many = u.blank_canvas([[0]] * 9, gen_length=4, denoiser=toy)
    page = u.decode(toy, many, block_length=4, steps=4)._repr_html_()
    assert "and 1 more rows" in page and "row 7, 4 calls" in page and "row 8" not in page
