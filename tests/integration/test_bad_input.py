"""Bad input of every kind: exit code 2, one line on stderr that says what to do, and nothing left
behind.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from unmaskrl.cli.main import main
from unmaskrl.models.hub import ASSETS
from unmaskrl.recipes.files import composed_names
from unmaskrl.recipes.load import build_recipe, load_recipe
from unmaskrl.tasks import load

EVAL = ("eval", "mini", "--task", "sudoku", "--size", "2", "--threads", "1")
TRAIN = ("train", "sudoku-mini", "run.threads=1", "train.steps=1", "eval.size=2")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refused command."""
    code = main(list(argv))
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("unmaskrl: error: ") and err.count("\n") == 1, err
    return err


def changed_mini(folder: Path, name: str, text: str) -> str:
    shutil.copytree(ASSETS / "mini", folder)
    (folder / name).write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("eval", "mini"), "missing option '--task'; see `unmaskrl eval --help`"),
        (
            ("eval", "mini", "--task", "sudoku", "--size", "two"),
            "invalid value for '--size': Input should be a valid integer",
        ),
        ((*EVAL, "--temperature", "nan"), "--temperature: expected a number of at least 0"),
        ((*EVAL, "--threads", "-1"), "threads is -1"),
        ((*EVAL, "--json", "folder"), "--json folder is a folder"),
        (
            (*EVAL, "--batch-size", "0", "--json", "out.json"),
            "--batch-size must be at least 1, got 0",
        ),
        (
            ("prior", "mini", "--task", "sudoku", "--batch-size", "0", "--out", "p.jsonl"),
            "--batch-size must be at least 1",
        ),
        ((*EVAL, "--items", "folder"), "--items folder is a folder"),
        (("prior", "mini", "--task", "sudoku", "--out", "folder"), "--out folder is a folder"),
        ((*TRAIN, "run.out=runs/{step}"), "only {recipe} and {seed} are filled in"),
        ((*TRAIN, "run.out=plain"), "run.out 'plain' is a file"),
        (
            (*TRAIN, "model.lora.targets=[]"),
            "model.lora.targets: tuple should have at least 1 item",
        ),
        (
            (*TRAIN, "prior.source=other.jsonl"),
            "holds 1 problems, but no answer to any of the 4096 to train on",
        ),
        (
            (*EVAL, "decode.gen_length=5000", "decode.block_length=5000", "--json", "out.json"),
            "positions: lower gen_length\n",
        ),
    ],
)
def test_words_that_cannot_work(
    argv: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text("")
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"id": "x", "ids": [5], "protected": [True]}) + "\n"
    )
    assert said in refused(capsys, *argv)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "other.jsonl", "plain"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "config.json",
            '{"model_type": "bert"}',
            "config.json has model_type 'bert'; shipped families: llada, Dream",
        ),
        ("chat_template.jinja", "{% for m in", "chat template fails .*TemplateSyntaxError"),
        (
            "decode.json",
            '{"sudoku": {"gen_len": 3}}',
            "decode.json: decode.gen_len: unknown setting",
        ),
        ("decode.json", '{"sudo', "decode.json is not valid JSON"),
        ("decode.json", "[1]", "decode.json holds a JSON list"),
    ],
)
def test_folders_that_are_no_checkpoint(
    name: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed_mini(tmp_path / "model", name, text)
    assert re.search(
        said, refused(capsys, "eval", folder, "--task", "sudoku", "--size", "2", "--threads", "1")
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:", "cannot import 'my_{n}:f' (SyntaxError: "),
        ("nothing_here\ndef f(**columns): return [0.0]", "cannot import 'my_{n}:f' (NameError: "),
        ("def f(completions, **columns):\n    raise KeyError('gold')", "reward 'my_{n}:f' raised"),
        (
            "def f(prompts, completions, prompt, wanted): return [0.0]",
            "missing 1 required positional argument: 'wanted'",
        ),
    ],
)
def test_rewards_that_fail(
    code: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    n = abs(hash(code))  # modules are imported once
    (tmp_path / f"my_{n}.py").write_text(code + "\n")
    rows = [{"prompt": f"numbers {a} {b} 3 target 9"} for a in range(1, 21) for b in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = (
        "--data",
        str(tmp_path / "rows.jsonl"),
        f"task.reward=my_{n}:f",
        "--size",
        "2",
        "--threads",
        "1",
    )
    line = refused(capsys, "eval", "mini", "--task", "jsonl", *argv)
    assert said.replace("{n}", str(n)) in line
    assert "raised" not in said or f"my_{n}.py:2: KeyError: 'gold'" in line


@pytest.mark.parametrize(
    "name", [n for n in composed_names() if n.rsplit("-", 2)[1] in ("countdown", "sudoku")]
)
def test_large_runs_have_the_problems_that_they_evaluate_on(name: str) -> None:
    recipe = load_recipe(name)
    task = load(recipe.task["name"], **{k: v for k, v in recipe.task.items() if k != "name"})
    assert len(task.examples("test")) >= recipe.eval.size
    assert len(task.examples("validation")) >= recipe.eval.size_during
    assert build_recipe(recipe.model_dump()) == recipe
