"""``rollouts: {name: sglang, url: http://host:port}``: completions from an SGLang server.

The weights reach the server through a folder that both see; every answer says which version it was
drawn from. Log-probabilities of the server are shown and not used.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core.decoding import Gamma
from ...core.decoding.law import Law
from ...core.denoiser import end_ids
from ...core.rng import draw_seed
from ...core.rollouts import DecodeSettings
from ...core.types import Canvas, Rollout
from ...utils.stopping import Abandoned, Lost
from ..adapters import merged_tensors
from .answers import Request, Row, Vocabulary, read_rows
from .client import Client, Unreachable
from .facts import accepted, check_facts, trial_prompts, try_out, weight_version
from .layout import Asked, to_rollout
from .ranks import is_main, of_all, of_main
from .weights import fingerprint, remove_others, write_version

_RULE = "confidence_threshold"
_PAUSE = 0.2  # seconds before the second try, doubled after each, 10 s at most
_PROBE = 64  # tokens of a prompt whose cache is looked at
_ABORT = 5.0  # seconds that taking back a request may last
# settings, and the least and the most that they may be: the longest that a socket waits is 2^31 ms
_SECONDS = {"patience": (0.0, math.inf), "timeout": (0.1, 2147483.0)}
_COUNTS = {"retries": 0, "rows": 1}


class Sglang:
    """An SGLang server with a block-diffusion model, started by the user.

    ``folder``: where weights are written for it, a place that both see (None: in the run's folder).
    ``patience``: seconds that a dead server is waited for; ``timeout``: seconds for one request;
    ``retries``: failed tries in a row of one request before it counts as dead; ``rows``: of one
    request; ``agreement``: share of greedy tokens that must be the trainer's own at the start.
    """

    features = frozenset({"step_maps", "shown_logps", "row_keys", "truncation"})
    rules = frozenset({_RULE})
    blocks_only = True

    def __init__(
        self,
        denoiser: Any,
        *,
        url: str = "",
        folder: str | None = None,
        patience: float = 600.0,
        timeout: float = 600.0,
        retries: int = 4,
        rows: int = 256,
        agreement: float = 0.9,
    ) -> None:
        self.check_settings(
            url,
            agreement,
            folder=folder,
            patience=patience,
            timeout=timeout,
            retries=retries,
            rows=rows,
        )
        block = getattr(denoiser, "block_length", None)
        if block is None:
            raise ValueError(
                "the server decodes block-causal models (SDAR, LLaDA2); this one has full attention"
            )
        self.denoiser = denoiser
        self.client = Client(url)
        self.shared = None if folder is None else Path(folder)
        self.folder: Path | None = None  # of this run alone
        self.patience = patience
        self.timeout = timeout
        self.retries = retries
        self.rows_at_once = rows
        self.agreement = agreement
        self.vocabulary = Vocabulary(
            size=denoiser.vocab_size, mask_id=denoiser.mask_id, block_length=block
        )
        self.version: str | None = None  # that the server must answer with
        self.path: Path | None = None  # where they lie
        self.sent = ""  # fingerprint of what lies there
        self.bound: float | None = None  # the gamma that was compared with the server's
        self.label: Callable[[], str] = lambda: "step-0"
        self.note: Callable[[str], None] = lambda text: None
        self.requests = 0
        self._meet()

    @staticmethod
    def check_settings(url: str = "", agreement: float = 1.0, **others: Any) -> None:
        """ValueError for settings that cannot be meant; no server is asked."""
        if not url:
            raise ValueError("url is not set; rollouts.url=http://host:port of the server")
        Client(url)
        for name, value in others.items():
            if name in _SECONDS:
                _check_seconds(name, value, *_SECONDS[name])
            if name in _COUNTS and (type(value) is not int or value < _COUNTS[name]):
                raise ValueError(
                    f"{name}: expected a whole number of at least {_COUNTS[name]}, got {value!r}"
                )
        if not _is_number(agreement) or not 0 <= agreement <= 1:
            raise ValueError(f"agreement: expected a share, in [0, 1], got {agreement!r}")
        folder = others.get("folder")
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise ValueError(f"folder: expected a path, or null for the run's own, got {folder!r}")

    def place(
        self,
        folder: Path,
        label: Callable[[], str],
        check: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        """A run's: where weights are written by default, what a version is called, how a signal is
        heard, and who is told.
        """
        self.folder = folder.resolve()
        if self.shared is not None:  # other runs may use it too
            digest = hashlib.sha256(str(self.folder).encode()).hexdigest()
            self.folder = self.shared.resolve() / f"{folder.parent.name}-{digest[:8]}"
        self.label = label
        self.client.check = check
        self.note = note

    def _meet(self) -> None:
        """The server is there, has this model, samples, and tells what it serves."""
        try:
            check_facts(self.client, self.denoiser)
            found = try_out(self._trial, self.denoiser)
        except Unreachable as error:
            raise ValueError(
                f"no server answers at {self.client.url} ({error}): start it, and the run after it"
            ) from None
        served = {"step_maps": found.step_maps, "row_keys": found.seeded}
        served["shown_logps"] = found.logps and found.step_maps
        self.features = frozenset({"truncation", *(k for k, there in served.items() if there)})

    def _trial(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        counts: list[int],
        step_maps: bool,
        logps: bool,
    ) -> list[Row]:
        request = Request(
            prompts=prompts,
            seeds=seeds,
            max_new_tokens=counts,
            law=Law(1.0),
            stop_ids=end_ids(self.denoiser),
            ignore_eos=False,
            step_maps=step_maps,
            logps=logps,
            name=self._name(),
        )
        return self._once(request)

    def sync(self) -> None:
        """Hand the current weights over, unless the server has them: written by one process into a
        folder of their version, loaded, and asked for. Every rank hears of a failure.
        """
        model = self.denoiser.model
        marks = of_all(fingerprint(dict(model.state_dict())))
        mark = hashlib.sha256("".join(marks).encode()).hexdigest()[: len(marks[0])]
        if self.version is not None and self.version.endswith(mark):
            self._as_one(self._restore)
            return
        tensors = merged_tensors(model, keep=is_main())
        # a version that answers proves its weights, also where a resumed run repeats a step
        version = of_main(f"{self.label()}-{mark}")
        self.version = None

        def hand_over() -> None:
            folder = self._folder()
            self._note_rounding(fingerprint(tensors))
            self.path = write_version(folder, version, model, tensors)
            self.version = version
            self._restore(load=True)
            remove_others(folder, version)

        try:
            self._as_one(hand_over)
        except BaseException:
            self.version = None
            raise
        self.path = of_main(self.path)
        self.version = version

    def _note_rounding(self, sent: str) -> None:
        """Adapters may move by less than the precision of the weights that they are added to."""
        if sent == self.sent:
            self.note(
                "rollouts: the weights were trained, and those for the server are the same bit for "
                "bit: the update is less than their precision"
            )
        self.sent = sent

    def _as_one(self, work: Callable[[], None]) -> None:
        """``work`` of the main process; what it raises is raised by all, a full disk as Lost."""
        failure: BaseException | None = None
        if is_main():
            try:
                work()
            except OSError as error:
                failure = Lost(str(error))
            except (ValueError, Abandoned) as error:
                failure = error
        kinds = (Lost, ValueError, Abandoned)
        own = next((i for i, kind in enumerate(kinds) if isinstance(failure, kind)), None)
        told = of_main(None if own is None else (own, str(failure)))
        if failure is not None:
            raise failure
        if told is not None:
            raise kinds[told[0]](told[1])

    def _folder(self) -> Path:
        """Where versions are written; gone when the process ends. A kill leaves the last one, which
        the run removes when it goes on.
        """
        if self.folder is None:  # a command without a run
            if self.shared is not None:
                self.shared.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix="unmaskrl-served-", dir=self.shared)
            self.folder = Path(made).resolve()
        if self.path is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder

    def sample(
        self,
        canvas: Canvas,
        settings: DecodeSettings,
        generator: torch.Generator | None = None,
        gamma: Gamma | None = None,
    ) -> Rollout:
        """Every row by the server, in requests of ``rows``; ValueError on settings that it does not
        serve, Lost if it is gone for longer than ``patience``.
        """
        canvas.validate(self.denoiser.mask_id)
        bound = self._served_gamma(canvas, settings, gamma)
        if settings.temperature > 0 and generator is None:
            raise ValueError("sampling is random: pass generator=")
        if self.version is None:
            self.sync()
        asked = Asked.of(
            canvas, self.vocabulary.block_length, 0 if generator is None else draw_seed(generator)
        )
        rows: list[Row] = []
        for at in range(0, len(asked.prompts), self.rows_at_once):
            part = slice(at, at + self.rows_at_once)
            rows += self._patiently(asked, part, settings)
        law = Law.of(settings.temperature, settings.top_k, settings.top_p)
        return to_rollout(canvas, rows, self.denoiser, law=law, gamma=bound)

    def _served_gamma(self, canvas: Canvas, settings: DecodeSettings, gamma: Any) -> float:
        """The threshold; ValueError if the canvas or a setting asks for more than is served."""
        block = self.vocabulary.block_length
        if settings.select != _RULE or not isinstance(gamma, int | float):
            raise ValueError(
                f"the server decodes by select={_RULE} with a gamma; got {settings.select!r}"
            )
        if settings.block_length != block:
            raise ValueError(f"block_length is {settings.block_length}, the server's is {block}")
        if settings.exit_at is not None and settings.exit_at < 1:
            raise ValueError(f"exit_at={settings.exit_at}: the server decodes to the end")
        if bool(canvas.fixed_mask.any()):
            raise ValueError("the canvas has anchors: the server begins with an open completion")
        bound = float(gamma)
        if self.bound != bound:
            self._check_threshold(bound)
            self.bound = bound
        return bound

    def _patiently(self, asked: Asked, part: slice, settings: DecodeSettings) -> list[Row]:
        """The rows of one request, again after a failure: the server may have been away, with other
        weights when it is back.
        """
        for tries in range(self.retries + 1):
            request = Request(
                prompts=asked.prompts[part],
                seeds=asked.seeds[part],
                max_new_tokens=asked.counts[part],
                law=Law.of(settings.temperature, settings.top_k, settings.top_p),
                stop_ids=end_ids(self.denoiser),
                ignore_eos=not settings.stop_at_eos,
                step_maps="step_maps" in self.features,
                logps="shown_logps" in self.features,
                name=self._name(),
            )
            try:
                rows = self._once(request)
                versions = self._versions(rows)
                if versions == {self.version}:
                    return self._checked(rows)
                wrong = ", ".join(sorted(map(str, versions - {self.version})))
                reason = f"it answers with weights {wrong}, {self.version} were handed over"
            except Unreachable as error:
                reason = str(error)
            self._take_back(request)
            if tries < self.retries:
                self.note(f"rollouts on {self.client.url}: {reason}; trying again")
                self.client.pause(min(10.0, _PAUSE * 2**tries))
                self._restore()
        raise Lost(f"{self.client.url} failed {self.retries + 1} times in a row: {reason}")

    def _once(self, request: Request) -> list[Row]:
        answer = self.client.post("/generate", request.body(), self.timeout)
        data = accepted(self.client, "/generate", answer)
        try:
            return read_rows(data, request, self.vocabulary)
        except ValueError as error:
            raise ValueError(f"{self.client.url}: {error}") from None

    def _versions(self, rows: list[Row]) -> set[str | None]:
        """Of the weights that the rows were drawn from; asked where rows do not tell."""
        told = {row.version for row in rows}
        return {weight_version(self.client)} if None in told else told

    def _checked(self, rows: list[Row]) -> list[Row]:
        """ValueError if what the server showed at the start is missing now."""
        if "step_maps" in self.features and any(row.steps is None for row in rows):
            raise ValueError(f"{self.client.url}: a row without step_maps, which it had before")
        return rows

    def _restore(self, *, load: bool = False) -> None:
        """The server has the current weights: it is waited for, asked, and handed them if it has
        not (``load``: in any case). Lost after ``patience`` seconds.
        """
        end = time.monotonic() + self.patience
        wait = _PAUSE
        while True:
            try:
                has = not load and weight_version(self.client) == self.version
                if has or self._load():
                    return
                reason = f"it does not take the weights {self.version}"
            except Unreachable as error:
                reason = str(error)
            if time.monotonic() + wait > end:
                raise Lost(f"{self.client.url} is away for {self.patience:g} s: {reason}")
            self.client.pause(wait)
            wait = min(5.0, 2 * wait)

    def _load(self) -> bool:
        """The server loads the folder and says so, twice; False if others' requests hold it up."""
        path = "/update_weights_from_disk"
        body = {
            "model_path": str(self.path),
            "weight_version": self.version,
            "flush_cache": True,
            "abort_all_requests": False,
        }
        answer = self.client.post(path, body, self.timeout)
        if answer.status >= 300 and "flush" in answer.text().lower():
            return False  # loaded, and not flushed as long as a request runs: stale
        done = accepted(self.client, path, answer)
        if not (isinstance(done, dict) and done.get("success") is True):
            raise ValueError(f"{self.client.url}: the weights were not loaded ({answer.text()})")
        told = weight_version(self.client)
        if told != self.version:
            raise ValueError(
                f"{self.client.url} has weights {told} after an update to {self.version}: one "
                "that does not answer with its version cannot be trusted"
            )
        self._probe()
        return True

    def _probe(self) -> None:
        """ValueError if the cache of prompts outlived the weights that it was computed with."""
        prompts = trial_prompts(self.denoiser, [_PROBE])
        block = self.vocabulary.block_length
        row = self._trial(prompts, [1], [block + -(_PROBE + block) % block], False, False)[0]
        if row.cached:
            raise ValueError(
                f"{self.client.url} kept {row.cached} cached prompt tokens over an update of the "
                "weights: its answers would be of neither policy; start it with "
                "--disable-radix-cache"
            )

    def _check_threshold(self, gamma: float) -> None:
        """ValueError if the server's threshold can be read here and is another one."""
        try:
            check_facts(self.client, self.denoiser, gamma)
        except Unreachable:
            return  # sampling waits for it

    def _take_back(self, request: Request) -> None:
        """A request that was given up may still run: it would hold up the update of the weights."""
        try:
            self.client.post("/abort_request", {"rid": request.name}, _ABORT)
        except Unreachable:
            return

    def _name(self) -> str:
        self.requests += 1
        return f"unmaskrl-{os.getpid()}-{os.urandom(4).hex()}-{self.requests}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_seconds(name: str, value: Any, least: float, most: float) -> None:
    # not a number is in no order, and fails here too
    if not _is_number(value) or not least <= value <= most:
        end = "" if most == math.inf else f" and at most {most:.0f}"
        raise ValueError(f"{name}: expected a number of at least {least:g}{end}, got {value!r}")
