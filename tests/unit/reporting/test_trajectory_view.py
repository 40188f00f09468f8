"""One decoding as a grid: the row made from a rollout, its cells, and the views of terminal and
page.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import finished_rollout
from unmaskrl.models.tokenizer import build_mini_tokenizer, load_tokenizer, sample_row
from unmaskrl.reporting.trajectory import (
    Cell,
    calls_listing,
    cells,
    colour,
    ink_on,
    is_sample,
    luminance,
    print_trajectory,
    trajectory_text,
    view,
    visible,
)


def row(**changes: Any) -> dict[str, Any]:
    """Two anchors, three calls of which the last is the exit, two tokens never revealed."""
    return {
        "step": 7,
        "split": "train",
        "id": "countdown-1",
        "prompt": "numbers 3 7 target 21",
        "reward": 1.1,
        "correct": True,
        "nfe": 3,
        "temperature": 1.0,
        "pieces": ["3", "*", "7", "=", "21", "eos", "pad", "pad"],
        "decoded_step": [2, 0, 1, 0, 3, 3, 4, 4],
        "anchor": [False, True, False, True, False, False, False, False],
        "exit": [False, False, False, False, True, True, False, False],
        "logps": [-0.5, 0, -0.25, 0, -1.5, -2, 0, 0],
        **changes,
    }


def shown(renderable: Any, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(renderable)
    return file.getvalue()


def test_sample_row_is_the_completion_of_one_rollout_row(tmp_path: Path) -> None:
    build_mini_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(["3", "*", "7", "<|endoftext|>"])
    rollout = finished_rollout(
        [ids[::-1], ids],
        [[1, 2, 3, 4], [1, 0, 2, 2]],
        eos_id=tokenizer.eos_token_id,
        left_pad=1,
        exit_step=[0, 2],
    )
    rollout.behavior_logps[1, -4:] = rollout.behavior_logps.new_tensor([-0.123456789, 0, -1, -2])
    made = sample_row(
        rollout,
        1,
        tokenizer,
        step=3,
        split="train",
        example_id="a",
        prompt_text="p",
        completion_text="c",
        reward=1.0,
        correct=True,
    )
    assert made["pieces"] == ["3", "*", "7", "<|endoftext|>"]
    assert made["decoded_step"] == [1, 0, 2, 2]
    assert made["anchor"] == [False, True, False, False]
    assert made["exit"] == [False, False, True, True]
    assert made["logps"] == [-0.12346, 0, -1, -2]
    assert (made["nfe"], made["temperature"], made["anchored"], made["reward"]) == (
        2,
        1.0,
        True,
        1.0,
    )
    assert (made["id"], made["split"], made["prompt"], made["completion"]) == (
        "a",
        "train",
        "p",
        "c",
    )
    assert json.loads(json.dumps(made)) == made
    assert is_sample(made)


def test_exit_flags_need_an_exit(tmp_path: Path) -> None:
    """exit_step 0 must not make the given tokens (decoded_step 0) exit tokens."""
    build_mini_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rollout = finished_rollout([[5, 6]], [[0, 1]], eos_id=1)
    texts = {"split": "s", "example_id": "", "prompt_text": "", "completion_text": ""}
    made = sample_row(rollout, 0, tokenizer, step=0, reward=0.0, correct=False, **texts)
    assert made["exit"] == [False, False]
    assert made["anchored"] is True


def test_cells_know_their_call_mark_and_place() -> None:
    three, star, seven, equals, answer, eos, rest = cells(row())
    assert [c.label for c in (three, star, seven, equals, answer, eos, rest)] == [
        "2", "given", "1", "given", "3*", "3*", "x 2",
    ]  # fmt: skip
    assert [c.share for c in (three, seven, answer)] == [0.5, 0.0, 1.0]
    assert star.anchor and star.share is None and not star.unseen
    assert eos.exit and not three.exit
    assert rest.unseen and rest.text == "pad"
    assert three.tip == "position 0, call 2, log-prob -0.50 nats"
    assert answer.tip == "position 4, call 3, exit call, log-prob -1.50 nats"


def test_only_equal_neighbours_that_were_never_revealed_share_a_cell() -> None:
    same = cells(row(pieces=["x"] * 8, decoded_step=[1, 1, 2, 2, 3, 4, 4, 3], exit=None))
    assert [(c.text, c.label) for c in same] == [
        ("x", "1"), ("x", "1"), ("x", "2"), ("x", "2"), ("x", "3"), ("x", "x 2"), ("x", "3"),
    ]  # fmt: skip


def test_cells_need_only_pieces_and_steps() -> None:
    few = cells({"pieces": ["a", "b"], "decoded_step": [0, 2]})
    assert [(c.label, c.share) for c in few] == [("given", None), ("2", 1.0)]


def test_columns_of_a_wrong_length_are_ignored() -> None:
    assert [c.exit for c in cells(row(exit=[True], logps=[0.0], anchor=None))] == [False] * 7


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"pieces": ["a"]},
        {"pieces": ["a"], "decoded_step": [1, 2]},
        {"pieces": [], "decoded_step": []},
    ],
)
def test_a_row_that_is_no_sample_is_refused(broken: dict[str, Any]) -> None:
    assert not is_sample(broken)
    with pytest.raises(ValueError, match="needs pieces and decoded_step of one length"):
        cells(broken)


def test_colours_grow_lighter_and_their_ink_can_be_read() -> None:
    ramp = [colour(i / 50) for i in range(51)]
    lightness = [luminance(c) for c in ramp]
    assert lightness == sorted(lightness)
    assert (ramp[0], ramp[-1], colour(-1.0), colour(2.0)) == (
        "#440154",
        "#fde725",
        "#440154",
        "#fde725",
    )
    for background in ramp:
        low, high = sorted((luminance(background), luminance(ink_on(background))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, background
    assert luminance("#ffffff") == pytest.approx(1) and luminance("#000000") == 0


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (" the", "\u00b7the"),
        ("a  ", "a\u00b7\u00b7"),
        ("  ", "\u00b7\u00b7"),
        ("\n", "\\n"),
        ("a\x1b[31m", "a\\x1b[31m"),
        ("", ""),
    ],
)
def test_visible_shows_blanks_and_controls(piece: str, text: str) -> None:
    assert visible(piece) == text


def test_visible_shortens() -> None:
    assert visible("y" * 60) == "y" * 37 + "..."


def test_terminal_view_in_words() -> None:
    text = shown(trajectory_text(row()))
    for part in (
        "numbers 3 7 target 21",
        "correct: yes",
        "3 calls",
        "reward 1.10",
        "T=1",
        "3*",
        "x 2",
    ):
        assert part in text
    assert "given anchor" in text and "exit call" in text and "never revealed" in text
    assert "correct: no" in shown(trajectory_text(row(correct=False)))


def test_terminal_legend_names_only_what_occurs() -> None:
    plain = shown(trajectory_text(row(decoded_step=[1, 2, 3, 1, 2, 3, 1, 2], exit=[False] * 8)))
    assert "anchor" not in plain and "exit call" not in plain and "never revealed" not in plain


def test_terminal_cells_are_coloured_by_call_and_anchors_stand_out() -> None:
    text = shown(
        trajectory_text(row(), listing=False), force_terminal=True, color_system="truecolor"
    )
    # call 1 of 3, white on the darkest colour
    assert "\x1b[38;2;255;255;255;48;2;68;1;84m 7 " in text
    assert "48;2;253;231;37" in text  # the last call
    assert "\x1b[1;4m*\x1b" in text  # the anchor, bold and underlined, without background
    assert "\x1b[2m pad " in text


@pytest.mark.parametrize("width", [20, 40, 79])
def test_terminal_view_fits_any_width(width: int) -> None:
    long = row(pieces=["w" * 50, *row()["pieces"][1:]])
    assert max(map(len, shown(trajectory_text(long), width=width).splitlines())) <= width


def test_listing_names_every_revealed_token_once() -> None:
    lines = shown(calls_listing(row()), width=30).splitlines()
    assert [re.sub(r"\s+", " ", line).strip() for line in lines] == [
        "call 1: 2 7",
        "call 2: 0 3",
        "call 3: 4 21 5 eos",
    ]


def test_markup_in_tokens_stays_text() -> None:
    text = shown(
        trajectory_text(row(pieces=["[bold]", *row()["pieces"][1:]], prompt="[red]p[/red]"))
    )
    assert "[bold]" in text and "[red]p[/red]" in text


def test_print_trajectory_can_leave_the_grade_out() -> None:
    file = io.StringIO()
    print_trajectory(row(split="sample"), Console(file=file, width=90), graded=False)
    text = file.getvalue()
    assert "sample countdown-1" in text and "3 calls" in text
    assert "correct" not in text and "reward" not in text and "step" not in text


def test_view_of_a_page() -> None:
    seen = view(row(completion="3 * 7 = 21", parts={"correct": 1.0}))
    assert (seen.calls, seen.verdict, seen.text) == (3, "right", "3 * 7 = 21")
    assert seen.summary == "4 tokens revealed in 3 denoiser calls"
    assert seen.headline == "step 7 | train countdown-1 | 3 calls | reward 1.10 (correct 1) | T=1"
    three, star, *_, rest = seen.cells
    assert (three.at, three.position, three.marks) == (2, 0, ["drawn"])
    assert three.chance == pytest.approx(0.6065, abs=1e-4) and three.chance_text == "0.6065"
    assert (star.at, star.marks, star.chance) == (0, ["anchor"], None)
    assert (rest.at, rest.size, rest.marks) == (4, 2, ["never"])
    assert seen.cells[4].marks == ["drawn", "exit"]
    assert view(row(correct=None)).verdict == "" and view(row(correct=False)).verdict == "wrong"
    assert view(row(logps=[float("nan")] * 8)).cells[0].chance is None


def test_cell_width_counts_columns() -> None:
    assert Cell(text="\u4e2d\u6587", label="1").width == 6
    assert Cell(text="a", label="given").width == 7
