"""A command line becomes typed values: settings anywhere among the options, errors in one line."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from unmaskrl.cli.arguments import (
    COMMANDS,
    Arguments,
    EvalArguments,
    FrontierArguments,
    TrainArguments,
    VarianceArguments,
)
from unmaskrl.cli.main import command_of, main, parse
from unmaskrl.core.canvas import SELECTIONS


@pytest.mark.parametrize(
    "words",
    [
        ["train", "a=1", "--force", "b.c=-2", "d=[1,2]"],
        ["train", "--force", "a=1", "b.c=-2", "d=[1,2]"],
        ["train", "a=1", "b.c=-2", "d=[1,2]", "--force"],
    ],
)
def test_settings_stand_anywhere(words: list[str]) -> None:
    args = parse([words[0], "mine", *words[1:]])
    assert isinstance(args, TrainArguments)
    assert (args.recipe, args.force, args.resume) == ("mine", True, False)
    assert args.overrides == ["a=1", "b.c=-2", "d=[1,2]"]


def test_options_have_the_types_of_the_fields() -> None:
    args = parse("eval m --task t --size 7 --decode a=1 --decode b=2 --temperature .5".split())
    assert isinstance(args, EvalArguments)
    assert (args.size, args.temperature, args.decode) == (7, 0.5, ["a=1", "b=2"])
    assert (args.seeds, args.overrides, args.split) == (None, [], "test")
    other = parse("variance m --task t --select-anchors random --exit-at .9".split())
    assert isinstance(other, VarianceArguments)
    assert (other.select, other.exit_at, other.temperature) == ("random", 0.9, 1.0)


def test_two_parses_share_no_list() -> None:
    first = parse(["train", "a"])
    assert isinstance(first, TrainArguments)
    first.overrides.append("x=1")
    second = parse(["train", "a"])
    assert isinstance(second, TrainArguments) and second.overrides == []


def test_frontier_takes_models_and_settings() -> None:
    args = parse("frontier a decode.steps=2 b --task t c".split())
    assert isinstance(args, FrontierArguments)
    assert (args.model, args.overrides) == ("a", ["decode.steps=2", "b", "c"])


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.command)
def test_every_command_has_help_and_a_function(
    kind: type[Arguments], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main([kind.command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert " ".join((inspect.getdoc(kind) or "-").split()) in shown
    for field in fields(kind):
        hint = get_type_hints(kind, include_extras=True)[field.name]
        text = get_args(hint)[1].help
        assert text and text[:30] in shown, field.name
    assert callable(command_of(object.__new__(kind)))


def test_selections_are_those_of_the_canvas() -> None:
    hint = get_type_hints(VarianceArguments)["select"]
    assert set(get_args(hint)) == set(SELECTIONS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evl"], "no such command 'evl'"),
        (["train"], "missing argument"),
        (["eval", "m", "--task", "t", "--sise", "3"], "no such option: --sise"),
        (
            ["eval", "m", "--task", "t", "--split", "dev"],
            "invalid value for '--split': 'dev' is not",
        ),
        (["eval", "m", "--task"], "--task"),
    ],
)
def test_a_wrong_line_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("unmaskrl: error: ") and err.count("\n") == 1
    assert said in err and "--help`" in err


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unmaskrl ")
    assert main([]) == 2
    assert "Usage: unmaskrl" in capsys.readouterr().out
