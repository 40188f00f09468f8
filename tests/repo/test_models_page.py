"""docs/models.md: its adapter runs as printed and gives right numbers; its command, names and
settings exist.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unmaskrl as u
from tests.conftest import seeded
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.rng import named_generator
from unmaskrl.models.families import FAMILIES, known_names
from unmaskrl.models.loading import open_checkpoint
from unmaskrl.models.probe import masked_accuracy
from unmaskrl.models.tokenizer import encode_prompt, encode_reference
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.setup import PROBE_PROBLEMS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def blocks(heading: str, language: str) -> list[str]:
    section = PAGE.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's code defines."""
    adapter, usage = blocks("A model of another library", "python")
    assert adapter.strip().count("\n") <= 30
    names: dict[str, Any] = {}
    with torch.random.fork_rng():  # transformers draws weights from the global generator
        torch.manual_seed(0)
        exec(compile(adapter + usage, str(PAGE), "exec"), names)
    with torch.no_grad():  # BERT starts almost uniform
        for parameter in names["den"].model.parameters():
            parameter.mul_(5.0 if parameter.ndim == 2 else 1.0)
    return names


def test_the_usage_on_the_page_gives_log_probs(page: dict[str, Any]) -> None:
    rollout = page["rollout"]
    logps = page["logps"]
    assert logps.shape == rollout.ids.shape and logps.requires_grad
    want = torch.where(rollout.action_mask, rollout.behavior_logps, 0.0)
    assert (logps - want).abs().max() < 1e-5 and want.sum() < -10
    # a left pad is among the rows
    assert page["canvas"].attention_mask[1].tolist() == [False] + [True] * 10


@pytest.mark.parametrize("shift", [0, 1])
def test_the_adapter_decodes_and_scores_a_foreign_model(page: dict[str, Any], shift: int) -> None:
    model = page["den"].model
    den = page["Foreign"](model, mask_id=39, eos_id=38, pad_id=37, vocab_size=40, shift=shift)
    assert isinstance(den, Denoiser)
    canvas = u.blank_canvas([[5, 6, 7], [8, 9]] * 8, gen_length=8, denoiser=den)
    settings: dict[str, Any] = {"block_length": 8, "steps": 4, "select": "entropy", "exit_at": 0.75}
    rollout = u.decode(den, canvas, temperature=1.0, generator=seeded(), **settings)
    exact = u.estimators.trajectory()
    logps = u.token_logps(den, rollout, exact, exact.make_views(rollout, 39, seeded()))
    assert (
        logps - torch.where(rollout.action_mask, rollout.behavior_logps, 0.0)
    ).abs().max() < 1e-5
    assert int(rollout.nfe.max()) == 4 and bool(rollout.exit_mask.any())
    by_hand = replayed(model, rollout, shift)
    assert (logps - by_hand).abs().max() < 1e-4
    assert (by_hand - replayed(model, rollout, 1 - shift)).abs().max() > 0.1


def replayed(model: Any, rollout: u.Rollout, shift: int) -> Tensor:
    """Log-probs of each row from the bare model, without pads, call by call."""
    out = torch.zeros(rollout.ids.shape)
    for b in range(len(rollout.ids)):
        start = int((~rollout.attention_mask[b]).sum())
        for call in range(1, int(rollout.nfe[b]) + 1):
            canvas = torch.where(rollout.decoded_step[b] < call, rollout.ids[b], 39)[start:]
            with torch.no_grad():
                logits = model(input_ids=canvas[None]).logits[0]
            logits[:, 39] = -torch.inf
            for i in (
                ((rollout.decoded_step[b] == call) & rollout.action_mask[b])
                .nonzero()
                .flatten()
                .tolist()
            ):
                out[b, i] = logits[i - start - shift].log_softmax(-1)[rollout.ids[b, i]]
    return out


def test_batches_and_pads_change_nothing_for_the_adapter(page: dict[str, Any]) -> None:
    den = page["den"]
    both = u.blank_canvas([[5, 6, 7, 8], [8, 9]], gen_length=6, denoiser=den)
    alone = u.blank_canvas([[8, 9]], gen_length=6, denoiser=den)
    with torch.no_grad():
        padded = den.logits(both.ids, both.attention_mask)[1, 2:]
        plain = den.logits(alone.ids)[0]
    assert (padded - plain).abs().max() < 1e-4


def test_the_command_and_the_names_on_the_page_exist() -> None:
    (command,) = blocks("Dry runs without weights", "")
    words = command.split()
    assert words[:2] == ["unmaskrl", "train"]
    assert load_recipe(words[2], words[3:]).model.random_init == "tiny"
    text = PAGE.read_text()
    assert set(re.findall(r"^\| `(\w+)` \| [\w-]+/", text, re.M)) == FAMILIES.keys()
    assert all(start.split("/")[0] in text for start in known_names())


def test_the_probe_table_is_what_the_probe_gives() -> None:
    rows = re.findall(r"^\| (mini|zero), (\w+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert len(rows) == 4
    for base, task_name, figures in rows:
        denoiser, tokenizer, _ = open_checkpoint(base)
        task = u.tasks.load(task_name)
        known = [e for e in task.examples("train")[:PROBE_PROBLEMS] if task.reference(e)]
        prompts = [encode_prompt(tokenizer, task.prompt(e)) for e in known]
        references = [encode_reference(tokenizer, task.reference(e) or "", [])[0] for e in known]
        probe = masked_accuracy(denoiser, prompts, references, named_generator(0, "probe"))
        measured = (probe.share, probe.chance, probe.share_shifted_left, probe.share_shifted_right)
        assert [float(x) for x in figures.split(" | ")] == pytest.approx(measured, abs=0.0051)
