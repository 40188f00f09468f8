"""Countdown: what is generated, what counts as correct, and files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from unmaskrl.tasks.base import Example
from unmaskrl.tasks.puzzles import arithmetic
from unmaskrl.tasks.puzzles.countdown import Countdown
from unmaskrl.tasks.puzzles.countdown_problems import kind_of

SPLITS = ("train", "validation", "test")


def make(numbers: list[int], target: int) -> Example:
    return Example(
        id="hand", fields={"numbers": numbers, "target": target, "solution": None, "kind": ""}
    )


def template_coverage(examples: list[Example]) -> list[tuple[str, float]]:
    """The share of examples that each fixed template (``( n2 + n3 ) - n1``) solves, best first:
    what a policy that knew only this template would score.
    """
    count = len(examples[0].fields["numbers"])
    names = [f"n{index + 1}" for index in range(count)]
    problems = [(example.fields["numbers"], example.fields["target"]) for example in examples]
    shares = {}
    for tree in arithmetic.templates(count):
        values = [(*arithmetic.ratio(tree, numbers), target) for numbers, target in problems]
        hits = [below != 0 and above == target * below for above, below, target in values]
        shares[arithmetic.render(tree, names)] = sum(hits) / len(problems)
    return sorted(shares.items(), key=lambda item: -item[1])


@pytest.fixture(scope="module", params=[3, 4])
def task(request: pytest.FixtureRequest) -> Countdown:
    return Countdown(numbers=request.param, train_size=1500, eval_size=400)


def test_sizes_ranges_and_distinct_problems(task: Countdown) -> None:
    for split, size in zip(SPLITS, (1500, 400, 400), strict=True):
        examples = task.examples(split)
        assert len(examples) == size
        assert len({example.id for example in examples}) == size
        for example in examples:
            assert len(example.fields["numbers"]) == task.numbers
            assert all(1 <= number <= 20 for number in example.fields["numbers"])
            assert 1 <= example.fields["target"] <= 50


def test_splits_share_no_multiset_of_numbers_for_any_seeds(task: Countdown) -> None:
    seen = {split: set() for split in SPLITS}
    for seed, split in enumerate(SPLITS):
        other = Countdown(numbers=task.numbers, seed=seed, train_size=1500, eval_size=400)
        for example in [*task.examples(split), *other.examples(split)]:
            seen[split].add(tuple(sorted(example.fields["numbers"])))
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_reference_is_right_and_lazy_is_wrong(task: Countdown) -> None:
    for example in task.examples("test"):
        reference = task.reference(example)
        assert reference is not None
        assert task.correct(example, reference)
        assert task.grade(example, reference).parts["format"] == 0.1
        lazy = task.lazy(example)
        assert not task.correct(example, lazy)
        assert task.grade(example, lazy).parts["format"] == 0.1


def test_worked_steps_hold_and_lead_to_the_target(task: Countdown) -> None:
    step = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+) ; ")
    for example in task.examples("validation"):
        reference = task.reference(example) or ""
        steps = step.findall(reference)
        assert len(steps) == task.numbers - 1
        assert step.sub("", reference) == f"<answer> {example.fields['solution']} </answer>"
        assert int(steps[-1][3]) == example.fields["target"]
        for left, op, right, result in steps:
            parsed = arithmetic.parse(f"{left}{op}{right}")
            assert parsed is not None and parsed.value == int(result)
            assert 1 <= int(result) <= 100
            assert not (op in "*/" and right == "1")


def test_no_fixed_template_solves_much(task: Countdown) -> None:
    for split in SPLITS:
        coverage = template_coverage(task.examples(split))
        assert len(coverage) == {3: 68, 4: 1170}[task.numbers]
        assert coverage[0][1] <= 0.05
        lazy = {3: "( n1 + n2 ) + n3", 4: "( ( n1 + n2 ) + n3 ) + n4"}[task.numbers]
        assert dict(coverage)[lazy] == 0.0


def test_template_coverage_by_hand() -> None:
    examples = [make([1, 2, 9], 10), make([3, 4, 5], 6), make([2, 3, 4], 24)]
    coverage = dict(template_coverage(examples))
    assert coverage["( n2 + n3 ) - n1"] == pytest.approx(2 / 3)
    assert coverage["( n1 * n2 ) * n3"] == pytest.approx(1 / 3)
    assert coverage["( n1 + n2 ) + n3"] == 0.0


def test_multiplication_and_division_are_well_represented(task: Countdown) -> None:
    examples = task.examples("train")
    used = Counter(
        op for example in examples for op in set(example.fields["solution"]) & set("+-*/")
    )
    kinds = Counter(example.fields["kind"] for example in examples)
    assert used["*"] > 0.25 * len(examples)
    assert used["/"] > 0.2 * len(examples)
    assert kinds["muldiv"] > 0.5 * len(examples) > kinds["addsub"] > 0.1 * len(examples)


def test_kind_is_what_search_says(task: Countdown) -> None:
    for example in task.examples("test")[:60]:
        numbers = example.fields["numbers"]
        target = example.fields["target"]
        values = {
            arithmetic.ratio(tree, numbers)
            for tree in arithmetic.templates(len(numbers))
            if not set(arithmetic.render(tree)) & set("*/")
        }
        assert example.fields["kind"] == ("addsub" if (target, 1) in values else "muldiv")


def test_kind_by_hand() -> None:
    assert kind_of([3, 7, 12], 16) == "addsub"
    assert kind_of([12, 3, 7], 2) == "addsub"
    assert kind_of([3, 7, 12], 33) == "muldiv"


def test_references_are_right_and_differ(task: Countdown) -> None:
    several = 0
    for example in task.examples("validation")[:80]:
        references = task.references(example, limit=5)
        assert references[0] == task.reference(example)
        assert len(set(references)) == len(references) <= 5
        assert all(task.correct(example, reference) for reference in references)
        several += len(references) > 1
    assert several > 5


def test_the_layout_token_by_token() -> None:
    task = Countdown()
    example = Example(
        id="hand",
        fields={
            "numbers": [3, 7, 12],
            "target": 33,
            "solution": "( 3 * 7 ) + 12",
            "kind": "muldiv",
        },
    )
    reference = "3 * 7 = 21 ; 21 + 12 = 33 ; <answer> ( 3 * 7 ) + 12 </answer>"
    assert task.reference(example) == reference
    assert task.lazy(example) == "3 + 7 = 10 ; 10 + 12 = 22 ; <answer> ( 3 + 7 ) + 12 </answer>"
    assert [reference[start:end] for start, end in task.answer_spans(reference)] == [
        " ( 3 * 7 ) + 12 "
    ]
    assert task.prompt(example) == [{"role": "user", "content": "numbers 3 7 12 target 33"}]


def test_instruct_prompt_states_the_problem() -> None:
    content = Countdown(prompt_style="instruct").prompt(make([3, 7, 12], 33))[0]["content"]
    assert (
        "3, 7, 12" in content and "33" in content and "<answer>" in content and "{" not in content
    )


@pytest.mark.parametrize(
    ("text", "correct", "formatted"),
    [
        ("<answer>3*7+12</answer>", True, True),
        ("so <answer> 12 + ( 7 * 3 ) </answer> done", True, True),
        ("<answer>1</answer> no: <answer>3*7+12</answer>", True, False),
        ("<answer>3*7+12</answer> no: <answer>1</answer>", False, False),
        ("<answer>3*7+12</answer> <answer>1", True, False),
        ("<answer>3*7+12</answer></answer>", True, False),
        ("<answer>1<answer>3*7+12</answer>", True, False),
        ("</answer>3*7+12<answer>", False, False),
        ("3*7+12", False, False),
        ("<answer>3*7+12", False, False),
        ("<answer>3*7+12=33</answer>", True, True),
        ("<answer>3*7+12 = 33.0.</answer>", True, True),
        ("<answer>3*7+12=34</answer>", False, False),
        ("<answer>3*7+12=33=33</answer>", False, False),
        ("<answer>3*7+12=</answer>", False, False),
        ("<answer>33=33</answer>", False, True),
        ("<answer>x = 3*7+12</answer>", False, False),
        ("<answer>3*7=21 and 21+12=33</answer>", False, False),
        ("<answer>so \\boxed{3\\cdot 7+12}</answer>", True, True),
        ("<answer>\\boxed{3*7+1} or \\boxed{3*7+12}</answer>", True, True),
        ("<answer>\\boxed{3*7+12</answer>", False, False),
        ("<answer>\\frac{3*7}{1}+12</answer>", False, True),
        ("<answer>3\\,7+12</answer>", False, False),
        ("<answer>3**7+12</answer>", False, False),
        ("<answer>33</answer>", False, True),
        ("<answer>3*7+12+12</answer>", False, True),
        ("<answer>3*7+12+3-3</answer>", False, True),
        ("<answer>37-4</answer>", False, True),
        ("<answer>12/(7-7)*3</answer>", False, True),
        ("<answer></answer>", False, False),
        ("<Answer>3*7+12</Answer>", False, False),
        ("<answer>\u0663*7+12</answer>", False, False),
    ],
)
def test_judge_by_hand(text: str, correct: bool, formatted: bool) -> None:
    task = Countdown()
    example = make([3, 7, 12], 33)
    assert task.correct(example, text) is correct
    assert task.grade(example, text).parts["correct"] == float(correct)
    assert task.grade(example, text).parts["format"] == (0.1 if formatted else 0.0)


def test_repeated_numbers_and_rational_results() -> None:
    task = Countdown()
    assert task.correct(make([3, 3, 8, 8], 24), "<answer> 8 / ( 3 - 8 / 3 ) </answer>")
    assert not task.correct(make([3, 3, 7], 21), "<answer> 3 * 7 </answer>")
    assert task.correct(make([3, 3, 7], 27), "<answer> 3 * 7 + 3 + 3 </answer>") is False


def test_same_problems_in_another_process() -> None:
    code = (
        "from unmaskrl import tasks\n"
        "import hashlib, sys\n"
        "ids = [e.id for n in ('countdown', 'sudoku') for s in ('train', 'test')\n"
        "       for e in tasks.load(n, train_size=300, eval_size=50, seed=3).examples(s)]\n"
        "sys.stdout.write(hashlib.sha256(' '.join(ids).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and "" not in digests


def test_seed_changes_the_problems_and_calls_do_not() -> None:
    first = Countdown(train_size=200).examples("train")
    again = Countdown(train_size=200).examples("train")
    assert first == again
    assert first is not again
    assert first != Countdown(train_size=200, seed=1).examples("train")


def test_sizes_beyond_what_exists_are_refused_with_a_size_that_works() -> None:
    settings = {"max_number": 8, "max_target": 20}
    with pytest.raises(
        ValueError, match=r"only about \d+ balanced train problems .* got a size of 50000"
    ) as info:
        Countdown(train_size=50_000, **settings).examples("train")
    available = int(re.findall(r"about (\d+)", str(info.value))[0])
    assert available > 100
    fits = Countdown(train_size=int(0.9 * available), **settings).examples("train")
    assert template_coverage(fits)[0][1] <= 0.05


def rows_file(folder: Path, *lines: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_rows_replace_every_split(tmp_path: Path) -> None:
    row = {"numbers": [3, 7, 12], "target": 33, "source": "hand"}
    # 8 / (3 - 8 / 3): solvable, but not with whole results
    fractions = {"numbers": [3, 3, 8, 8], "target": 24}
    big = {"numbers": [99, 98, 2, 1], "target": 9703}
    path = rows_file(tmp_path, json.dumps(row), "", json.dumps(fractions), json.dumps(big))
    task = Countdown(data=path)
    for split in SPLITS:
        first, second, third = task.examples(split)
        assert first.fields["source"] == "hand" and first.fields["kind"] == "muldiv"
        assert task.correct(first, task.reference(first) or "")
        assert second.fields["solution"] is None
        assert task.reference(second) is None and task.references(second) == []
        assert task.correct(third, task.reference(third) or "")


def test_a_problem_without_solution_is_refused(tmp_path: Path) -> None:
    path = rows_file(
        tmp_path,
        json.dumps({"numbers": [3, 7, 12], "target": 33}),
        json.dumps({"numbers": [1, 1, 1], "target": 50}),
    )
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: no expression of the numbers \[1, 1, 1\] is 50"
    ):
        Countdown(data=path).examples("train")


def test_rows_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = rows_file(tmp_path, '{"numbers": [1, 2, 3], "target": 5}')
    assert len(Countdown(data=path).examples("test")) == 1
    rows_file(tmp_path, *['{"numbers": [1, 2, 3], "target": 5}'] * 2)
    assert len(Countdown(data=path).examples("test")) == 2


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "'{'"),
        ("[1, 2]", r"'\[1, 2\]'"),
        ("1" * 6000, "'111"),
        ("[" * 100_000, r"'\[\["),
        ("{}", "numbers None"),
        ('{"numbers": [1, 2], "target": 3}', r"numbers \[1, 2\]"),
        ('{"numbers": [1, 2, 3, 4, 5], "target": 3}', r"numbers \[1, 2, 3, 4, 5\]"),
        ('{"numbers": [1, 2, 0], "target": 3}', r"numbers \[1, 2, 0\]"),
        ('{"numbers": [1, 2, true], "target": 3}', r"numbers \[1, 2, True\]"),
        ('{"numbers": [1, 2, 2.5], "target": 3}', r"numbers \[1, 2, 2.5\]"),
        ('{"numbers": "1 2 3", "target": 3}', "numbers '1 2 3'"),
        ('{"numbers": [1, 2, 3]}', "target None"),
        ('{"numbers": [1, 2, 3], "target": "6"}', "target '6'"),
        ('{"numbers": [1, 2, 3], "target": 1000000}', "target 1000000"),
    ],
)
def test_bad_rows_name_file_line_and_value(tmp_path: Path, line: str, got: str) -> None:
    path = rows_file(tmp_path, '{"numbers": [1, 2, 3], "target": 5}', line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: got {got}.*, expected") as info:
        Countdown(data=path).examples("train")
    assert len(str(info.value)) < 300 and "\n" not in str(info.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        Countdown(data=str(tmp_path / "absent.jsonl")).examples("train")
    with pytest.raises(ValueError, match="empty file"):
        Countdown(data=rows_file(tmp_path, "", " ")).examples("train")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"numbers": [1, 2, 3], "target": 5, "note": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: got"):
        Countdown(data=str(latin)).examples("train")
