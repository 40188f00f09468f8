"""Where rollouts come from: the seam behind which completions are decoded, here or elsewhere.

Training, evaluation and the commands ask an engine for rollouts and never decode themselves. The
engine in this process is ``decode`` on a denoiser; a served model is another. An engine says what
it can (``FEATURES``, position rules), so that a recipe that needs more is refused before it starts.
``unmaskrl.testing.check_rollouts`` checks one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from .decoding import RULES, Gamma, Rule, decode
from .decoding.law import Law
from .denoiser import Denoiser
from .types import Canvas, Rollout

# What an engine may or may not do.
FEATURES = {
    "step_maps": "tells which call revealed each token (decoded_step, nfe, exit_step)",
    "behavior_logps": "tells the log-probability with which each token was drawn",
    "anchors": "keeps tokens of the completion that are given",
    "exit_at": "leaves the loop early and fills the rest in one call",
    "gamma_function": "takes gamma as a function of what the first call sees",
    "truncation": "draws from the top_k or top_p tokens; behavior_logps are of that distribution",
    "kept_ids": "tells which ids each token was drawn from (kept)",
    "shown_logps": "tells log-probabilities that are compared with the trainer's and not used",
    "row_keys": "draws by the canvas' row ids: a row is the same in any batch, and again",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How a canvas is decoded; its length is the canvas' own. The words are ``decode``'s.

    ``steps``: denoiser calls for a fully open completion. ``temperature`` 0 is greedy; above it,
    ``top_k`` and ``top_p`` (None: off) leave out improbable tokens.
    """

    block_length: int
    steps: int
    select: str | Rule = "confidence"
    temperature: float = 0.0
    exit_at: float | None = None
    stop_at_eos: bool = True
    top_k: int | None = None
    top_p: float | None = None


@runtime_checkable
class Rollouts(Protocol):
    """An engine. ``features`` and ``rules`` may be stated on its class, where a check reads them
    without building one.
    """

    @property
    def features(self) -> frozenset[str]:
        """The keys of ``FEATURES`` that it serves."""
        ...

    @property
    def rules(self) -> frozenset[str]:
        """Position rules (``decode.select``) that it serves."""
        ...

    def sync(self) -> None:
        """The weights have changed: what is sampled next is drawn from the current ones.

        Called by every rank before the first rollout of a step or an evaluation.
        """
        ...

    def sample(
        self,
        canvas: Canvas,
        settings: DecodeSettings,
        generator: torch.Generator | None = None,
        gamma: Gamma | None = None,
    ) -> Rollout:
        """Decode every row. ``generator`` is needed if anything is random; ``gamma`` by adaptive
        rules. ValueError on settings that it does not serve.
        """
        ...


def check_truncation_served(engine: Rollouts, settings: DecodeSettings) -> None:
    """ValueError if tokens are to be left out and the engine does not say that it can."""
    law = Law.of(settings.temperature, settings.top_k, settings.top_p)
    if law.truncates and "truncation" not in engine.features:
        raise ValueError(
            f"decode.top_k={law.top_k} with decode.top_p={law.top_p} needs rollouts with "
            f"truncation ({FEATURES['truncation']}), which this engine does not serve: unset both, "
            "or set rollouts.name=local"
        )


@runtime_checkable
class Placed(Protocol):
    """An engine that wants to know the run that it works for."""

    def place(
        self,
        folder: Path,
        label: Callable[[], str],
        check: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        """``folder``: where it may write; ``label``: where the run stands (``step-17``); ``check``:
        called while it waits, and may leave; ``note``: tells whoever looks on.
        """
        ...


# Builds an engine for a denoiser, whose weights are the ones to sample from.
RolloutsFactory = Callable[[Denoiser], Rollouts]


class LocalRollouts:
    """``decode`` in this process; the denoiser's weights are always the current ones."""

    features = frozenset(FEATURES)
    rules = frozenset(RULES)

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def sync(self) -> None:
        """Nothing to fetch."""

    def sample(
        self,
        canvas: Canvas,
        settings: DecodeSettings,
        generator: torch.Generator | None = None,
        gamma: Gamma | None = None,
    ) -> Rollout:
        """``decode`` with these settings."""
        return decode(
            self.denoiser,
            canvas,
            block_length=settings.block_length,
            steps=settings.steps,
            select=settings.select,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            exit_at=settings.exit_at,
            gamma=gamma,
            stop_at_eos=settings.stop_at_eos,
            generator=generator,
        )
