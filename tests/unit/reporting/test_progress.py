"""Progress displays on a terminal and in a log, and the closing table."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unmaskrl.reporting.progress import Progress, summary_table
from unmaskrl.reporting.words import (
    duration,
    eval_line,
    interval,
    mean,
    number,
    preferred,
    verdict,
)

BASE = {
    "split": "test",
    "weights": "base",
    "step": 0,
    "accuracy": 0.189,
    "accuracy_low": 0.157,
    "accuracy_high": 0.225,
    "num_problems": 512,
    "nfe": 14.84,
    "tokens_per_call": 1.45,
}
AFTER = {
    **BASE,
    "weights": "ema",
    "step": 120,
    "accuracy": 0.623,
    "accuracy_low": 0.58,
    "accuracy_high": 0.664,
}


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 60) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width), file


def terminal(width: int = 110) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, height=40, force_terminal=True, color_system=None), file


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward/mean": 0.5,
        "reward/std": 0.4,
        "reward/correct": 0.42,
        "reward/format": 0.08,
        "accuracy/rollout": 0.42,
        "accuracy/anchored": None,
        "accuracy/blank": 0.42,
        "groups/live": 0.75,
        "nfe/mean": 12.25,
        "nfe/tokens_per_call": 1.6,
        "seconds/rollout": 1.0,
        "seconds/update": 3.0,
        **changes,
    }


def last_frame(text: str) -> str:
    """What is left on the screen when the display has stopped."""
    return text[text.rindex("\x1b[1A") :] if "\x1b[1A" in text else text


def test_a_log_gets_the_first_and_last_step_and_one_line_in_ten_seconds() -> None:
    console, file = plain()
    clock = Clock()
    progress = Progress(console, clock=clock)
    progress.start(30, "run")
    for step in range(1, 31):
        clock.now += 4.0
        progress.step(metrics(step))
    progress.stop()
    lines = file.getvalue().splitlines()
    assert lines[0] == "run: 30 steps"
    assert [int(re.match(r"step (\d+)/30", line).group(1)) for line in lines[1:]] == [
        *range(1, 30, 3),
        30,
    ]


def test_evals_and_notes_are_always_printed_each_on_one_line() -> None:
    console, file = plain(width=40)
    progress = Progress(console, clock=Clock())
    progress.note("before the start [not markup]")
    progress.start(100, "run")
    for step in range(1, 5):
        progress.step(metrics(step))
        progress.eval({**BASE, "split": "validation", "step": step})
        progress.note("checkpoint " + "x" * 80)
    lines = file.getvalue().splitlines()
    assert lines[0] == "before the start [not markup]"
    assert sum(line.startswith("eval validation base step") for line in lines) == 4
    assert lines.count("checkpoint " + "x" * 80) == 4
    assert sum(line.startswith("step ") for line in lines) == 1


def test_the_line_averages_the_last_ten_steps_and_says_what_is_left() -> None:
    console, file = plain()
    clock = Clock()
    progress = Progress(console, every=0.0, clock=clock)
    progress.start(20, "run")
    for step in range(1, 13):
        clock.now += 2.0
        progress.step(
            metrics(
                step, **{"reward/mean": float(step), "seconds/score": 5.0} if step == 12 else {}
            )
        )
    progress.eval(AFTER)
    line = file.getvalue().splitlines()[-2]
    assert line.startswith("step 12/20 | reward 1.650 |")  # (9 * 0.5 + 12) / 10
    assert "accuracy all 42.0%  blank 42.0% |" in line
    assert "12.2 calls/rollout" in line
    assert "4.5 s/step (rollout 1.0, score 0.5, update 3.0)" in line  # 5 s once in ten steps
    assert line.endswith("left 0:16")  # 8 steps of 2 s


def test_time_left_of_a_resumed_run_counts_only_its_own_steps() -> None:
    console, file = plain()
    clock = Clock()
    progress = Progress(console, every=0.0, clock=clock)
    progress.start(100, "run")
    progress.step(metrics(81))
    assert "left" not in file.getvalue()
    clock.now += 3.0
    progress.step(metrics(82))
    assert file.getvalue().splitlines()[-1].endswith("left 0:54")


@pytest.mark.parametrize(
    "row", [{}, {"step": 3}, {"step": 1, "reward/mean": None, "nfe/mean": float("nan")}]
)
def test_missing_metrics_are_left_out(row: dict[str, Any]) -> None:
    console, file = plain()
    progress = Progress(console, clock=Clock())
    progress.start(5, "run")
    progress.step(row)
    progress.eval({})
    assert re.search(r"^step \d/5", file.getvalue(), re.MULTILINE)
    assert "nan" not in file.getvalue() and "None" not in file.getvalue()


def test_a_terminal_shows_bar_numbers_and_the_log_above() -> None:
    console, file = terminal()
    clock = Clock()
    progress = Progress(console, clock=clock)
    progress.start(40, "countdown [s0]")
    progress.eval(BASE)
    for step in (1, 2):
        clock.now += 60.0
        progress.step(metrics(step))
    progress.note("saved")
    progress.stop()
    progress.stop()
    text = file.getvalue()
    assert (
        "eval test base step 0: accuracy 18.9%, 95% interval 15.7-22.5%, 512 problems, 14.8 calls "
        "each" in text
    )
    assert "saved" in text and "countdown [s0]: 40 steps" in text
    frame = last_frame(text)
    for part in (
        "step 2/40",
        "2:00 elapsed, 38:00 left",
        "0.500 (correct 0.42, format 0.08)",
        "all 42.0%  blank 42.0%",
        "test 18.9% (base, step 0)",
        "12.2 (1.60 tokens per call)",
        "75.0%",
        "4.0 (rollout 1.0, update 3.0)",
    ):
        assert part in frame, part


def test_the_terminal_display_can_start_again() -> None:
    console, file = terminal()
    progress = Progress(console, clock=Clock())
    progress.start(5, "one")
    progress.step(metrics(4))
    progress.start(7, "two")
    progress.stop()
    assert "step 0/7" in last_frame(file.getvalue())


def test_sft_shows_losses_rate_and_notes() -> None:
    console, file = plain()
    clock = Clock()
    progress = Progress(console, every=0.0, clock=clock)
    progress.start(500, "base")
    progress.step({"note": "a broken checkpoint was skipped"})
    for step in (10, 20):
        clock.now += 5.0
        row = {
            "step": step,
            "steps": 300,
            "loss": 0.51234,
            "loss/0_sudoku": 0.25,
            "lr": 0.00123,
            "seconds": 5.0,
        }
        progress.step(row)
    progress.stop()
    lines = file.getvalue().splitlines()
    assert lines[1] == "a broken checkpoint was skipped"
    assert lines[-1] == "step 20/300 | loss 0.5123 | loss 0_sudoku 0.2500 | lr 1.23e-03 | left 2:20"


def test_sft_on_a_terminal() -> None:
    console, file = terminal()
    progress = Progress(console, clock=Clock())
    progress.start(500, "base")
    progress.step({"step": 10, "steps": 500, "loss": 0.5, "lr": 1e-3})
    progress.eval({"accuracy": 0.5})
    progress.stop()
    assert "step 10/500" in last_frame(file.getvalue()) and "0.5000" in last_frame(file.getvalue())
    assert "accuracy 50.0%" in file.getvalue()


def test_without_a_console_it_is_silent_but_for_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    silent = Progress()
    silent.start(3, "x")
    silent.phase("rollout", 3)
    silent.call()
    silent.step(metrics(1))
    silent.eval(BASE)
    silent.note("x")
    silent.stop()
    assert capsys.readouterr() == ("", "")
    silent.warn("disk full")
    assert capsys.readouterr() == ("", "unmaskrl: warning: disk full\n")


def test_the_phase_moves_inside_a_step() -> None:
    console, file = terminal()
    progress = Progress(console, clock=Clock())
    progress.start(5, "run")
    seen = []

    def now() -> str:
        return dict(progress.details()).get("now", "")

    progress.phase("loading mini")
    seen.append(now())
    progress.phase("evaluating test (base)", 512, 0, unit="problems")
    progress.call()
    seen.append(now())
    progress.phase("evaluating test (base)", 512, 128, unit="problems")
    seen.append(now())
    progress.phase("rollout", 123, unit="calls")
    for _ in range(40):
        progress.call()
    seen.append(now())
    progress.phase("update", 4, 2)
    seen.append(now())
    progress.stop()
    assert seen == [
        "loading mini",
        "evaluating test (base) 0/512 problems, call 1",
        "evaluating test (base) 128/512 problems",
        "rollout 40/123 calls",
        "update 2/4",
    ]
    assert "now" in last_frame(file.getvalue()) and "update 2/4" in last_frame(file.getvalue())
    progress.step(metrics(1))
    assert now() == ""


def test_a_log_is_told_the_phase_when_nothing_was_said_for_a_minute() -> None:
    console, file = plain()
    clock = Clock()
    progress = Progress(console, clock=clock)
    progress.start(5, "run")
    progress.phase("rollout", 100, unit="calls")
    for _ in range(100):
        clock.now += 1.5
        progress.call()
    assert file.getvalue().splitlines()[1:] == [
        "step 0/5 | rollout 40/100 calls | elapsed 1:00",
        "step 0/5 | rollout 80/100 calls | elapsed 2:00",
    ]


def test_the_closing_table_says_everything() -> None:
    console, file = plain(width=120)
    console.print(
        summary_table(
            BASE, {"raw": {**AFTER, "accuracy": 0.6}, "ema": AFTER}, 8.2, Path("runs/a/report.html")
        )
    )
    text = file.getvalue()
    assert "512 problems" in text
    assert re.search(r"before\s+.\s+18\.9%\s+.\s+15\.7-22\.5%\s+.\s+14\.8\s+.\s+1\.45", text)
    assert re.search(r"after \(raw\)\s+.\s+60\.0%", text) and re.search(
        r"after \(ema\)\s+.\s+62\.3%", text
    )
    # of the exported weights, EMA
    assert "The 95% intervals do not overlap (+43.4 points)." in text
    assert "Wall time 8:12" in text and "Report runs/a/report.html" in text


def test_the_closing_table_of_a_run_without_evaluation() -> None:
    console, file = plain(width=120)
    console.print(summary_table({}, {}, 0.5, "report.html"))
    assert "No comparison" in file.getvalue() and "Wall time 0:30" in file.getvalue()


@pytest.mark.parametrize(
    ("low", "share", "high", "words"),
    [
        (0.226, 0.24, 0.26, "do not overlap (+5.1 points)"),
        (0.225, 0.24, 0.26, "overlap: the change of +5.1 points may be chance"),
        (0.15, 0.189, 0.22, "overlap: the change of +0.0 points"),
        (0.05, 0.1, 0.156, "do not overlap (-8.9 points)"),
        (0.1, 0.12, 0.157, "overlap: the change of -6.9 points"),
    ],
)
def test_verdict(low: float, share: float, high: float, words: str) -> None:
    said = verdict(BASE, {"accuracy": share, "accuracy_low": low, "accuracy_high": high})
    assert words in said
    assert ("not overlap" in said) == ("not overlap" in words)


def test_verdict_needs_both_intervals() -> None:
    assert verdict(BASE, {"accuracy": 0.9}).startswith("No comparison")
    assert verdict({}, AFTER).startswith("No comparison")


def test_the_exported_weights_are_preferred() -> None:
    assert preferred({"raw": BASE, "ema": AFTER}) is AFTER
    assert preferred({"raw": BASE}) is BASE
    assert preferred({}) == {}


def test_small_formats() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599.0, 3600.0)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
    ]
    assert [number({"k": v}, "k") for v in (1, 2.5, True, None, "3", float("inf"))] == [
        1,
        2.5,
        None,
        None,
        None,
        None,
    ]
    assert mean([1.0, None, 3.0]) == 2 and mean([None]) is None
    assert interval({"accuracy_low": 0.5}) == "-"
    assert (
        eval_line({"split": "test", "weights": "ema", "accuracy": 0.5})
        == "eval test ema: accuracy 50.0%"
    )
