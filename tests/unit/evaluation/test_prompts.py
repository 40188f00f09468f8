"""Long prompts are refused or dropped and counted, never cut; a prefill is part of the prompt."""

from __future__ import annotations

import pytest

from unmaskrl.evaluation.prompts import check_room, fitting
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import encode_prompt, load_tokenizer
from unmaskrl.recipes.load import load_recipe
from unmaskrl.tasks import Example
from unmaskrl.tasks.puzzles.countdown import Countdown

TOKENIZER = load_tokenizer(ASSETS / "mini")
# Prompts of 3 or 4 numbers: <|user|> numbers n n n target t <|assistant|>
EXAMPLES = [
    Example(
        id=str(n),
        fields={"numbers": [1, 2, 3, 4][: 3 + n % 2], "target": n, "solution": None, "kind": ""},
    )
    for n in range(5)
]


def lengths(*overrides: str, max_length: int = 4096) -> tuple[list[int], int, list[str]]:
    recipe = load_recipe("countdown-mini", overrides)
    fits = fitting(recipe, Countdown(), TOKENIZER, EXAMPLES, max_length)
    assert [e.id for e in fits.examples] == [
        str(n) for n in range(5) if len(fits.prompts) == 5 or n % 2 == 0
    ]
    for example, prompt in zip(fits.examples, fits.prompts, strict=True):
        assert prompt == encode_prompt(TOKENIZER, Countdown().prompt(example))
    return [len(p) for p in fits.prompts], fits.dropped, fits.notes


def test_all_fit_without_a_limit() -> None:
    assert lengths() == ([8, 9, 8, 9, 8], 0, [])
    assert lengths("train.max_prompt_length=9") == ([8, 9, 8, 9, 8], 0, [])


def test_long_prompts_are_refused_with_their_number_and_the_longest() -> None:
    words = (
        r"2 of 5 prompts of task countdown are longer than train.max_prompt_length 8 \(the "
        r"longest has 9 tokens\): raise it"
    )
    with pytest.raises(ValueError, match=words):
        lengths("train.max_prompt_length=8")


def test_or_dropped_and_counted() -> None:
    kept, dropped, notes = lengths("train.max_prompt_length=8", "train.long_prompts=drop")
    assert kept == [8, 8, 8] and dropped == 2
    assert notes == [
        "2 of 5 prompts of task countdown are longer than train.max_prompt_length 8 (the longest "
        "has 9 tokens) and were dropped"
    ]
    with pytest.raises(ValueError, match="5 of 5 prompts"):
        lengths("train.max_prompt_length=7", "train.long_prompts=drop")


def test_prompt_and_completion_fit_the_model() -> None:
    gen_length = load_recipe("countdown-mini").decode.gen_length
    assert lengths(max_length=9 + gen_length)[1] == 0
    with pytest.raises(
        ValueError,
        match=rf"2 of 5 prompts .*9 tokens.* exceed the model's {8 + gen_length} positions: lower",
    ) as info:
        lengths(max_length=8 + gen_length)
    assert "train.max_prompt_length=8 train.long_prompts=drop" in str(
        info.value
    ) and "\n" not in str(info.value)
    assert (
        lengths("train.max_prompt_length=8", "train.long_prompts=drop", max_length=8 + gen_length)[
            1
        ]
        == 2
    )
    check_room([], 10, 5)


def test_a_last_message_of_the_assistant_is_a_prefill() -> None:
    user = {"role": "user", "content": "numbers 3 target 3"}
    plain = encode_prompt(TOKENIZER, [user])
    assert encode_prompt(TOKENIZER, [user, {"role": "assistant", "content": "<answer>"}]) == [
        *plain,
        TOKENIZER.convert_tokens_to_ids("<answer>"),
    ]
    earlier = [user, {"role": "assistant", "content": "3"}, user]
    assert encode_prompt(TOKENIZER, earlier)[-len(plain) :] == plain
