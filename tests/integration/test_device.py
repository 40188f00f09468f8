"""A run on a pretend accelerator: every tensor that meets the model's is where the model is, after
a resume too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.pretend_device import DEVICE, pretend_device
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.loop import train

SETTINGS = (
    "model.random_init=tiny train.steps=1 train.prompts_per_step=2 train.group_size=2 "
    "train.num_iterations=2 run.threads=1 "
    "run.log_with=[] decode.gen_length=4 decode.block_length=4 decode.steps=2 eval.size=1 "
    "eval.size_during=1 "
    "task.train_size=8 task.eval_size=4 run.save_every=1 run.keep_checkpoints=3 "
    "run.variance_draws=2 model.lora.rank=2"
).split()
METHODS = {
    "llada-8b-countdown-stp": "prior.adapt_share=true prior.share=0.5 train.num_prompts=2".split(),
    "dream-7b-countdown-diffpo": (
        "model.lora=null train.ema=0.9 train.shuffle_advantages=true".split()
    ),
}


class There(Accelerator):
    @property
    def device(self) -> torch.device:
        return DEVICE


def test_the_pretend_device_refuses_what_a_gpu_refuses() -> None:
    with pretend_device() as device:
        x = torch.ones(3).to(device)
        here = torch.ones(3)
        with pytest.raises(RuntimeError, match="meet tensors on the device"):
            x + here
        with pytest.raises(RuntimeError, match="meet tensors on the device"):
            here[torch.tensor([0], device=device)]
        with pytest.raises(RuntimeError, match="CPU generator"):
            torch.rand(2, device=device, generator=torch.Generator())
        assert (x + 1)[torch.tensor([0])].tolist() == [2.0] and (x.cpu() + here).tolist() == [
            2.0
        ] * 3


@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_a_device_and_its_resume_inside_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmaskrl.training.setup.Accelerator", There)
    # builds the full-size model without memory
    monkeypatch.setattr("unmaskrl.training.loop.memory_notes", lambda run: [])
    recipe = load_recipe(name, [*SETTINGS, *METHODS[name], f"run.out={tmp_path / 'run'}"])
    with pretend_device():
        train(recipe)
        # the first was taken inside the step
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "update-000002")
        train(recipe, resume=True)
    (row,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["updates"] == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == str(DEVICE)
