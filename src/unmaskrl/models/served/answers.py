"""What SGLang's ``/generate`` is asked, and its answer, every field checked.

Ids go in and ids come out: text that is tokenised again is not the text's own ids. Every sampling
field is sent, because a server fills in what is missing from the model's generation_config.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.decoding.law import Law
from .client import Unreachable, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts to be completed, each with its seed and the number of tokens that end on a block."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    max_new_tokens: Sequence[int]
    law: Law
    stop_ids: Sequence[int]
    ignore_eos: bool
    step_maps: bool
    logps: bool
    name: str  # of the request, to be found again

    def names(self) -> list[str]:
        """Of the rows."""
        return [f"{self.name}-{i}" for i in range(len(self.prompts))]

    def body(self) -> dict[str, Any]:
        """As JSON. One sample per row and n = 1: each has its own seed."""
        params = [
            {
                "n": 1,
                "temperature": self.law.temperature,
                # SGLang's words for a vocabulary that is not truncated: 1 and -1
                "top_p": 1.0 if self.law.top_p is None else self.law.top_p,
                "top_k": -1 if self.law.top_k is None else self.law.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "max_new_tokens": most,
                "min_new_tokens": 0,
                "stop_token_ids": list(self.stop_ids),
                "ignore_eos": self.ignore_eos,
                "skip_special_tokens": False,
                "sampling_seed": seed,
            }
            for most, seed in zip(self.max_new_tokens, self.seeds, strict=True)
        ]
        body: dict[str, Any] = {
            "input_ids": [list(prompt) for prompt in self.prompts],
            "sampling_params": params,
            "rid": self.names(),
            "stream": False,
        }
        if self.logps:
            body["return_logprob"] = True
        if self.step_maps:
            body["return_step_maps"] = True
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A completion: ids, the call of its block that revealed each (from 1, None: not told), and the
    log-probabilities that the server tells.
    """

    ids: list[int]
    steps: list[int] | None
    logps: list[float] | None
    version: str | None  # of the weights
    cached: int  # prompt tokens that were not computed again


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which ids may stand in an answer."""

    size: int
    mask_id: int
    block_length: int


def read_rows(data: Any, request: Request, vocabulary: Vocabulary) -> list[Row]:
    """The rows in the order of the request. ValueError in one line for anything that is missing or
    impossible; Unreachable for rows that the server gave up.
    """
    answers = data if isinstance(data, list) else [data]
    if len(answers) != len(request.prompts):
        raise ValueError(f"answered {len(answers)} of {len(request.prompts)} rows")
    return [_row(answer, request, i, vocabulary) for i, answer in enumerate(answers)]


def _row(answer: Any, request: Request, index: int, vocabulary: Vocabulary) -> Row:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise ValueError(f"row {index}: no meta_info in the answer ({one_line(answer)})")
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else reason
    if kind == "abort":
        raise Unreachable(f"row {index} was aborted ({one_line(reason)})")
    _check_order(meta, request, index)
    most = request.max_new_tokens[index]
    ids = _checked_ids(answer.get("output_ids"), index, most, vocabulary)
    if len(ids) < most and (request.ignore_eos or not set(ids) & set(request.stop_ids)):
        raise ValueError(
            f"row {index} ends after {len(ids)} of {most} tokens without an end token "
            f"(finish_reason {one_line(reason)})"
        )
    prompt = len(request.prompts[index])
    steps = meta.get("step_maps") if request.step_maps else None
    if steps is not None:
        steps = local_steps(steps, len(ids), prompt, vocabulary.block_length, whole=most)
    version = meta.get("weight_version")
    cached = meta.get("cached_tokens")
    return Row(
        ids=ids,
        steps=steps,
        logps=_logps(meta.get("output_token_logprobs"), ids) if request.logps else None,
        version=None if version is None else str(version),
        cached=cached if isinstance(cached, int) else 0,
    )


def _check_order(meta: dict[str, Any], request: Request, index: int) -> None:
    """The answer is that of this row."""
    name = meta.get("id")
    if name is not None and name != request.names()[index]:
        raise ValueError(
            f"row {index} is the answer to {one_line(name)}: rows are in another order"
        )
    told = meta.get("prompt_tokens")
    own = len(request.prompts[index])
    if told is not None and told != own:
        raise ValueError(f"row {index} has a prompt of {told} tokens, {own} were sent")


def _checked_ids(ids: Any, index: int, most: int, vocabulary: Vocabulary) -> list[int]:
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise ValueError(f"row {index}: no output_ids in the answer; ids are needed, not text")
    if not ids:
        raise ValueError(f"row {index} is empty")
    if len(ids) > most:
        raise ValueError(f"row {index} has {len(ids)} tokens, {most} were asked for")
    outside = [one for one in ids if not 0 <= one < vocabulary.size]
    if outside:
        raise ValueError(
            f"row {index} holds the id {outside[0]}, the vocabulary has {vocabulary.size}: the "
            "server has another model"
        )
    if vocabulary.mask_id in ids:
        raise ValueError(f"row {index} holds the mask token {vocabulary.mask_id}")
    return ids


def local_steps(steps: Any, count: int, prompt: int, block: int, *, whole: int) -> list[int]:
    """Which call of its block revealed each of ``count`` tokens behind ``prompt`` others, from 1.

    A server may count from 0. ValueError unless there is a step per token and every block's steps
    are 1..k. A block that is cut behind an end token (``count`` < ``whole``) may lack some: what is
    left of it is counted anew.
    """
    if not isinstance(steps, list) or not all(type(one) is int for one in steps):
        raise ValueError(f"step_maps is {one_line(steps)}; expected a list of whole numbers")
    if len(steps) != count:
        raise ValueError(f"step_maps has {len(steps)} entries for {count} tokens")
    shift = 1 if 0 in steps else 0
    result: list[int] = []
    for at, end in spans(count, prompt, block):
        own = [step + shift for step in steps[at:end]]
        used = sorted(set(own))
        is_cut = end == count < whole and (prompt + end) % block != 0
        if used[0] < 1 or (not is_cut and used != list(range(1, len(used) + 1))):
            raise ValueError(
                f"step_maps of the block at token {at} is {steps[at:end]}; expected the calls 1 to "
                "k of the block, without a hole"
            )
        rank = {step: i + 1 for i, step in enumerate(used)}
        result += [rank[step] for step in own]
    return result


def spans(count: int, prompt: int, block: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each block's part of ``count`` tokens behind ``prompt`` others."""
    at = 0
    while at < count:
        end = min(count, (prompt + at) // block * block + block - prompt)
        yield at, end
        at = end


def _logps(told: Any, ids: list[int]) -> list[float] | None:
    """The server's log-probabilities, None unless there is one of each token."""
    if not isinstance(told, list) or len(told) != len(ids):
        return None
    result = []
    for entry, token in zip(told, ids, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            return None
        value = entry[0]
        if not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-6:
            return None
        result.append(min(0.0, float(value)))
    return result


def all_told(rows: Collection[Row], field: str) -> bool:
    """Whether every row has ``steps`` (``logps``, ``version``)."""
    return all(getattr(row, field) is not None for row in rows)
