"""Any dataset of reasoning-gym, with the dataset's own scorer as the reward.

Everything of the package runs in a worker process (guard.py): its scorers parse the completion with
computer algebra or eval, so that text can cost unbounded time and memory, and some of its
generators draw from global state.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    Example,
    Grade,
    last_answer,
    only_answer,
    stable_hash,
)
from unmaskrl.tasks.protocols import GeneratedTask
from unmaskrl.tasks.sandbox.guard import Guard

# The longest answers of reasoning-gym are grids of some thousand characters.
MAX_CHARACTERS = 100_000
# Whether an answer counts as correct; below it the score is partial credit.
CORRECT = 1.0
_MAKE_SECONDS = 600.0
# reasoning_gym_worker.CHUNK in requests of 16: some datasets need half a second for a problem.
_CHUNK = 64
_REQUEST = 16
_PATIENCE = 1000
_OWN = ("seed", "size")

_INSTRUCT = (
    "{question}\n\nThink step by step. Then give your final answer inside <answer></answer>, "
    "with nothing else between the tags."
)


def split_of(dataset: str, question: str) -> str:
    """The split of a question by its text, for every seed the same: 60 / 20 / 20 %."""
    bucket = stable_hash(f"reasoning_gym/{dataset}/{question}") % 5
    return "train" if bucket < 3 else "validation" if bucket == 3 else "test"


@lru_cache(maxsize=4)
def worker(dataset: str, seconds: float) -> Guard:
    """The process in which a dataset runs with this time limit (seconds per answer), shared by all
    tasks that have both.

    One per dataset: several scorers evaluate the completion, which could change what another one
    says.
    """
    return Guard("unmaskrl.tasks.gym.reasoning_gym_worker:serve", seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(GeneratedTask):
    """Problems of the reasoning-gym dataset ``dataset``, made with ``settings`` (its
    configuration).

    The score is the dataset's own for the text of the last answer, in [0, 1]; correct means a score
    of 1. An answer that takes longer than ``seconds`` to score gets 0 (see ``timeouts``). Problems
    of a split are distinct; each split has seeds of its own, and no question is in two splits,
    whatever the seeds. Fields: question, answer (a text or None), dataset_seed and index (which
    name the problem to reasoning-gym). Raises ValueError.
    """

    name = "reasoning_gym"

    dataset: str = "chain_sum"
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_style: str = "instruct"
    seconds: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < math.inf:
            raise ValueError(
                f"seconds is {self.seconds!r}, expected a positive number: set the time limit of "
                "one answer"
            )
        if not isinstance(self.settings, dict) or not all(
            isinstance(key, str) for key in self.settings
        ):
            raise ValueError(
                f"settings is {self.settings!r}, expected a mapping of the dataset's settings"
            )
        for key in _OWN:
            if key in self.settings:
                raise ValueError(
                    f"settings has {key!r}: set seed, train_size and eval_size of the task instead"
                )
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                "the task reasoning_gym needs the package reasoning-gym: pip install "
                "'unmaskrl[tasks]'"
            )
        self._call("check")

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError if there are fewer distinct ones than asked
        for.
        """
        size = self.size_of(split)
        return list(_generate(self.dataset, self._settings, split, self.seed, size, self.seconds))

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: the question, with an instruction on the answer tags unless
        ``short``.
        """
        question = example.fields["question"]
        content = question if self.prompt_style == "short" else _INSTRUCT.format(question=question)
        return [{"role": "user", "content": content}]

    def reference(self, example: Example) -> str | None:
        """The dataset's answer in the layout; None if it gives none as a text. No worked steps."""
        answer = example.fields["answer"]
        return None if answer is None else f"<answer> {answer} </answer>"

    def lazy(self, example: Example) -> str:
        """The same answer to everything."""
        return "<answer> 0 </answer>"

    def grade(self, example: Example, text: str) -> Grade:
        """{"score": the dataset's score in [0, 1], "format": 0.1 if there is one answer block};
        right means a score of 1.
        """
        score = self.score(example, text)
        formed = only_answer(text) is not None
        return Grade(score >= CORRECT, {"score": score, "format": FORMAT_REWARD * formed})

    def score(self, example: Example, text: str) -> float:
        """The dataset's score of the last answer, stripped, in [0, 1]; 0 without one, or if scoring
        fails.
        """
        body = last_answer(text)
        if body is None or len(body) > MAX_CHARACTERS:
            return 0.0
        problem = example.fields["dataset_seed"], example.fields["index"]
        # A new worker has to make the problem again, which may take longer than an answer.
        self._call("prepare", *problem, seconds=_MAKE_SECONDS)
        value = self._call("score", *problem, body.strip(), default=0.0)
        return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0

    @property
    def timeouts(self) -> int:
        """Answers whose scoring was stopped by the time limit, over all tasks of this process with
        this dataset and limit.
        """
        return worker(self.dataset, self.seconds).timeouts

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that ``grade`` reads."""
        return ("dataset_seed", "index")

    @property
    def _settings(self) -> str:
        return json.dumps(self.settings, sort_keys=True)

    def _call(self, operation: str, *args: Any, **options: Any) -> Any:
        return worker(self.dataset, self.seconds).call(
            operation, self.dataset, self._settings, *args, **options
        )


@lru_cache(maxsize=16)
def _generate(
    dataset: str, settings: str, split: str, seed: int, size: int, seconds: float
) -> tuple[Example, ...]:
    found: dict[str, Example] = {}
    misses = 0
    for first in count(step=_REQUEST):
        chunk, start = divmod(first, _CHUNK)
        # reasoning-gym's problem i of seed s is drawn with s + i: neighbouring seeds would share
        # problems.
        own = stable_hash(f"reasoning_gym/{dataset}/{split}/{seed}/{chunk}") % 2**31
        pairs = worker(dataset, seconds).call(
            "entries", dataset, settings, own, start, start + _REQUEST, seconds=_MAKE_SECONDS
        )
        for index, (question, answer) in enumerate(pairs, start=start):
            if question in found or split_of(dataset, question) != split:
                misses += 1
                continue
            fields = {"question": question, "answer": answer, "dataset_seed": own, "index": index}
            found[question] = Example(id=f"{dataset}-{own}-{index}", fields=fields)
            misses = 0
            if len(found) == size:
                return tuple(found.values())
        if misses > _PATIENCE:
            raise ValueError(
                f"reasoning-gym's {dataset} has only about {len(found)} distinct {split} questions "
                "with settings "
                f"{settings}, {size} were asked for: lower the size or widen the settings"
            )
    raise AssertionError("unreachable")
