"""What a server says of itself and shows in a trial, held against the model that is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.denoiser import end_ids
from ...utils.files import read_json
from ..hub import CONFIG
from .answers import Row, all_told
from .client import Answer, Client, Failed, one_line

_PROMPTS = 2
_SAMPLES = 4
_TOKENS = 16  # of a sample in the trial
_CALL = 30.0  # seconds for a question of facts
_INFO = ("/model_info", "/get_model_info")  # newer builds, older ones
_SERVER = ("/server_info", "/get_server_info")
# what a server may tell, or the config.json of its model has, by our name for it
_KEYS = {
    "vocab_size": "vocabulary",
    "mask_token_id": "mask id",
    "mask_id": "mask id",
    "block_size": "block length",
    "model_type": "model type",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the build serves."""

    step_maps: bool
    logps: bool
    seeded: bool  # the same seed gives the same completion


def weight_version(client: Client) -> str | None:
    """Version of the weights that the server has; None if it tells none."""
    told = model_info(client).get("weight_version")
    return None if told is None else str(told)


def model_info(client: Client) -> dict[str, Any]:
    """What the server tells of its model; Unreachable without a server, ValueError without an
    answer.
    """
    return _first_found(client, _INFO)


def check_facts(client: Client, denoiser: Any, gamma: float | None = None) -> None:
    """ValueError in one line if the server has another model, vocabulary, mask id or block length,
    or tells no weight version.
    """
    info = model_info(client)
    if info.get("weight_version") is None:
        raise ValueError(
            f"{client.url} does not tell the version of its weights (weight_version of "
            f"{_INFO[0]}): an update could not be checked; use a newer SGLang"
        )
    told = server_facts(client, info)
    own = own_facts(denoiser)
    for key, value in told.items():
        name = _KEYS[key]
        if name in own and value != own[name]:
            raise ValueError(
                f"{client.url} has another model: its {name} is {one_line(value)}, ours is "
                f"{own[name]}; start the server with the checkpoint of model.path"
            )
    threshold = server_threshold(client)
    if gamma is not None and threshold is not None and threshold != gamma:
        raise ValueError(
            f"{client.url} decodes with threshold {threshold:g}, decode.gamma is {gamma:g}: set "
            "one to the other (--dllm-algorithm-config of the server)"
        )


def own_facts(denoiser: Any) -> dict[str, Any]:
    """Of the model that is trained, by the same names."""
    config = denoiser.model.config.to_dict()
    return {
        "vocabulary": denoiser.vocab_size,
        "mask id": denoiser.mask_id,
        "block length": denoiser.block_length,
        **({"model type": config["model_type"]} if "model_type" in config else {}),
    }


def server_facts(client: Client, info: dict[str, Any]) -> dict[str, Any]:
    """What is known of the server's model: what it tells, and its config.json if that is a folder
    here.
    """
    folder = info.get("model_path")
    facts: dict[str, Any] = {}
    if isinstance(folder, str) and (Path(folder) / CONFIG).is_file():
        facts |= read_json(Path(folder) / CONFIG)
    facts |= _first_found(client, _SERVER) | info
    block = _in_algorithm_file(client, "block_size")
    if block is not None:
        facts["block_size"] = int(block)
    return {key: facts[key] for key in _KEYS if facts.get(key) is not None}


def server_threshold(client: Client) -> float | None:
    """The confidence above which the server reveals tokens, where its settings can be read here."""
    return _in_algorithm_file(client, "threshold")


def try_out(
    ask: Callable[[list[list[int]], list[int], list[int], bool, bool], list[Row]], denoiser: Any
) -> Trial:
    """What the build serves, seen on samples at temperature 1. ValueError if samples of a prompt
    are all equal: then so are a group's rollouts.

    ``ask(prompts, seeds, counts, step_maps, logps)`` samples.
    """
    block = denoiser.block_length
    prompts = trial_prompts(denoiser, [block + 1, 2 * block + block // 2])
    each = [prompt for prompt in prompts for _ in range(_SAMPLES)]
    counts = [_TOKENS + -(len(prompt) + _TOKENS) % block for prompt in each]
    seeds = list(range(1, len(each) + 1))
    rows, wants_steps, wants_logps = _first_served(ask, each, seeds, counts)
    groups = [rows[i : i + _SAMPLES] for i in range(0, len(rows), _SAMPLES)]
    if all(len({tuple(row.ids) for row in group}) == 1 for group in groups):
        raise ValueError(
            f"{_SAMPLES} samples of one prompt at temperature 1 are equal, for each of "
            f"{_PROMPTS} prompts: this build is greedy whatever is asked, and all rollouts of a "
            "group would be copies; use a build whose diffusion algorithm samples"
        )
    again = ask(each[:1], seeds[:1], counts[:1], wants_steps, wants_logps)
    return Trial(
        step_maps=wants_steps and all_told(rows, "steps"),
        logps=wants_logps and all_told(rows, "logps"),
        seeded=again[0].ids == rows[0].ids,
    )


def trial_prompts(denoiser: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of ordinary ids, spread over the vocabulary."""
    special = {denoiser.mask_id, denoiser.pad_id, *end_ids(denoiser)}
    ordinary = [token for token in range(denoiser.vocab_size) if token not in special]
    stride = max(1, len(ordinary) // 97)
    at = range(sum(lengths))
    ids = [ordinary[i * stride % len(ordinary)] for i in at]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _first_served(
    ask: Callable[[list[list[int]], list[int], list[int], bool, bool], list[Row]],
    prompts: list[list[int]],
    seeds: list[int],
    counts: list[int],
) -> tuple[list[Row], bool, bool]:
    """The first of the ways to ask that the server takes: with step maps and log-probabilities,
    with one of them, with neither.
    """
    refusals: list[Exception] = []
    for steps, logps in ((True, True), (True, False), (False, True), (False, False)):
        try:
            return ask(prompts, seeds, counts, steps, logps), steps, logps
        except (Refused, Failed) as error:
            refusals.append(error)
    raise refusals[-1]


class Refused(ValueError):
    """A request that the server answers with a 4xx."""


def accepted(client: Client, path: str, answer: Answer) -> Any:
    """The JSON of an answer; Refused if the server did not take the request."""
    if answer.status >= 300:
        raise Refused(f"{client.url}{path} answered {answer.status} ({answer.text()})")
    return answer.data


def _first_found(client: Client, paths: Sequence[str]) -> dict[str, Any]:
    answer = None
    for path in paths:
        answer = client.get(path, _CALL)
        if answer.status == 200 and isinstance(answer.data, dict):
            return answer.data
    status = answer.status if answer else 0
    raise ValueError(f"{client.url}{paths[0]} answered {status}: this is no SGLang server")


def _in_algorithm_file(client: Client, key: str) -> float | None:
    """A number of the server's --dllm-algorithm-config, if that file can be read here."""
    path = _first_found(client, _SERVER).get("dllm_algorithm_config")
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    found = re.search(rf"\b{key}[\"']?\s*:\s*([0-9.]+)", Path(path).read_text(encoding="utf-8"))
    return float(found[1]) if found else None
