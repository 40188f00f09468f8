"""Tasks of the user's own: judges, reward functions of TRL's contract, splits by a column, and
clear refusals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.offline_tasks import CHAT_ROWS, offline_task, write_rows
from unmaskrl import tasks
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import decode_texts, load_tokenizer
from unmaskrl.recipes.schema import SFTMixture
from unmaskrl.tasks import Example, Grade
from unmaskrl.tasks.base import SPLITS
from unmaskrl.training.sft.data import encode_mixture


def length(
    prompts: list[Any], completions: list[str], answer: list[str], **_: object
) -> list[float]:
    return [len(text) / len(gold) for text, gold in zip(completions, answer, strict=True)]


CALLS: list[int] = []


def calls_counted(
    prompts: list[Any], completions: list[str], gold: list[str | None], **_: object
) -> list[float]:
    CALLS.append(len(completions))
    return [float(text == right) for text, right in zip(completions, gold, strict=True)]


def abstains(completions: list[str]) -> list[None]:
    return [None] * len(completions)


def seen_form(prompts: list[Any], completions: list[Any], **_: object) -> list[float]:
    """0 for texts, 1 for chats."""
    forms = [
        (type(prompt), type(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return [{(str, str): 0.0, (list, list): 1.0}[form] for form in forms]


def not_one_per_row(prompts: list[Any], completions: list[str], **_: object) -> list[float]:
    return []


HERE = "tests.unit.tasks.test_tasks_jsonl"


@pytest.mark.parametrize(
    ("verifier", "gold", "text", "correct"),
    [
        ("exact", "red  fox", "<answer> red fox\n</answer>", True),
        ("exact", "red fox", "<answer>Red fox</answer>", False),
        ("exact", "5", "5", False),
        ("number", "1,234", "<answer>$1234.0</answer>", True),
        ("number", 7, "<answer>7</answer>", True),
        ("number", 7, "<answer>7 or 8</answer>", False),
        ("number", "seven", "<answer>seven</answer>", False),
        ("math", "\\frac12", "<answer>\\boxed{0.5}</answer>", True),
        ("math", "\\frac12", "<answer>1/2</answer>", True),
        ("math", "\\frac12", "<answer>1/3</answer>", False),
    ],
)
def test_verifiers_by_hand(verifier: str, gold: object, text: str, correct: bool) -> None:
    task = tasks.load("jsonl", data="rows.jsonl", verifier=verifier)
    example = Example(id="hand", fields={"prompt": "?", "answer": gold})
    assert task.correct(example, text) is correct
    rewards = task.grade(example, text).parts
    assert rewards == {"correct": float(correct), "format": 0.1 if "<answer>" in text else 0.0}


def test_reward_functions_decide(tmp_path: Path) -> None:
    both = [f"{HERE}:length", f"{HERE}:length"]
    task = offline_task("jsonl", tmp_path, reward=f"{HERE}:length", correct_at=3.0)
    example = task.examples("train")[0]
    wide = "x" * 3 * len(example.fields["answer"])
    assert task.correct(example, wide) and not task.correct(example, wide[:-1])
    assert task.grade(example, wide).parts == {f"{HERE}:length": 3.0}
    assert task.reference(example) is None
    twice = tasks.load("jsonl", data="x.jsonl", reward=both)
    assert list(twice.grade(example, wide).parts) == [f"{HERE}:length"]


def test_a_batch_is_scored_in_one_call_for_rewards_and_correctness() -> None:
    CALLS.clear()
    task = tasks.load("jsonl", data="x.jsonl", reward=[f"{HERE}:calls_counted", f"{HERE}:abstains"])
    rows = [
        Example(id=str(n), fields={"prompt": "?"} | ({"gold": "b"} if n else {})) for n in range(3)
    ]
    grades = tasks.grade(task, rows, ["a", "b", "b"])
    assert CALLS == [3]
    assert grades.parts == {
        f"{HERE}:calls_counted": [0.0, 1.0, 1.0],
        f"{HERE}:abstains": [None] * 3,
    }
    assert grades.correct == [False, True, True] and grades.totals() == [0.0, 1.0, 1.0]
    # the task's functions of one row say the same
    assert task.grade(rows[1], "b") == Grade(True, {f"{HERE}:calls_counted": 1.0})


def test_completions_are_chats_where_rows_are_and_texts_where_rows_are() -> None:
    chat = [{"role": "user", "content": "?"}]
    rows = [
        Example(id=name, fields={"prompt": prompt})
        for name, prompt in (("text", "?"), ("chat", chat))
    ]
    name = f"{HERE}:seen_form"
    for system, forms in ((None, [0.0, 1.0]), ("Be brief.", [1.0, 1.0])):
        task = tasks.load("jsonl", data="x.jsonl", reward=name, system=system)
        assert tasks.grade(task, rows, ["a", "a"]).parts == {name: forms}


def test_prompts_may_be_texts_or_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows = [
        {"q": [*chat, {"role": "user", "content": str(n)}] if n % 2 else f"q {n}", "answer": "1"}
        for n in range(60)
    ]
    data = write_rows(tmp_path / "a.jsonl", rows)
    task = tasks.load("jsonl", data=data, prompt_column="q", verifier="exact", system="Be brief.")
    seen = {len(task.prompt(example)) for split in SPLITS for example in task.examples(split)}
    assert seen == {2, 3}
    assert task.prompt(task.examples("train")[0])[0] == {"role": "system", "content": "Be brief."}


def test_references_come_from_a_column(tmp_path: Path) -> None:
    rows = [{**row, "worked": f"so <answer> {row['answer']} </answer>"} for row in CHAT_ROWS]
    data = write_rows(tmp_path / "a.jsonl", rows)
    task = tasks.load("jsonl", data=data, verifier="number", reference_column="worked")
    example = task.examples("train")[0]
    text = task.reference(example)
    assert text == f"so <answer> {example.fields['answer']} </answer>" and task.correct(
        example, text
    )
    assert [text[start:end] for start, end in task.answer_spans(text)] == [
        f" {example.fields['answer']} "
    ]


def test_a_column_may_say_the_split(tmp_path: Path) -> None:
    rows = [{**row, "part": SPLITS[n % 3]} for n, row in enumerate(CHAT_ROWS)]
    # row 2 is a test row: this copy of it may not be trained on
    again = {**CHAT_ROWS[2], "part": "train"}
    data = write_rows(tmp_path / "a.jsonl", [*rows, again])
    task = tasks.load("jsonl", data=data, verifier="number", split_column="part")
    for n, split in enumerate(SPLITS):
        assert sorted(e.fields["prompt"] for e in task.examples(split)) == sorted(
            r["prompt"] for r in CHAT_ROWS[n::3]
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            r"expected either reward \(package.module:function or file.py:function\) or verifier "
            r"\(exact, number, "
            r"math\), got neither",
        ),
        ({"reward": "a:b", "verifier": "exact"}, "got both: set one of them"),
        (
            {"verifier": "maths"},
            "verifier 'maths' is not one of exact, number, math: did you mean 'math'",
        ),
        (
            {"verifier": "exact", "data": ""},
            "task jsonl has no data: set task.data to a JSONL file",
        ),
        ({"reward": "no_such_module:f"}, "task.reward: cannot import 'no_such_module:f'"),
        (
            {"reward": f"{HERE}:absent"},
            "task.reward: .* has no 'absent'.* expected package.module:name or ",
        ),
        ({"reward": f"{HERE}:HERE"}, "is a str, which cannot be called"),
        (
            {"verifier": "exact", "prompts_column": "q"},
            "no setting 'prompts_column': did you mean 'prompt_column'",
        ),
        ({"verifier": "exact", "_memo": {}}, "no setting '_memo'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as info:
        tasks.load("jsonl", **{"data": "rows.jsonl", **settings})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            {"prompt": "x"},
            {"verifier": "exact"},
            r":41: got no column 'answer': expected one of prompt",
        ),
        (
            {"prompts": "x"},
            {"verifier": "exact"},
            r":41: got no column 'prompt': did you mean 'prompts'",
        ),
        (
            {"prompt": "x", "answer": "1", "prompts": []},
            {"verifier": "exact"},
            ":41: got a column 'prompts'.* rename it",
        ),
        (
            {"prompt": 3, "answer": "1"},
            {"verifier": "exact"},
            r":41: got prompt 3, expected a text or a list of chat messages",
        ),
        ({"prompt": [{"role": "user"}], "answer": "1"}, {"verifier": "exact"}, ":41: got prompt"),
        (
            {"prompt": "x", "answer": "1", "level": "dev"},
            {"verifier": "exact", "split_column": "level"},
            "got level 0, expected",
        ),
    ],
)
def test_bad_rows_name_file_and_line(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*CHAT_ROWS, row])
    with pytest.raises(ValueError, match=words) as info:
        tasks.load("jsonl", data=data, **settings).examples("train")
    assert "\n" not in str(info.value) and "rows.jsonl:" in str(info.value)


def test_a_reward_that_breaks_the_contract_is_named() -> None:
    task = tasks.load("jsonl", data="x.jsonl", reward=f"{HERE}:not_one_per_row")
    with pytest.raises(
        ValueError, match="not_one_per_row' returned 0 values, expected one for each of 1 rows"
    ):
        task.correct(Example(id="hand", fields={"prompt": "?"}), "text")


def test_references_of_a_task_without_a_lazy_policy_can_be_learnt_from(tmp_path: Path) -> None:
    task = {
        "name": "jsonl",
        "data": write_rows(tmp_path / "rows.jsonl", CHAT_ROWS),
        "verifier": "number",
    }
    tokenizer = load_tokenizer(ASSETS / "mini")
    denoiser = load_denoiser(ASSETS / "mini")
    part = SFTMixture(task=task, gen_length=6, num_examples=10)
    data = encode_mixture(part, tokenizer, denoiser)
    assert data.references.shape == (10, 6) and torch.equal(data.references, data.lazy)
    golds = [str(e.fields["answer"]) for e in tasks.load(**task).examples("train")[:10]]
    assert decode_texts(tokenizer, data.references.tolist()) == [
        f"<answer> {gold} </answer>" for gold in golds
    ]
    with pytest.raises(
        ValueError, match=r"data.lazy_share is 0.5, but task jsonl has no lazy policy: set it to 0"
    ):
        encode_mixture(part.model_copy(update={"lazy_share": 0.5}), tokenizer, denoiser)
    silent = {"name": "jsonl", "data": task["data"], "reward": f"{HERE}:length"}
    with pytest.raises(ValueError, match="none of 10 problems has a reference to learn from"):
        encode_mixture(part.model_copy(update={"task": silent}), tokenizer, denoiser)
