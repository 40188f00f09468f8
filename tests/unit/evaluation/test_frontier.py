"""The frontier: the best mixture of fixed thresholds, the points that are measured, the command on
a tiny setting.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmaskrl.cli.main import main
from unmaskrl.core.rng import named_generator
from unmaskrl.core.threshold_head import ThresholdHead
from unmaskrl.evaluation.frontier import best_fixed, settings_of, verdict
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.heads import save_threshold
from unmaskrl.models.tokenizer import copy_tokenizer
from unmaskrl.recipes.schema import DecodeConfig

MINI = Path(__file__).parents[3] / "src" / "unmaskrl" / "assets" / "mini"


def test_best_fixed_is_the_upper_hull_of_calls_and_accuracy() -> None:
    points = [(2.0, 0.1), (6.0, 0.5), (8.0, 0.4), (12.0, 0.6)]
    assert best_fixed(points, 4.0) == pytest.approx(0.3)
    # a mixture of 6 and 12 beats the point at 8
    assert best_fixed(points, 8.0) == pytest.approx(0.5 + 0.1 * 2 / 6)
    assert best_fixed(points, 20.0) == 0.6
    assert best_fixed(points, 1.0) == 0.1
    assert best_fixed([(3.0, 0.7), (5.0, 0.2)], 5.0) == 0.7  # fewer calls are never worse


def test_points_and_verdict() -> None:
    settings = DecodeConfig(gen_length=20, block_length=10, steps=20)
    ways = list(settings_of(settings, (0.0, 1.0), None))
    assert [label for kind, label, *_ in ways if kind == "fixed steps"] == [
        "20 steps",
        "10 steps",
        "5 steps",
        "2 steps",
    ]
    assert [changes["gamma"] for kind, _, changes, _ in ways if kind == "fixed gamma"] == [0.0, 1.0]
    kinds = [
        way[0]
        for way in settings_of(
            settings, (0.0,), ThresholdHead(8).init_weights(named_generator(0, "x"))
        )
    ]
    assert kinds[-2:] == ["learned", "shuffled"]
    points = [
        {"kind": "fixed gamma", "nfe": 2.0, "accuracy": 0.2},
        {"kind": "fixed gamma", "nfe": 4.0, "accuracy": 0.4},
        {"kind": "learned", "nfe": 3.0, "accuracy": 0.5},
        {"kind": "shuffled", "nfe": 3.0, "accuracy": 0.45},
    ]
    found = verdict(points)
    assert found["gain_over_fixed"] == pytest.approx(0.2) and found[
        "gain_over_shuffled"
    ] == pytest.approx(0.05)
    assert verdict(points[:2]) == {}


def test_the_command_measures_the_learned_sampler_and_its_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    save_model(load_denoiser(MINI).model, model)
    copy_tokenizer(MINI, model)
    (model / "decode.json").write_text((MINI / "decode.json").read_text())
    head = ThresholdHead(128, (0.0, 0.1, 3.0), start=0.1).init_weights(named_generator(1, "head"))
    save_threshold(head, model)
    out = tmp_path / "f.json"
    plot = tmp_path / "f.png"
    words = [
        str(model),
        "--task",
        "sudoku",
        "--size",
        "6",
        "--threads",
        "1",
        "--json",
        str(out),
        "--plot",
        str(plot),
    ]
    assert main(["frontier", *words]) == 0
    (result,) = json.loads(out.read_text())["models"]
    by_label = {(p["kind"], p["label"]): p for p in result["points"]}
    assert by_label["fixed gamma", "0"]["nfe"] == by_label["fixed steps", "20 steps"]["nfe"]
    assert (
        by_label["fixed gamma", "3"]["nfe"]
        < by_label["fixed gamma", "0.1"]["nfe"]
        < by_label["fixed gamma", "0"]["nfe"]
    )
    # an untrained head always chooses its start, and so does its shuffled control
    assert by_label["learned", "learned"]["gammas"] == [0.1]
    for kind in ("learned", "shuffled"):
        assert by_label[kind, kind]["nfe"] == by_label["fixed gamma", "0.1"]["nfe"]
    assert result["gain_over_shuffled"] == 0 and result["gain_over_fixed"] <= 1e-12
    assert plot.read_bytes().startswith(b"\x89PNG") and "wrong prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mini", "--task", "sudoku", "--size", "1"], "--size must be at least 2"),
        (["mini", "--task", "sudoku", "--plot", "/nowhere/f.png"], "does not exist; make it first"),
        (
            ["mini", "--task", "sudoku", "--size", "2", "--gammas=-1"],
            "a bound in nats, >= 0; got -1.0",
        ),
        (
            ["mini", "--task", "sudoku", "--size", "2", "--gammas", "0,x"],
            "expected numbers such as 0,0.1,1",
        ),
        (["nowhere", "--task", "sudoku", "--size", "2"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", *words, "--threads", "1"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
