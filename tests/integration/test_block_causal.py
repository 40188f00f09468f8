"""A block-causal model's run: killed and resumed, and on two processes, it is the same run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import assert_same_run, ended, num_lines, rows, start, two_ranks, wait_until
from unmaskrl.cli.main import main
from unmaskrl.tasks import completion_text

MODEL = "model.path=JetLM/SDAR-8B-Chat model.random_init=tiny model.dtype=float64".split()
SETTINGS = (
    "task.numbers=3 task.train_size=8 task.eval_size=4 decode.gen_length=10 decode.block_length=4 "
    "decode.steps=5 decode.select=entropy decode.temperature=1.0 decode.exit_at=0.5 "
    "estimator.name=trajectory loss.name=token_clip prior.name=none prior.keep_end=null "
    "train.steps=2 train.prompts_per_step=2 train.group_size=2 train.num_iterations=2 "
    "train.max_canvases=5 optimizer.lr=0.01 eval.size=2 eval.size_during=2 run.threads=1 "
    "train.reward_functions=[tests.integration.test_block_causal:spread] "
    "run.log_with=[] run.probe=false run.save=both run.save_every=3"
).split()


def spread(completions: list, **columns: list) -> list[float]:
    """A reward that nearly always differs within a group."""
    texts = [completion_text(completion) for completion in completions]
    return [sum(i * ord(letter) for i, letter in enumerate(text)) % 97 / 97 for text in texts]


def words(out: Path, *extra: str) -> list[str]:
    return ["train", "countdown-mini", *MODEL, *SETTINGS, f"run.out={out}", "--quiet", *extra]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(words(out)) == 0
    assert all(row["grad_norm"] > 0 for row in rows(out / "metrics.jsonl")), "nothing to compare"
    return out


def test_a_run_that_is_killed_inside_a_step_ends_as_if_it_was_not(
    straight: Path, tmp_path: Path
) -> None:
    """The open step's rollouts, with the columns that complete their last blocks, come back."""
    out = tmp_path / "run"
    process = start(words(out))
    inside = out / "checkpoints" / "update-000003"
    wait_until(inside.exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert num_lines(out / "metrics.jsonl") == 1
    assert main(words(out, "--resume")) == 0
    assert_same_run(out, straight)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_processes_train_as_one(straight: Path, tmp_path: Path, shard: str) -> None:
    """Their rows have unequal numbers of blocks and of calls in a block."""
    done = ended(two_ranks(words(tmp_path / "two", f"train.shard={shard}")))
    assert [code for code, *_ in done] == [0, 0], done
    ours, theirs = (
        load_file(p / "model-raw" / "model.safetensors") for p in (tmp_path / "two", straight)
    )
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-12 * value.abs().max(), name
    two, one = (rows(run / "metrics.jsonl") for run in (tmp_path / "two", straight))
    assert [row["nfe/mean"] for row in two] == [row["nfe/mean"] for row in one]
