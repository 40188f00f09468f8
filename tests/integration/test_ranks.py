"""Two gloo processes train to the weights of one, threshold head included: whole groups per rank, summed gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

SETTINGS = (
    "train.steps=2 train.prompts_per_step=4 train.group_size=4 train.num_iterations=2 train.threads=1 train.log_with=[] "
    "eval.size=8 eval.size_during=8 decode.select=eb threshold.mode=joint "
    "prior.name=anchors prior.adapt_share=true prior.share=0.5 prior.keep_end=null prior.adapt_to=0.5 train.num_prompts=4"
).split()


def train(out: Path, *launcher: str) -> dict:
    command = [sys.executable, *launcher, "-m", "unmaskrl.cli", "train", "sudoku-mini", *SETTINGS, f"train.out={out}"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(out / "model-raw" / "model.safetensors") | load_file(out / "model-raw" / "threshold.safetensors")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    one = train(tmp_path / "one")
    two = train(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert worst < 1e-5, f"weights differ by {worst}"
    ones, twos = ([json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two"))
    assert len(ones) == 2 and any(row["loss"] for row in ones)
    assert ones[0]["prior/share"] != ones[1]["prior/share"], "a prompt's next group, on another rank, knows of its last one"
    for key in (
        "loss",
        "grad_norm",
        "reward/mean",
        "nfe/mean",
        "groups/live",
        "sampler/entropy",
        "sampler/grad_norm",
        "calls/total",
        "prior/share",
        "prior/keep",
    ):
        assert all(abs(a[key] - b[key]) < 1e-4 for a, b in zip(ones, twos, strict=True)), key
