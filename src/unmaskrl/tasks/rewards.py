"""TRL's contract for reward functions, both ways: a task's parts as such functions, and calls of a
user's functions.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from unmaskrl.tasks import contained
from unmaskrl.tasks.base import Example, Grade, Task, TrlReward, nearest
from unmaskrl.tasks.errors import place_of, told
from unmaskrl.tasks.functions import named_rewards

Parts = dict[str, list[float | None]]
# Rewards are summed and compared in this dtype.
FLOAT32_MAX = 3.4028234663852886e38
_OWN_FILES = (__file__, contained.__file__)


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where the run stands, under TRL's names. In evaluation it counts as over (global_step =
    max_steps = 1).
    """

    global_step: int = 1
    max_steps: int = 1
    epoch: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What rewards are offered beside prompts, completions and columns, and what they leave.

    ``metrics`` and ``extra`` hold what they gave to log_metric(name, value) and log_extra(column,
    values); ``changed`` the global settings that had to be put back, by function.
    """

    completion_ids: Sequence[Sequence[int]] | None = None
    trainer_state: TrainerState = field(default_factory=TrainerState)
    run_name: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number for metrics.jsonl; several of one name are averaged."""
        number = _number(value)
        if isinstance(number, float) and math.isfinite(number):
            self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep one value per completion for samples.jsonl."""
        self.extra[str(column)] = list(values)

    def offered(self) -> dict[str, Any]:
        """Keyword arguments of TRL's trainer."""
        own: dict[str, Any] = {
            "trainer_state": self.trainer_state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }
        if self.completion_ids is not None:
            own["completion_ids"] = [list(ids) for ids in self.completion_ids]
        return own


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Of each completion: the parts of its reward (None: that function abstains) and whether it is
    right.
    """

    parts: Parts
    correct: list[bool]

    def totals(self) -> list[float]:
        """The reward of each completion: the sum of its parts; 0 where every function abstains, as
        in TRL.
        """
        rows = range(len(self.correct))
        return [
            math.fsum(score for part in self.parts.values() if (score := part[row]) is not None)
            for row in rows
        ]

    def unscored(self) -> float:
        """Share of completions to which every function abstained."""
        rows = range(len(self.correct))
        return sum(all(part[row] is None for part in self.parts.values()) for row in rows) / max(
            1, len(rows)
        )


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task that grades all completions of a batch in one call, and says what rewards get as
    prompts.
    """

    def grade_batch(
        self, examples: Sequence[Example], texts: Sequence[str], context: CallContext
    ) -> Grades:
        """Parts and correctness of texts[i] as a completion of examples[i]."""
        ...

    def reward_prompt(self, example: Example) -> str | list[dict[str, str]]:
        """A text where the row holds one, else chat messages."""
        ...


def grade(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    context: CallContext | None = None,
    functions: Mapping[str, TrlReward] | None = None,
) -> Grades:
    """The task's own parts and verdicts on texts[i] to examples[i], and the parts of the user's
    ``functions``.

    Raises ValueError, naming the function, if one of the user's raises or returns what is no
    reward.
    """
    context = context or CallContext()
    grades = (
        task.grade_batch(examples, texts, context)
        if isinstance(task, BatchTask)
        else grade_by_row(task, examples, texts)
    )
    if functions:
        grades.parts.update(call_functions(task, functions, examples, texts, context))
    return grades


def grade_by_row(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> Grades:
    """One grade per text; a part that a grade lacks abstains. Raises ValueError, naming the task,
    for what is no grade.
    """
    rows = [_graded(task, example, text) for example, text in zip(examples, texts, strict=True)]
    names = dict.fromkeys(name for row in rows for name in row.parts)
    parts: Parts = {
        name: [_checked(name, row.parts.get(name), n) for n, row in enumerate(rows)]
        for name in names
    }
    return Grades(parts=parts, correct=[bool(row.correct) for row in rows])


def _graded(task: Task, example: Example, text: str) -> Grade:
    hint = "; it is given any text that a model may write, and has to return a Grade"
    with told(task.name, "grade", hint):
        found = task.grade(example, text)
    if not isinstance(found, Grade):
        raise ValueError(
            f"task {task.name}: grade returned {type(found).__name__}, expected "
            "unmaskrl.tasks.Grade(correct, parts)"
        )
    return found


def call_functions(
    task: Task,
    functions: Mapping[str, TrlReward],
    examples: Sequence[Example],
    texts: Sequence[str],
    context: CallContext,
) -> Parts:
    """One call per function with all rows: completions are chat messages where prompts are, else
    texts, as in TRL.
    """
    shown = task.reward_prompt if isinstance(task, BatchTask) else task.prompt
    prompts = [shown(example) for example in examples]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    names = dict.fromkeys(name for e in examples for name in e.fields)
    columns = {name: [e.fields.get(name) for e in examples] for name in names}
    return trl_reward_parts(functions, prompts, completions, columns, context)


def as_trl_reward(task: Task, name: str) -> TrlReward:
    """One part of a task's reward under TRL's contract: reward(prompts, completions, **columns) ->
    floats.

    ``columns`` are the fields of the examples, one list per field; a completion is a text or a list
    of chat messages (the last one counts). The function raises ValueError if the task has no such
    part or a column is missing.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float]:
        kept = {
            key: values for key, values in columns.items() if _is_column(values, len(completions))
        }
        for key in task.columns:
            if key not in kept:
                raise ValueError(
                    f"task {task.name!r} got no column {key!r} with {len(completions)} rows: "
                    "pass it"
                )
        scores = []
        for row, completion in enumerate(completions):
            example = Example(
                id=f"row-{row}", fields={key: values[row] for key, values in kept.items()}
            )
            parts = task.grade(example, completion_text(completion)).parts
            if name not in parts:
                raise ValueError(
                    f"task {task.name!r} has no reward {name!r}: {nearest(name, parts)}"
                )
            scores.append(parts[name])
        return scores

    reward.__name__ = f"{task.name}_{name}"
    return reward


def _is_column(values: object, rows: int) -> bool:
    # TRL also passes objects that are not columns (trainer_state, log functions).
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == rows


def completion_text(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion: itself, or the content of its last chat message."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] if completion else ""


def trl_reward_parts(
    functions: Sequence[TrlReward] | Mapping[str, TrlReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    context: CallContext | None = None,
) -> Parts:
    """Call each TRL-style reward function once, on all rows; name -> per completion a finite float,
    or None.

    Functions may be async (they are awaited together) and may return lists, arrays or tensors. Each
    gets its own copies. What they do to the process is undone (contained.py). Raises ValueError,
    naming the function, if it raises or returns anything else; and if two functions share a name.
    """
    context = context or CallContext()
    returned: dict[str, Any] = {}
    waiting: dict[str, tuple[Any, dict[str, Any]]] = {}
    try:
        if not isinstance(functions, Mapping):
            functions = named_rewards(functions, "rewards")
        for name, function in functions.items():
            given = _given(function, prompts, completions, columns, context)
            call = partial(_listed_result, function, given)
            returned[name] = _called(name, call, given, context)
            if inspect.isawaitable(returned[name]):
                waiting[name] = (returned[name], given)
        returned |= _awaited(waiting, context) if waiting else {}
    finally:
        for awaitable, _ in waiting.values():  # those that an error of another function left alone
            if inspect.iscoroutine(awaitable):
                awaitable.close()
    return {
        name: _checked_scores(name, scores, len(completions)) for name, scores in returned.items()
    }


def call_trl_rewards(
    functions: Sequence[TrlReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """The sum over functions of their rewards, one float per completion; errors as in
    trl_reward_parts.
    """
    parts = trl_reward_parts(functions, prompts, completions, columns)
    return Grades(parts=parts, correct=[False] * len(completions)).totals()


def _given(
    function: TrlReward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    context: CallContext,
) -> dict[str, Any]:
    """The arguments that a function takes: all of them if it has **kwargs, else those that it
    names.

    ``step`` and ``run_name`` are d1's; a column of that name comes first.
    """
    # Copies: what one function changes in place must not reach the next one, or the problems.
    rows = {"prompts": list(prompts), "completions": list(completions)}
    given = {**copy.deepcopy({**columns, **rows}), **context.offered()}
    given.setdefault("step", context.trainer_state.global_step)
    given.setdefault("run_name", context.run_name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable of C code says nothing of itself
        return given
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return given
    names = {p.name for p in parameters}
    return {name: value for name, value in given.items() if name in names}


def _listed_result(function: TrlReward, given: dict[str, Any]) -> Any:
    return _listed(function(**given))


def _called(
    name: str, call: Callable[[], Any], given: Mapping[str, Any], context: CallContext
) -> Any:
    """What the call returns; whatever it raises in one line, with the place in the function's
    code.
    """
    try:
        result, changed = contained.run_contained(call)
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:
        raise ValueError(_complaint(name, error, given)) from error
    if changed:
        context.changed.setdefault(name, []).extend(changed)
    return result


def _complaint(name: str, error: BaseException, given: Mapping[str, Any]) -> str:
    chats = not isinstance((given.get("completions") or [""])[0], str)
    form = "completion[0]['content'] is the text" if chats else "a completion is a text"
    return (
        f"reward {name!r} raised {place_of(error, _OWN_FILES)}; it is called with "
        f"{', '.join(given)}, has to return one float (or None) per completion, and here {form}"
    )


def _awaited(
    waiting: Mapping[str, tuple[Awaitable[Any], dict[str, Any]]], context: CallContext
) -> dict[str, Any]:
    """The results of async functions, which wait for their servers at the same time."""

    async def outcome(awaitable: Awaitable[Any]) -> Any:
        try:
            return _listed(await awaitable)
        except BaseException as error:
            return _Raised(error)

    async def together() -> list[Any]:
        return await asyncio.gather(*(outcome(awaitable) for awaitable, _ in waiting.values()))

    def wait() -> list[Any]:
        return asyncio.run_coroutine_threadsafe(together(), _loop(os.getpid())).result()

    results = _called(", ".join(waiting), wait, {}, context)
    for (name, (_, given)), result in zip(waiting.items(), results, strict=True):
        if isinstance(result, _Raised):
            raise ValueError(_complaint(name, result.error, given)) from result.error
    return dict(zip(waiting, results, strict=True))


@dataclass(frozen=True)
class _Raised:
    error: BaseException


@lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """This process's event loop, in a thread of its own: one for the whole run, since clients of
    servers stick to theirs.
    """
    loop = asyncio.new_event_loop()

    def serve() -> None:
        while not loop.is_closed():
            # sys.exit in a sub-task: whoever awaits it gets it when the loop goes on
            with suppress(BaseException):
                loop.run_forever()

    threading.Thread(target=serve, daemon=True, name="rewards").start()
    return loop


def _listed(scores: Any) -> Any:
    """Arrays, tensors and iterators as lists, everything else as it is."""
    if hasattr(scores, "tolist"):
        return scores.tolist()
    if (
        isinstance(scores, Iterable)
        and not isinstance(scores, str | bytes | Mapping | Set)
        and not inspect.isawaitable(scores)
    ):
        return list(scores)
    return scores


def _number(score: Any) -> Any:
    """A Python float; None and what is no number as they are. Raises OverflowError beyond
    float64.
    """
    if hasattr(score, "item") and not isinstance(score, Real):  # scalars of numpy and torch
        score = score.item()
    return float(score) if isinstance(score, Real) else score


def _checked_scores(name: str, scores: object, rows: int) -> list[float | None]:
    if not isinstance(scores, list):
        raise ValueError(
            f"reward {name!r} returned {type(scores).__name__}, expected a list of {rows} floats"
        )
    if len(scores) != rows:
        raise ValueError(
            f"reward {name!r} returned {len(scores)} values, expected one for each of {rows} rows"
        )
    return [_checked(name, score, row) for row, score in enumerate(scores)]


def _checked(name: str, score: Any, row: int) -> float | None:
    try:
        number = _number(score)
    except (OverflowError, ValueError, TypeError, RuntimeError):
        number = math.inf
    if number is None:
        return None
    if not isinstance(number, float) or not math.isfinite(number) or abs(number) > FLOAT32_MAX:
        raise ValueError(
            f"reward {name!r} returned {_shown(score)} for row {row}, expected a finite float of "
            f"at most {FLOAT32_MAX:.1e} "
            "(or None to abstain)"
        )
    return number


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # Python writes no whole numbers of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to write"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
