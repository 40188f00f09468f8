"""Two gloo processes train to the weights of one: whole groups per rank, summed gradients, sharded
weights, adapters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.runs import ended, two_ranks
from unmaskrl.cli.main import main
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import asset

SETTINGS = (
    "model.dtype=float64 train.steps=2 train.prompts_per_step=4 train.group_size=4 "
    "train.num_iterations=2 run.threads=1 "
    "run.log_with=[] run.save_every=2 run.probe=false task.train_size=20 "
    "eval.size=4 eval.size_during=4 decode.select=eb "
    "sampler.mode=joint "
    "prior.name=anchors prior.adapt_share=true prior.share=0.5 prior.keep_end=null "
    "prior.adapt_to=0.5 train.num_prompts=4 "
    "train.max_canvases=7"
).split()
ADAPTERS = ("model.lora.rank=4", "loss.kl_coef=0.01", "run.save=merged")
COMPARED = (
    "loss grad_norm reward/mean nfe/mean groups/live sampler/entropy sampler/grad_norm calls/total "
    "prior/share prior/keep"
).split()


def words(out: Path, *settings: str) -> list[str]:
    return ["train", "sudoku-mini", *SETTINGS, *settings, f"run.out={out}", "--quiet"]


def train(out: Path, *settings: str) -> dict[str, Tensor]:
    """The weights that one process ends with."""
    assert main(words(out, *settings)) == 0
    return weights(out)


def train_on_two(out: Path, *settings: str) -> dict[str, Tensor]:
    """The weights that two processes end with."""
    done = ended(two_ranks(words(out, *settings)))
    assert [code for code, *_ in done] == [0, 0], done
    return weights(out)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model-raw" / "model.safetensors") | load_file(
        out / "model-raw" / "threshold.safetensors"
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("ranks") / "one"
    return out, train(out)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("train.shard=fsdp", "model.activation_checkpointing=true"),
        ("train.shard=zero2", "train.gather_rollout=false", "eval.every=1"),
    ],
    ids=["whole", "fsdp", "zero2-lockstep"],
)
def test_two_ranks_equal_one(
    tmp_path: Path, one: tuple[Path, dict[str, Tensor]], settings: tuple[str, ...]
) -> None:
    two = train_on_two(tmp_path / "two", *settings)
    assert distance(one[1], two) < 1e-6  # the head is float32; the model float64:
    model = {name: value for name, value in one[1].items() if name.startswith("model.")}
    assert distance(model, {name: two[name] for name in model}) < 1e-12
    ones = metrics(one[0])
    twos = metrics(tmp_path / "two")
    assert len(ones) == 2 and any(row["loss"] for row in ones)
    assert ones[0]["prior/share"] != ones[1]["prior/share"], (
        "a prompt's next group, on another rank, knows of its last one"
    )
    for key in COMPARED:
        assert all(abs(a[key] - b[key]) < 1e-4 for a, b in zip(ones, twos, strict=True)), key


def test_adapters_go_on_alike_on_two_sharded_ranks(tmp_path: Path) -> None:
    """A run on one process, cut back to its first step and resumed on two sharded ones, ends with
    the same weights.
    """
    lone = train(tmp_path / "run", *ADAPTERS)
    base = load_denoiser(asset("mini"), dtype=torch.float64).model.state_dict()
    assert distance(base, {name: lone[name] for name in base}) > 1e-5, "nothing was trained"
    newest = sorted((tmp_path / "run" / "checkpoints").glob("update-*"))
    assert [p.name for p in newest] == ["update-000002", "update-000004"]
    shutil.rmtree(newest[-1])
    again = train_on_two(tmp_path / "run", *ADAPTERS, "train.shard=fsdp", "--resume")
    assert distance(lone, again) < 1e-6 and len(metrics(tmp_path / "run")) == 2
