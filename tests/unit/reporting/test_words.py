"""What commands say: recipes as they are, the nearest names, no traceback for odd files, no
metadata needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unmaskrl.cli.arguments import Arguments
from unmaskrl.cli.hints import way_on
from unmaskrl.cli.main import main, parse
from unmaskrl.recipes.files import recipe_names
from unmaskrl.recipes.load import load_recipe
from unmaskrl.reporting.charts import Chart, Line, chart_svg
from unmaskrl.reporting.html import write_report
from unmaskrl.reporting.progress import Progress
from unmaskrl.utils.files import read_json
from unmaskrl.utils.stopping import Stopped
from unmaskrl.utils.torch_setup import installed

SOURCE = Path(__file__).parents[3] / "src"


def test_check_prints_the_recipe_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check", "sudoku-mini", "train.reward_functions=[/x]"]) == 0
    said = capsys.readouterr().out
    assert "log_with: [tensorboard]" in said and "reward_functions: [/x]" in said
    assert max(map(len, said.splitlines())) > 80, "not wrapped: it can be copied"


@pytest.mark.parametrize(
    "name", [*(n for n in recipe_names() if not n.endswith("-base")), "llada-8b-gsm8k-stp"]
)
def test_check_yaml_is_a_recipe_file(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check", name, "--yaml"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("nosuch.yaml",), "recipe file nosuch.yaml not found"),
        (("some/folder/recipe",), "recipe file some/folder/recipe not found"),
        (("sudoko-mini",), "no recipe 'sudoko-mini'; the nearest are sudoku-mini, "),
        (
            ("sudoku-mini", "train.lerning_rate=1"),
            "train.lerning_rate: unknown setting; did you mean 'optimizer.lr'?",
        ),
        (("sudoku-mini", "train.num_generations=4"), "did you mean 'group_size'?"),
        (("sudoku-mini", "lr=1e-4"), "lr: unknown setting; did you mean 'optimizer.lr'?"),
        (("sudoku-mini", "train.exit_at=0.9"), "did you mean 'decode.exit_at'?"),
        (("sudoku-mini", "train.stepps=4"), "did you mean 'steps'?"),
        (("sudoku-mini", f"decode.steps={'[' * 5000}"), "the value is not valid YAML"),
    ],
)
def test_what_was_meant(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.count(",") < 8


def test_thousands_of_brackets_in_each_other_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    assert main(["check", str(tmp_path / "deep.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_with_escapes_reaches_the_terminal_as_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "sudoku-mini", "train.\x1b[31mred\n=1"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b[31mred\\n" in err and err.count("\n") == 1


def test_versions_are_known_without_metadata() -> None:
    assert installed("unmaskrl", "no-such-package") == {
        "unmaskrl": "0.1.0",
        "no-such-package": "unknown",
    }
    code = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'unmaskrl': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from unmaskrl.evaluation.item_log import versions\n"
        "import benchmarks.speed.bench, unmaskrl.training.log\n"
        "assert versions()['unmaskrl'] == '0.1.0'\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )


def test_silence_is_not_for_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().note("fine")
    Progress().warn("disk full")
    said = capsys.readouterr()
    assert said.out == "" and said.err == "unmaskrl: warning: disk full\n"


@pytest.mark.parametrize(
    ("words", "resumable", "hint"),
    [
        (
            ["train", "sudoku-mini", "--force", "optimizer.lr=1e-3"],
            True,
            "train sudoku-mini optimizer.lr=1e-3 --resume",
        ),
        (["train", "sudoku-mini"], False, "no step was begun: start it again with "),
        (["sft", "mini-base", "--resume"], True, "sft mini-base --resume"),
        (["eval", "mini", "--task", "sudoku"], False, "with --json or --items it can go on"),
        (["variance", "mini", "--task", "sudoku"], False, "nothing is kept"),
    ],
)
def test_each_command_has_its_own_hint(words: list[str], resumable: bool, hint: str) -> None:
    said = way_on(Stopped(2, resumable=resumable), parsed(words), words)
    assert hint in said and "--force" not in said


def parsed(words: list[str]) -> Arguments:
    args = parse(words)
    assert isinstance(args, Arguments)
    return args


def test_a_stopped_evaluation_names_its_file(tmp_path: Path) -> None:
    for words, kept in (
        (
            ["eval", "mini", "--task", "sudoku", "--json", str(tmp_path / "r.json")],
            tmp_path / "r.items.jsonl",
        ),
        (
            ["prior", "mini", "--task", "sudoku", "--out", str(tmp_path / "p.jsonl")],
            tmp_path / "p.jsonl.partial",
        ),
    ):
        assert "nothing is kept" in way_on(Stopped(2), parsed(words), words)
        kept.write_text("")
        assert f"what is finished is in {kept}: go on with the same command" in way_on(
            Stopped(15), parsed(words), words
        )


def test_a_report_of_a_long_run_takes_seconds_and_holds_no_control(tmp_path: Path) -> None:
    """50,000 steps: time is linear in them (it was quadratic: with twice as many, 100 s were not
    enough).
    """
    rows = [
        {"step": n, "reward/mean": (n % 97) / 97, "grad_norm": 1.0, "seconds/rollout": 1.0}
        for n in range(1, 50_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("name: a\x1b[31mb\u202ec\n", encoding="utf-8")
    began = time.process_time()
    page = write_report(tmp_path).read_text()
    assert time.process_time() - began < 15
    assert len(page) < 2_000_000 and "Gradient norm" in page
    assert not set(page) & set("\x1b\u202e")


def test_the_legend_says_where_the_drawn_curve_ends() -> None:
    points = [(float(x), float(x)) for x in range(300)]
    long = [(float(x), x / 10) for x in range(3000)]
    for line in (points, long):
        svg = chart_svg(Chart(title="t", lines=[Line(label="a", points=line)]))
        assert ">29" in svg.split("step</text>")[1]
