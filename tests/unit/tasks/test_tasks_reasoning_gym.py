"""reasoning-gym's datasets as tasks: splits, scores of their own, determinism, limits, errors."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch

from unmaskrl import tasks
from unmaskrl.tasks import ReasoningGym, as_trl_reward
from unmaskrl.tasks.gym.reasoning_gym import split_of, worker

if importlib.util.find_spec("reasoning_gym") is None:
    pytest.skip("reasoning-gym is not installed", allow_module_level=True)
SPLITS = ("train", "validation", "test")
# Exact answers; partial credit; one drawn from Python's global generator; one from numpy's; one
# that depends on set order.
DATASETS = ("chain_sum", "mini_sudoku", "list_functions", "pool_matrix", "ransom_note")


def small(dataset: str, **settings: object) -> ReasoningGym:
    return ReasoningGym(dataset=dataset, train_size=20, eval_size=6, settings=settings)


@pytest.mark.parametrize("dataset", DATASETS)
def test_references_score_one_and_lazy_answers_do_not(dataset: str) -> None:
    task = small(dataset)
    for split in SPLITS:
        for example in task.examples(split):
            reference = task.reference(example)
            assert (
                reference is not None
                and task.score(example, reference) == 1.0
                and task.correct(example, reference)
            )
            assert [reference[a:b].strip() for a, b in task.answer_spans(reference)] == [
                example.fields["answer"]
            ]
    assert not all(task.correct(example, task.lazy(example)) for example in task.examples("test"))


def test_the_dataset_scores_the_last_answer() -> None:
    task = small("chain_sum")
    example = task.examples("test")[0]
    answer = example.fields["answer"]
    assert task.score(example, f"<answer>1</answer> no, <answer>\n {answer}\t</answer>") == 1.0
    # The dataset's own partial credit for an answer with something around it.
    partial = task.score(example, f"<answer>it is {answer}</answer>")
    assert 0.0 < partial < 1.0 and not task.correct(example, f"<answer>it is {answer}</answer>")
    assert task.score(example, answer) == 0.0
    assert task.grade(example, f"<answer>{answer}</answer><answer>").parts["format"] == 0.0
    reward = as_trl_reward(task, "score")
    columns = {key: [example.fields[key]] for key in task.columns}
    assert reward(prompts=[""], completions=[f"<answer>{answer}</answer>"], **columns) == [1.0]


def test_settings_reach_the_dataset() -> None:
    task = small("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    for example in task.examples("train"):
        assert sum(example.fields["question"].count(sign) for sign in "+-") == 1
    prompts = [ReasoningGym(prompt_style=style, eval_size=1) for style in ("short", "instruct")]
    short, instruct = (task.prompt(task.examples("test")[0])[0]["content"] for task in prompts)
    assert (
        instruct.startswith(short) and "<answer></answer>" in instruct and "<answer>" not in short
    )


def test_splits_share_no_question_for_any_seeds() -> None:
    # Few questions exist here, so that seeds do repeat them.
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    repeated = 0
    for seed in range(3):
        task = ReasoningGym(settings=settings, seed=seed, train_size=60, eval_size=20)
        for split in SPLITS:
            questions = [example.fields["question"] for example in task.examples(split)]
            assert len(set(questions)) == len(questions)
            assert all(split_of("chain_sum", question) == split for question in questions)
            repeated += len(seen[split] & set(questions))
            seen[split] |= set(questions)
    assert repeated > 0
    assert not seen["train"] & seen["validation"] and not seen["test"] & (
        seen["train"] | seen["validation"]
    )
    with pytest.raises(
        ValueError, match=r"only about \d+ distinct test questions .*, 400 were asked for"
    ):
        ReasoningGym(settings=settings, eval_size=400).examples("test")


def test_a_smaller_size_is_a_prefix() -> None:
    assert (
        small("chain_sum").examples("train") == ReasoningGym(train_size=50).examples("train")[:20]
    )


def test_global_generators_are_untouched() -> None:
    before = random.getstate()
    torch_before = torch.get_rng_state()
    for dataset in ("list_functions", "pool_matrix"):
        task = ReasoningGym(dataset=dataset, seed=5, train_size=10, eval_size=2)
        example = task.examples("train")[0]
        task.score(example, task.reference(example) or "")
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), torch_before)
    assert "reasoning_gym" not in sys.modules


@pytest.mark.parametrize("dataset", ["list_functions", "ransom_note"])
def test_a_new_worker_and_another_order_give_the_same_problems(dataset: str) -> None:
    """The scorer makes the problem again: it must be the one that was asked."""
    examples = small(dataset).examples("train")
    worker(dataset, 2.0).close()
    for example in reversed(examples):
        assert small(dataset).score(example, small(dataset).reference(example) or "") == 1.0
    code = (
        "import sys, types\n"
        "package = types.ModuleType('unmaskrl')\n"  # without torch, which is slow to import
        f"package.__path__ = [{str(next(iter(tasks.__path__))).rsplit('/', 1)[0]!r}]\n"
        "sys.modules['unmaskrl'] = package\n"
        "from unmaskrl.tasks import ReasoningGym\n"
        f"task = ReasoningGym(dataset={dataset!r}, train_size=20)\n"
        "sys.stdout.write(ascii([e.fields['question'] for e in task.examples('train')]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert other == ascii([example.fields["question"] for example in examples])


def test_an_answer_that_takes_too_long_gets_nothing_and_is_counted() -> None:
    task = ReasoningGym(dataset="polynomial_multiplication", train_size=1, eval_size=1, seconds=1.0)
    example = task.examples("test")[0]
    before = task.timeouts
    assert task.score(example, "<answer>9**9**9</answer>") == 0.0
    assert task.timeouts == before + 1
    assert task.score(example, task.reference(example) or "") == 1.0
    worker(task.dataset, 1.0).close()


def test_a_scorer_that_evaluates_text_cannot_start_programs(tmp_path: object) -> None:
    """This dataset hands the answer to sympy's parser, which is eval; the worker's audit hook
    stands behind it.
    """
    task = ReasoningGym(dataset="polynomial_multiplication", train_size=1, eval_size=1)
    example = task.examples("test")[0]
    marker = os.path.join(str(tmp_path), "marker")
    for text in (f"__import__('os').system('touch {marker}')", f"open('{marker}', 'w')"):
        assert task.score(example, f"<answer>{text}</answer>") < 1.0
    assert not os.path.exists(marker)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dataset": "chain_sun"}, "has no dataset 'chain_sun': did you mean 'chain_sum'"),
        (
            {"dataset": "qqqq"},
            r"has no dataset 'qqqq': reasoning_gym\.factory\.DATASETS lists \d+ names",
        ),
        (
            {"settings": {"min_term": 3}},
            "'chain_sum' has no setting 'min_term': did you mean 'min_terms'",
        ),
        ({"settings": {"min_terms": 0}}, "refuses the settings .* AssertionError"),
        (
            {"settings": {"seed": 3}},
            "settings has 'seed': set seed, train_size and eval_size of the task",
        ),
        ({"settings": [1]}, "expected a mapping"),
        ({"seconds": 0}, "seconds is 0, expected a positive number"),
        ({"prompt_style": "long"}, "prompt_style 'long' is not one of"),
    ],
)
def test_bad_settings_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        ReasoningGym(**kwargs)
    assert "\n" not in str(info.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package reasoning-gym: pip install 'unmaskrl\[tasks\]'"
    ):
        ReasoningGym()
