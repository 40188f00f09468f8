"""Rewards are tried before a run, so that one that cannot work stops it while nothing is
decoded or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models.tokenizer import decode_texts, encode_prompt, encode_reference
from ...tasks import CallContext, Example, Task, TrainerState, TrlReward, grade


def try_rewards(
    task: Task,
    tokenizer: Any,
    example: Example,
    functions: Mapping[str, TrlReward] | None = None,
    *,
    state: TrainerState | None = None,
    run_name: str = "",
) -> list[str]:
    """Call every reward once, with two completions: a right one (the prompt where none is known)
    and an empty one.

    Returns what to tell of them. Raises ValueError, naming the function, if one raises or returns
    what is no reward.
    """
    text = task.reference(example)
    if text is None:
        ids = encode_prompt(tokenizer, task.prompt(example))
        text = decode_texts(tokenizer, [ids])[0]
    else:
        ids = encode_reference(tokenizer, text, [])[0]
    context = CallContext(
        completion_ids=[ids, []], trainer_state=state or TrainerState(), run_name=run_name
    )
    try:
        grade(task, [example, example], [text, ""], context, functions)
    except ValueError as error:
        raise ValueError(
            f"{error} (tried before the run, on a reference and an empty completion)"
        ) from error
    return [
        f"reward {name!r} changes {', '.join(what)}: put back after every call"
        for name, what in context.changed.items()
    ]
