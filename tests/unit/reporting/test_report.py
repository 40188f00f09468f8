"""The report of a run folder: complete, cut short, hostile, or no run at all; and the small charts
in it.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmaskrl.reporting.curves import charts
from unmaskrl.reporting.html import write_report
from unmaskrl.reporting.runs import load_run

VOID = {"meta", "br", "hr", "img", "path", "link", "input", "use"}


class Outline(html.parser.HTMLParser):
    """Checks that tags nest and collects attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def metrics_row(step: int, rng: random.Random) -> dict[str, Any]:
    """One step of a run that learns."""
    skill = 0.2 + 0.45 / (1 + math.exp(-(step - 45) / 14))
    noisy = [min(1.0, max(0.0, skill + rng.gauss(0, 0.04))) for _ in range(3)]
    nfe = 17.5 - 3 * skill + rng.gauss(0, 0.3)
    return {
        "step": step,
        "updates": 4 * step,
        "seconds": 4.1 * step,
        "loss": rng.gauss(0, 0.02),
        "lr": 1e-4,
        "grad_norm": 0.4 + rng.random() * 0.3,
        "reward/mean": noisy[0] + 0.09,
        "reward/std": 0.45,
        "reward/correct": noisy[0],
        "reward/format": 0.09,
        "accuracy/rollout": noisy[0],
        "accuracy/anchored": min(1.0, noisy[1] + 0.15),
        "accuracy/blank": noisy[2] if step % 7 else None,
        "groups/live": 0.8 - 0.5 * abs(skill - 0.4),
        "nfe/mean": nfe,
        "nfe/tokens_per_call": 22 / nfe,
        "rollout/length": 21 + rng.random(),
        "rollout/anchors": 2.1 * max(0.0, 1 - step / 110),
        "rollout/exit_tokens": 4 + rng.random(),
        "prior/keep": 0.1,
        "ratio/mean": 1 + rng.gauss(0, 0.004),
        "ratio/clip_frac": 0.02 + rng.random() * 0.03,
        "ratio/max_dev": math.exp(rng.gauss(0.3, 0.4)),
        "kl/ref": 0.0004 * step + rng.random() * 0.004,
        "kl/old": 0.001 + rng.random() * 0.001,
        "likelihood/behavior_per_token": -0.5 + 0.002 * step + rng.gauss(0, 0.02),
        "health/behavior_gap": 2e-6 + rng.random() * 1e-6,
        "calls/rollout": 2000,
        "calls/total": 5000 * step,
        "seconds/rollout": 1.3 + rng.random() * 0.2,
        "seconds/reward": 0.05,
        "seconds/score": 0.8 + rng.random() * 0.1,
        "seconds/update": 1.9 + rng.random() * 0.2,
    }


def eval_row(step: int, split: str, weights: str, accuracy: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    return {
        "step": step,
        "split": split,
        "weights": weights,
        "accuracy": accuracy,
        "accuracy_low": accuracy - half,
        "accuracy_high": accuracy + half,
        "num_problems": n,
        "nfe": 15.2 - 2 * accuracy,
        "tokens_per_call": 1.4 + accuracy / 4,
        "seconds": 3.0,
    }


def sample(
    step: int, split: str, puzzle: int, anchored: bool = False, ended: bool = True
) -> dict[str, Any]:
    pieces = (
        "12 * 2 = 24 ; 24 - 7 = 17 ; <answer> ( 12 * 2 ) - 7 </answer>".split()
        + ["<|endoftext|>"] * 4
    )
    given = {1, 5, 9} if anchored else set()
    steps = []
    call = 0
    for position in range(len(pieces)):
        call += position < 15 and position not in given
        steps.append(0 if position in given else call + 1 if position >= 22 and ended else call)
    order = random.Random(f"{step}/{split}/{puzzle}")
    shuffled = [s for s in steps if 0 < s < call]
    order.shuffle(shuffled)
    steps = [shuffled.pop() if 0 < s < call else s for s in steps]
    return {
        "step": step,
        "split": split,
        "id": f"countdown-{puzzle}",
        "prompt": f"numbers 12 2 {puzzle} target 17",
        "completion": " ".join(pieces[:21]),
        "reward": 1.1 if step else 0.1,
        "correct": step > 0,
        "anchored": anchored,
        "nfe": call,
        "temperature": 1.0 if split == "train" else 0.0,
        "pieces": pieces,
        "decoded_step": steps,
        "anchor": [p in given for p in range(len(pieces))],
        "exit": [s == call for s in steps],
        "logps": [-0.25] * len(pieces),
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, steps: int = 120) -> Path:
    """A whole run: config, metrics, evaluations, samples, summary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    config = {
        "name": "countdown-mini",
        "model": {"path": "mini", "dtype": "float32"},
        "task": {"name": "countdown", "numbers": 3},
        "prior": {
            "name": "anchors",
            "select": "protect_answer",
            "keep": 0.1,
            "keep_end": None,
            "share": 0.5,
        },
        "decode": {
            "gen_length": 24,
            "block_length": 8,
            "steps": 24,
            "select": "confidence",
            "temperature": 1.0,
            "exit_at": 0.75,
        },
        "estimator": {"name": "elbo", "num_mc": 3},
        "advantage": {"name": "group_mean_std"},
        "loss": {"name": "token_clip"},
        "train": {
            "steps": steps,
            "group_size": 8,
            "prompts_per_step": 16,
            "ema": 0.9,
        },
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "run": {"seed": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(folder / "metrics.jsonl", [metrics_row(i + 1, rng) for i in range(steps)])
    before = eval_row(0, "test", "base", 0.189, 512)
    after = {
        "raw": eval_row(steps, "test", "raw", 0.601, 512),
        "ema": eval_row(steps, "test", "ema", 0.623, 512),
    }
    during = [
        eval_row(s, "validation", "ema", 0.2 + 0.42 * s / steps, 128) for s in range(20, steps, 20)
    ]
    write_lines(folder / "eval.jsonl", [before, *during, *after.values()])
    tests = [
        sample(s, f"test-{w}", p)
        for s, w in ((0, "base"), (steps, "raw"), (steps, "ema"))
        for p in range(4)
    ]
    train = [sample(s, "train", p, anchored=p == 0) for s in range(0, steps, 20) for p in range(2)]
    write_lines(folder / "samples.jsonl", tests[:4] + train + tests[4:])
    summary = {
        "name": "countdown-mini",
        "seed": 0,
        "before": before,
        "after": after,
        "minutes": 8.2,
        "steps": steps,
        "updates": 4 * steps,
        "device": "cpu",
        "threads": 1,
        "report": str(folder / "report.html"),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def read_report(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    Outline(text)
    return text


def test_report_holds_every_section(run: Path) -> None:
    text = read_report(run)
    words = " ".join(Outline(text).text)
    for part in (
        "countdown-mini",
        "Learning",
        "Cost",
        "Health",
        "Samples and decoding order",
        "Resolved config",
    ):
        assert part in words
    for row in (
        "before 18.9% 15.5-22.3%",
        "after, raw 60.1% 55.9-64.3%",
        "after, ema 62.3% 58.1-66.5%",
    ):
        assert row in words
    assert "do not overlap (+43.4 points)" in words
    assert "wall time 8:12 | 120 steps | 480 updates" in words
    assert "task countdown numbers=3; estimator elbo num_mc=3;" in words
    assert (
        "Without anchors and exit it takes 24, if no end of text ends it early: 33% fewer." in words
    )
    assert text.count("<figure>") == sum(map(len, charts(load_run(run)).values())) == 16


def test_report_needs_no_network_and_runs_one_script(run: Path) -> None:
    text = read_report(run)
    outline = Outline(text)
    assert not {tag for tag, _, _ in outline.attributes} & {"link", "img", "iframe", "object"}
    loads = [
        (tag, key, value)
        for tag, key, value in outline.attributes
        if key in ("src", "href", "action", "data") or key.startswith("on")
    ]
    assert all(tag == "use" and value.startswith("#") for tag, _, value in loads)
    assert "http:" not in text and "https:" not in text
    assert "url(" not in text and "@import" not in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(v for tag, key, v in outline.attributes if key == "content" and "src" in v)
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_report_is_the_same_twice_and_leaves_nothing_else(run: Path) -> None:
    before = {p.name for p in run.iterdir()}
    first = read_report(run)
    assert read_report(run) == first
    assert {p.name for p in run.iterdir()} == before | {"report.html"}


def test_every_figure_is_described(run: Path) -> None:
    labels = [
        value
        for tag, key, value in Outline(read_report(run)).attributes
        if (tag, key) == ("svg", "aria-label")
    ]
    assert len(labels) == 16
    assert any(x.startswith("Groups with reward spread by step: share from 7") for x in labels)
    assert any("without pruning from 24 at 1 to 24 at 120" in x for x in labels)
    assert all(" from " in x for x in labels)


def test_decodings_pair_first_and_last_and_show_anchors(run: Path) -> None:
    words = " ".join(Outline(read_report(run)).text)
    assert words.count("test-base") == words.count("test-ema") == 4
    assert "test-raw" not in words
    assert (
        words.count("step 0 | test-base countdown-0")
        == words.count("step 120 | test-ema countdown-0")
        == 1
    )
    assert "step 100 | train countdown-0" in words and "step 100 | train countdown-1" in words
    assert words.count(" given ") == 1 + 3  # the legend's and the anchored rollout's


def test_numbers_in_the_report_are_never_nan(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3]["reward/mean"], rows[4]["kl/ref"], rows[5]["nfe/mean"] = (
        float("nan"),
        float("inf"),
        None,
    )
    write_lines(run / "metrics.jsonl", rows)
    coordinates = re.findall(r' (?:d|x|y)="([^"]*)"', read_report(run))
    assert coordinates and not [d for d in coordinates if re.search(r"nan|inf|None", d)]


@pytest.mark.parametrize(
    "kept",
    [
        ["config.yaml"],
        ["metrics.jsonl"],
        ["eval.jsonl"],
        ["summary.json"],
        ["config.yaml", "samples.jsonl"],
    ],
)
def test_any_one_file_makes_a_report(run: Path, kept: list[str]) -> None:
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()
    words = " ".join(Outline(read_report(run)).text)
    assert (run.name if kept[0] in ("metrics.jsonl", "eval.jsonl") else "countdown-mini") in words
    assert (
        "62.3%" in words
        if kept[0] in ("eval.jsonl", "summary.json")
        else "no final evaluation" in words
    )


def test_a_run_cut_short_shows_what_there_is(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "reward/mean": 0.5}) + '\n{"step": 2, "rew'
    )
    (run / "eval.jsonl").write_text(
        json.dumps({"step": 0, "split": "test", "weights": "base", "accuracy": 0.2}) + "\n"
    )
    (run / "samples.jsonl").write_text('{"split": "test"}\n[1]\nnull\n')
    text = read_report(run)
    words = " ".join(Outline(text).text)
    assert "before 20.0%" in words and "its log ends at step 1" in words
    assert text.count("<figure>") == 2 and "decoding order" not in words
    assert {c.title for group in charts(load_run(run)).values() for c in group} == {
        "Held-out accuracy",
        "Reward per rollout",
    }


@pytest.mark.parametrize("broken", ["[1, 2]", "a: [1", "", "name: [x]\ntask: 3\ntrain: null\n"])
def test_a_broken_config_is_still_shown(run: Path, broken: str) -> None:
    (run / "config.yaml").write_text(broken)
    text = read_report(run)
    assert "62.3%" in text and (broken[:5] in text)


def test_a_summary_with_holes(run: Path) -> None:
    (run / "summary.json").write_text(
        json.dumps({"name": None, "before": None, "after": {"raw": None}, "minutes": "x"})
    )
    words = " ".join(Outline(read_report(run)).text)
    assert "before 18.9%" in words and "after, ema 62.3%" in words  # from eval.jsonl
    assert "wall time 8:12" in words  # from metrics.jsonl


def test_everything_from_the_logs_is_escaped(run: Path) -> None:
    evil = '<script>alert("1")</script>'
    row = {**sample(120, "test-ema", 0), "id": evil, "prompt": evil, "pieces": [evil] * 25}
    row |= {"completion": evil, "gold": evil, "parts": {evil: 1.0}}
    write_lines(run / "samples.jsonl", [row])
    write_lines(run / "eval.jsonl", [{**eval_row(0, "test", evil, 0.5, 9), "num_problems": evil}])
    metrics = {**metrics_row(1, random.Random(0)), f"reward/{evil}": 0.5, "updates": evil}
    write_lines(run / "metrics.jsonl", [metrics])
    (run / "config.yaml").write_text(
        yaml.safe_dump({"name": evil, "task": {"name": evil, evil: evil}})
    )
    after = {evil: {**eval_row(1, "test", evil, 0.5, 9), "num_problems": evil}}
    (run / "summary.json").write_text(json.dumps({"name": evil, "after": after, "device": evil}))
    session = {"started": evil, "command": evil, "commits": {evil: evil}, "versions": {evil: evil}}
    (run / "run.json").write_text(json.dumps({"sessions": [session, evil]}))
    text = read_report(run)
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert") > 20
    assert text.count("<script") == 1
    for name in ("run.json", "summary.json", "config.yaml"):
        (run / name).write_text("[" * 100_000)  # deeper than a parser goes
    assert "&lt;script&gt;alert" in read_report(run)


def test_samples_can_be_judged(run: Path) -> None:
    """Plain text, gold answer, verdict, the parts of the reward."""
    row = {
        **sample(120, "test-ema", 0),
        "gold": "( 12 * 2 ) - 7",
        "parts": {"correct": 1.0, "x": None},
    }
    write_lines(run / "samples.jsonl", [row])
    words = " ".join(" ".join(Outline(read_report(run)).text).split())
    assert "gold answer ( 12 * 2 ) - 7" in words
    assert "right | step 120 | test-ema countdown-0" in words and "reward 1.10 (correct 1)" in words
    assert "text 12 * 2 = 24 ; 24 - 7 = 17 ; <answer> ( 12 * 2 ) - 7 </answer>" in words
    write_lines(
        run / "samples.jsonl", [{**row, "correct": False, "gold": None, "prompt": "p" * 500}]
    )
    words = " ".join(" ".join(Outline(read_report(run)).text).split())
    assert "wrong | step 120" in words and "gold answer" not in words
    assert "prompt, 500 characters" in words


def test_tiles_hold_what_the_slider_shows(run: Path) -> None:
    row = {**sample(100, "train", 0, anchored=True), "logps": [math.log(0.5)] * 25}
    write_lines(run / "samples.jsonl", [row])
    text = read_report(run)
    (view,) = re.findall(r'<div class="decoding"[^>]*>', text)
    assert view == f'<div class="decoding" data-calls="{row["nfe"]}" data-block="8">'
    tiles = re.findall(
        r'<span class="tile ([^"]*)" data-at="(\d+)" data-size="(\d+)" data-position="(\d+)" '
        r'data-chance="([^"]*)"',
        text.split('class="decoding"')[1],
    )
    assert sum(int(size) for _, _, size, _, _ in tiles) == 25
    for mark, at, size, position, chance in tiles:
        call = row["decoded_step"][int(position)]
        assert int(at) == min(call, row["nfe"] + 1)
        assert (mark == "anchor") == (call == 0) and (mark == "never") == (call > row["nfe"])
        assert chance == ("0.5000" if 0 < call <= row["nfe"] else "") and (size == "1" or call > 9)
    assert (
        f'max="{row["nfe"]}" value="{row["nfe"]}"' in text and 'aria-label="denoiser call"' in text
    )


def test_the_report_says_how_the_run_was_made(run: Path) -> None:
    assert "How it was made" in read_report(run)
    session = {
        "started": "2026-11-27T09:00:00+00:00",
        "command": "unmaskrl train countdown-mini",
        "commits": {"this folder": "0123456789ab-dirty"},
        "versions": {"torch": "2.13.0"},
        "platform": None,
    }
    (run / "run.json").write_text(json.dumps({"sessions": [session]}))
    words = " ".join(" ".join(Outline(read_report(run)).text).split())
    assert "started 2026-11-27T09:00:00+00:00 command unmaskrl train countdown-mini" in words
    assert "commit of this folder 0123456789ab-dirty versions torch 2.13.0" in words
    assert "platform" not in words


@pytest.mark.parametrize(
    ("decode", "wanted"),
    [
        ({}, 24),
        ({"steps": 12}, 12),
        ({"select": "eb"}, None),  # it decides as it goes
        ({"select": ["x"]}, None),
        ({"block_length": 7}, 28),  # the last of four blocks is decoded whole
        ({"steps": "many"}, None),
    ],
)
def test_calls_without_pruning(run: Path, decode: dict[str, Any], wanted: int | None) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["decode"] |= decode
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(run).unpruned_calls == wanted
    assert ("without pruning" in read_report(run)) == (wanted is not None)


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("")
    for write in (write_report, load_run):
        with pytest.raises(
            ValueError,
            match=r"is no run folder \(none of config.yaml, .* pass what `unmaskrl train` wrote",
        ) as error:
            write(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is no run folder"):
        write_report(tmp_path / "missing")
    assert not (tmp_path / "report.html").exists()


def test_blank_rollouts_are_shown_apart_only_if_some_are_anchored(run: Path) -> None:
    def labels() -> list[str]:
        chart = next(c for c in charts(load_run(run))["Learning"] if c.title == "Rollout accuracy")
        return [line.label for line in chart.lines]

    assert labels() == ["all", "anchored", "blank"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [{**row, "accuracy/anchored": None} for row in rows])
    assert labels() == ["all"]


def test_held_out_curves_start_at_the_base_and_know_their_cost(run: Path) -> None:
    sections = charts(load_run(run))
    by_step = sections["Learning"][0]
    by_cost = sections["Cost"][-1]
    assert [(line.label, line.apart) for line in by_step.lines] == [
        ("validation, ema", False), ("test, ema", True), ("test, raw", True),
    ]  # fmt: skip
    assert by_step.lines[1].points == [(0.0, 0.189), (120.0, 0.623)]
    assert by_cost.lines[1].points == [(0.0, 0.189), (600_000.0, 0.623)]
    step, low, high = by_step.lines[1].bars[1]
    assert step == 120 and low < 0.623 < high


def test_a_supervised_run_shows_the_loss_of_each_part(tmp_path: Path) -> None:
    losses = [
        {"loss/0_sudoku": 3.0, "loss/1_sudoku": 1.0},
        {"loss/0_sudoku": 1.5, "loss/1_sudoku": 1.0},
    ]
    rows = [{"step": s, "loss": 2.0, **parts} for s, parts in enumerate(losses, 1)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (chart,) = charts(load_run(tmp_path))["Learning"]
    assert [(line.label, line.points) for line in chart.lines] == [
        ("0_sudoku", [(1.0, 3.0), (2.0, 1.5)]),
        ("1_sudoku", [(1.0, 1.0), (2.0, 1.0)]),
    ]


def test_phases_are_stacked_and_a_missing_phase_takes_no_time(run: Path) -> None:
    rows = [
        {
            "step": s,
            "seconds/rollout": 1.0,
            "seconds/update": 2.0,
            **({"seconds/score": 4.0} if s == 2 else {}),
        }
        for s in (1, 2)
    ]
    write_lines(run / "metrics.jsonl", rows)
    chart = next(c for c in charts(load_run(run))["Cost"] if c.stacked)
    assert {line.label: [y for _, y in line.points] for line in chart.lines} == {
        "rollout": [1.0, 1.0], "update": [2.0, 2.0], "score": [0.0, 4.0],
    }  # fmt: skip


def test_an_interval_that_reaches_zero_is_drawn(tmp_path: Path) -> None:
    row = {**eval_row(0, "test", "base", 0.01, 50), "accuracy_low": 0.0, "accuracy_high": 0.06}
    write_lines(tmp_path / "eval.jsonl", [row])
    (line,) = charts(load_run(tmp_path))["Learning"][0].lines
    assert line.label == "test, base" and line.bars == [(0.0, 0.0, 0.06)]


def test_importing_the_report_does_not_load_matplotlib() -> None:
    code = (
        "import sys, unmaskrl.reporting.html, unmaskrl.reporting.progress; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
