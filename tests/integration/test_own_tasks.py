"""Tasks and reward functions from files outside the package: checked, trained on, evaluated."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.integration.test_commands import TINY, refused, run
from unmaskrl import tasks
from unmaskrl.recipes.load import load_recipe
from unmaskrl.testing import check_task
from unmaskrl.training.loop import train
from unmaskrl.utils.imports import load_object

OWN = '''
from unmaskrl.tasks import BaseTask, Example, Grade

SEEN = []
CALLS = []


class Blanks(BaseTask):
    """Not derived from what shipped tasks use: grade is written by hand."""

    name = "blanks"

    def __init__(self, size):
        self.size = size

    def examples(self, split):
        start = {"train": 0, "validation": 100, "test": 200}
        if split not in start:
            raise ValueError(f"no split {split}")
        rows = range(start[split], start[split] + self.size)
        return [Example(id=f"b{n}", fields={"n": n}) for n in rows]

    def prompt(self, example):
        n = example.fields["n"]
        return [{"role": "user", "content": f"numbers {n // 10 + 1} {n % 10 + 1} target 30"}]

    def reference(self, example):
        return f"<answer> {example.fields['n'] % 10} </answer>"

    def grade(self, example, text):
        SEEN.append((example.id, text))
        words = text.split()
        right = f"<answer> {example.fields['n'] % 10} </answer>" in text
        return Grade(right, {"right": float(right), "length": len(words) / 100})


def blanks(*, size: int = 24):
    return Blanks(size)


def counted(completions, n, **columns):
    CALLS.append(len(completions))
    return [k / 1000 for k in n]
'''
BROKEN = """
from unmaskrl.tasks import BaseTask, Example, Grade

class Broken(BaseTask):
    name = "broken"
    def __init__(self, what="grade"): self.what = what
    def examples(self, split):
        count = 20 // (self.what != "examples")
        return [Example(id=f"{split}{n}", fields={"n": n}) for n in range(count)]
    def prompt(self, example):
        if self.what == "prompt": raise KeyError("question")
        return [{"role": "user", "content": f"numbers {example.fields['n']}"}]
    def reference(self, example):
        return None if self.what != "reference" else "a" + 1
    def grade(self, example, text):
        if self.what == "grade": return int(text)
        return Grade(False, {})

def nothing(): return {"examples": []}
def half(): return BaseTask()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_part.py").write_text(OWN)
    (tmp_path / "broken_part.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_file(folder: Path, task: str, reward: str) -> str:
    text = (
        f'model: {{path: mini}}\ntask: {{name: "{task}", size: 20}}\n'
        "decode: {gen_length: 8, block_length: 8, steps: 4, temperature: 1.0}\n"
        f'train: {{reward_functions: ["{reward}"]}}\n'
    )
    (folder / "own.yaml").write_text(text)
    return str(folder / "own.yaml")


def test_a_task_and_a_reward_of_a_file_are_checked_trained_and_evaluated(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "own_part.py:blanks"
    check_task(lambda: tasks.load(name, size=9))
    module = sys.modules[load_object(name, "test").__module__]
    recipe = recipe_file(own, name, "own_part.py:counted")
    settings = [s for s in TINY if not s.startswith(("decode.", "train.steps"))]
    code, said = run(capsys, "check", recipe, *settings)
    assert code == 0, said
    module.SEEN.clear()
    module.CALLS.clear()
    code, said = run(capsys, "train", recipe, *settings, "train.steps=1", "run.out=run")
    assert code == 0, said
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and 0 < rows[0]["reward/own_part.py:counted"] < 0.02
    assert rows[0]["reward/length"] > 0
    evaluations = [json.loads(line) for line in Path("run/eval.jsonl").read_text().splitlines()]
    evaluated = sum(row["num_problems"] for row in evaluations)
    # Two trials before the run, 16 rollouts, and every evaluated completion: once each.
    assert len(module.SEEN) == 2 + 16 + evaluated and evaluated > 16
    # The reward function is one of training: a trial, then one call for the step.
    assert module.CALLS == [2, 16]
    module.SEEN.clear()
    code, said = run(
        capsys, "eval", "run/model", "--task", name, "--size", "6", "--threads", "1",
        "task.size=6", "--json", "out.json",
    )  # fmt: skip
    assert code == 0, said
    assert json.loads(Path("out.json").read_text())["num_problems"] == 6
    assert len(module.SEEN) == 2 + 6


def test_a_module_and_a_callable_do_as_well_as_a_file(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(own))
    import own_part  # pyright: ignore[reportMissingImports]

    def longer(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    path = recipe_file(own, "own_part:blanks", "own_part:counted")
    settings = [s for s in TINY if not s.startswith(("decode.", "train.steps"))]
    recipe = load_recipe(path, [*settings, "train.steps=1", "run.out=run"])
    summary = train(recipe, rewards=[longer])
    assert summary["after"]
    row = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert row["reward/longer"] >= 1 and row["reward/own_part:counted"] > 0
    assert own_part.CALLS == [2, 16]
    # The same function as a jsonl task's judge.
    task = tasks.load("jsonl", data="x.jsonl", reward=[longer, "own_part:counted"])
    chat = [{"role": "user", "content": "?"}]
    graded = tasks.grade(task, [tasks.Example(id="0", fields={"prompt": chat, "n": 2})], ["aa"])
    assert graded.parts == {"longer": [2.0], "own_part:counted": [0.002]}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("own_part.py:blank", {}, "own_part.py has no 'blank'"),
        ("own_part.py:blanks", {"sizes": 3}, "has no setting 'sizes': did you mean 'size'"),
        ("broken_part.py:nothing", {}, "returned a dict without name, columns, notes"),
        (
            "broken_part.py:half",
            {},
            "returned a BaseTask without examples, prompt, reference, grade",
        ),
    ],
)
def test_what_is_no_task_is_told(
    own: Path, name: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as info:
        tasks.load(name, **settings)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("examples", "task broken: examples raised .*broken_part.py:8: ZeroDivisionError"),
        ("prompt", "task broken: prompt raised .*broken_part.py:11: KeyError: 'question'"),
        ("reference", "task broken: reference raised .*broken_part.py:14: TypeError"),
        ("grade", "task broken: grade raised .*broken_part.py:16: ValueError: invalid literal"),
    ],
)
def test_a_task_that_raises_is_told_in_one_line(
    own: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        capsys, "train", "countdown-mini", "task.name=broken_part.py:Broken",
        f"task.what={what}", "run.threads=1", "run.out=run",
    )  # fmt: skip
    assert re.search(message, said), said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("examples", ["prior", "mini", "--size", "2", "--out", "prior.jsonl"]),
        ("prompt", ["sample", "mini"]),
        ("grade", ["sample", "mini"]),
        ("reference", ["variance", "mini", "--size", "2"]),
        ("examples", ["frontier", "mini", "--size", "2"]),
        ("prompt", ["eval", "mini", "--size", "2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_commands_say_in_one_line_what_a_task_raises(
    own: Path, what: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--task", "broken_part.py:Broken", f"task.what={what}", "--threads", "1"]
    said = refused(capsys, *words, *task)
    assert re.search(rf"task broken: {what} raised .*broken_part.py:\d+: \w+Error", said), said


@pytest.mark.parametrize("what", ["examples", "reference"])
def test_sft_says_in_one_line_what_a_task_raises(
    own: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = f"data.0.task={{name: 'broken_part.py:Broken', what: {what}}}"
    said = refused(capsys, "sft", "zero-base", task, "data.0.lazy_share=0", "run.out=run")
    assert re.search(rf"task broken: {what} raised .*broken_part.py:\d+: \w+Error", said), said


def test_a_factory_that_raises_is_told_in_one_line(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "late_part.py").write_text("def late():\n    return {}['gold']\n")
    said = refused(capsys, "sample", "mini", "--task", "late_part.py:late", "--threads", "1")
    assert re.search(r"task late_part.py:late: raised .*late_part.py:2: KeyError: 'gold'", said)
