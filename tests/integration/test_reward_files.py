"""Runs with reward files of other trainers, and with rewards that misbehave: one line, before
anything is touched.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.integration.test_commands import TINY, refused, run
from tests.offline_tasks import write_rows
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.folder.config import write_config

D1 = "tests.rewards_d1_style"
TRL = "tests.rewards_trl_style"
BAD = """
import os, sys
from fractions import Fraction

def leaves(prompts, completions, **columns):
    sys.exit(0)

def leaves_at_once(prompts, completions, **columns):
    os._exit(0)

def wants_more(prompts, completions, gold):
    return [1.0] * len(completions)

def beyond(prompts, completions, **columns):
    return [Fraction(10**400)] * len(completions)

def chokes_on_nothing(prompts, completions, **columns):
    return [1 / len(completion[0]["content"]) for completion in completions]
"""


def test_a_run_with_files_of_d1_and_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        f"{D1}:reaches_target",
        f"{D1}:shorter_is_better",
        f"{TRL}:by_tokens",
        f"{TRL}:by_progress",
        f"{TRL}:slow_one",
    ]
    settings = [s for s in TINY if not s.startswith("decode.")]
    out = tmp_path / "run"
    code, said = run(
        capsys,
        "train",
        "countdown-mini",
        *settings,
        f"train.reward_functions=[{','.join(names)}]",
        f"run.out={out}",
    )
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        [row[f"reward/{TRL}:by_progress"] for row in rows]
        == [row["reward_log/share"] for row in rows]
        == [0.0, 0.5]
    )
    for row in rows:
        assert row[f"reward/{D1}:shorter_is_better"] < -1.0 and row[f"reward/{TRL}:by_tokens"] > 1.0
        assert row[f"reward/{TRL}:slow_one"] == 1.0 and row["reward/unscored"] == 0.0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["extra"] for row in samples if row["split"] == "train" and row["step"] == 1] == [
        {"share": 0.5}
    ] * 2


def test_rewards_that_abstain_and_that_change_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, torch\n"
        "def odd(prompts, completions, answer, **columns):\n"
        "    os.chdir('/')\n"
        "    torch.set_grad_enabled(False)\n"
        "    return [None if int(gold) % 3 else len(text) / 100 for text, gold in zip(completions, "
        "answer)]\n"
    )
    (tmp_path / "odd_rewards.py").write_text(code)
    rows = [
        {"prompt": f"numbers {n} {n + 1} target {2 * n + 1}", "answer": str(2 * n + 1)}
        for n in range(1, 50)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    task = f"task={{name: jsonl, data: {data}, reward: 'odd_rewards:odd', correct_at: 0.1}}"
    settings = [s for s in TINY if not s.startswith("decode.")]
    code, said = run(
        capsys,
        "train",
        "countdown-mini",
        *settings,
        task,
        "run.out=run",
        "decode.temperature=1.0",
    )
    assert code == 0, said
    assert (
        "reward 'odd_rewards:odd' changes the working directory, torch's grad mode: put back"
        in " ".join(said.split())
    )
    assert "every reward function returned None for" in said
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert torch.is_grad_enabled() and any(row["grad_norm"] > 0 for row in metrics)
    assert 0.0 < metrics[0]["reward/unscored"] <= 1.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "raised .*bad_rewards.py:6: SystemExit: 0"),
        ("leaves_at_once", "raised .*bad_rewards.py:9: EndOfProcess: os._exit was called"),
        ("wants_more", "missing 1 required positional argument: 'gold'"),
        ("beyond", "returned Fraction.* for row 0, expected a finite float"),
        ("chokes_on_nothing", "raised .*bad_rewards.py:18: ZeroDivisionError"),
    ],
)
def test_a_reward_that_cannot_work_leaves_the_run_that_is_there(
    name: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad_rewards.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    out.mkdir()
    write_config(load_recipe("sudoku-mini", []), out)
    before = (out / "config.yaml").read_text()
    said = refused(
        capsys,
        "train",
        "sudoku-mini",
        *TINY,
        f"train.reward_functions=[bad_rewards:{name}]",
        f"run.out={out}",
        "--force",
    )
    assert re.search(words, said), said
    assert "tried before the run" in said
    assert [path.name for path in tmp_path.rglob("*.yaml")] == ["config.yaml"]
    assert (out / "config.yaml").read_text() == before and len(list(out.iterdir())) == 1
