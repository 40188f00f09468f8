"""The model type "unmaskrl" of EleutherAI's lm-evaluation-harness (shell; optional extra
``lm-eval``).

``python -m unmaskrl.evaluation.lm_harness --model unmaskrl --model_args pretrained=mini,... --tasks
...`` registers it and hands over to the harness' own command line, which up to version 0.4.13 finds
no models outside its package. Later versions have plugins: there ``lm_eval --model unmaskrl`` is
enough (entry point in pyproject.toml).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; the harness is an optional extra: pip install 'unmaskrl[lm-eval]'"
    ) from None

from ..core.rng import named_generator
from ..core.rollouts import LocalRollouts
from ..models.hub import asset
from ..models.loading import load
from ..models.tokenizer import decode_texts, encode_pair, encode_reference
from ..utils.torch_setup import DTYPES, default_device, set_threads
from .continuation import continuation_logps, greedy_matches
from .decode_settings import checked_decode, settings_for
from .evaluate import batches_by_length, decode_blank

LOGGER = logging.getLogger(__name__)
DECODE = ("gen_length", "block_length", "steps", "select", "gamma", "exit_at", "top_k", "top_p")
KNOWN = (
    "until",
    "do_sample",
    "temperature",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)


@register_model("unmaskrl")
class UnmaskRLModel(LM):
    """Generation by ``decode`` with one decode config, likelihoods by Monte-Carlo ELBO
    (``continuation``).
    """

    def __init__(
        self,
        pretrained: str = "mini",
        *,
        task: str | None = None,
        temperature: float | None = None,
        seed: int = 0,
        num_mc: int = 32,
        check_greedy: bool = True,
        max_length: int = 4096,
        max_canvases: int = 256,
        dtype: str = "float32",
        family: str | None = None,
        threads: int = 1,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        **decode: Any,
    ) -> None:
        """``task`` names an entry of the checkpoint's decode.json (default: the first); ``decode``
        changes its settings.
        """
        super().__init__()
        _check_arguments(decode, dtype, batch_size)
        set_threads(threads)
        path = asset(pretrained)
        self.name = pretrained
        # the harness' command line says cuda wherever it runs
        place = (
            default_device()
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available())
            else device
        )
        model = load(path, device=place, dtype=dtype, family=family)
        self.denoiser = model.denoiser
        self.tokenizer = model.tokenizer
        self.head = model.head
        self.rollouts = LocalRollouts(model.denoiser)
        stored = settings_for(model.decode_settings, task)
        self.settings = checked_decode(task, {**stored, **decode})
        self.temperature = temperature
        self.seed = seed
        self.num_mc = num_mc
        self.check_greedy = check_greedy
        self.max_length = max_length
        self.max_canvases = max_canvases
        self.batch_size = int(batch_size)
        self._device = self.denoiser.device
        self._warned = set[str]()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode the fixed canvas of ``gen_length`` tokens, then cut the text at the first stop
        string.
        """
        prompts = [
            self._fit(self._context(request.args[0]), self.settings.gen_length)
            for request in requests
        ]
        asked = [self._asked(request.args[1]) for request in requests]
        results = [""] * len(requests)
        for temperature in sorted({t for t, _, _ in asked}):
            chosen = [i for i, (t, _, _) in enumerate(asked) if t == temperature]
            for part in batches_by_length([len(prompts[i]) for i in chosen], self.batch_size):
                batch = [chosen[n] for n in part]
                rollout = decode_blank(
                    self.rollouts,
                    self.denoiser,
                    [prompts[i] for i in batch],
                    self.settings,
                    temperature=temperature,
                    row_ids=batch,
                    # as `unmaskrl eval`: row i there is request i here
                    generator=named_generator(self.seed, "eval"),
                    head=self.head,
                )
                for i, ids in zip(batch, rollout.completions(), strict=True):
                    _, limit, stops = asked[i]
                    results[i] = cut(decode_texts(self.tokenizer, [ids[:limit]])[0], stops)
                    self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
        return results

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(ELBO in nats, whether greedy decoding at the answer's length gives exactly the answer)
        of each request.
        """
        pairs = []
        for request in requests:
            context, answer = encode_pair(self.tokenizer, *request.args)
            pairs.append((self._fit(context or self._prefix(), len(answer)), answer))
        logps = continuation_logps(
            self.denoiser,
            pairs,
            num_mc=self.num_mc,
            seed=self.seed,
            batch_size=self.batch_size,
            max_canvases=self.max_canvases,
        )
        greedy = [False] * len(pairs)
        if self.check_greedy:
            greedy = greedy_matches(self.denoiser, pairs, batch_size=self.batch_size)
        results = list(zip(logps, greedy, strict=True))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: a bound is no perplexity."""
        raise ValueError(
            "perplexity tasks (loglikelihood_rolling) need the exact likelihood of a text; a "
            "masked diffusion model has only a "
            "bound that depends on how the text is cut into windows. Choose multiple-choice or "
            "generation tasks"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For the harness' records."""
        return self.tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        """For the harness' request caches."""
        return self.name.replace("/", "__")

    def _asked(self, kwargs: dict[str, Any]) -> tuple[float, int | None, list[str]]:
        """Temperature, limit of tokens and stop strings of a request; settings that mean nothing
        here are named once.
        """
        for key in kwargs.keys() - set(KNOWN):
            self._warn_once(f"generation setting {key} is ignored: decoding follows --model_args")
        stops = kwargs.get("until") or []
        limits = [int(kwargs[key]) for key in KNOWN[3:] if kwargs.get(key) is not None]
        if limits and limits[0] > self.settings.gen_length:
            self._warn_once(
                f"max_gen_toks={limits[0]} exceeds gen_length={self.settings.gen_length}: answers "
                "end there"
            )
        wanted = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample", True) else 0.0
        temperature = wanted if self.temperature is None else float(self.temperature)
        return (
            temperature,
            limits[0] if limits else None,
            [stops] if isinstance(stops, str) else list(stops),
        )

    def _context(self, text: str) -> list[int]:
        return encode_reference(self.tokenizer, text, [])[0] or self._prefix()

    def _prefix(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [self.denoiser.eos_id if bos is None else bos]

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            LOGGER.warning(text)
        self._warned.add(text)

    def _fit(self, context: Sequence[int], length: int) -> list[int]:
        """The end of a context that is too long, as other models of the harness do."""
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a context before {length} "
                "tokens; raise it"
            )
        if len(context) > room:
            self._warn_once(
                f"contexts above {room} tokens lose their beginning (max_length={self.max_length})"
            )
        return list(context[-room:])


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any stop string."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _check_arguments(decode: Mapping[str, Any], dtype: str, batch_size: int | str) -> None:
    unknown = decode.keys() - set(DECODE)
    if unknown:
        raise ValueError(
            f"--model_args: unknown {sorted(unknown)[0]!r}; decode settings are {', '.join(DECODE)}"
        )
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--model_args: dtype {dtype!r} is not one of {', '.join(DTYPES)}, auto")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(
            f"--batch_size {batch_size!r}: this model needs a whole number of at least 1"
        )


def main() -> int:
    """The harness' command line, with this model in its registry; bad input is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        sys.stderr.write(f"unmaskrl.evaluation.lm_harness: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
