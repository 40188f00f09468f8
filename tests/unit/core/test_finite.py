"""What is not finite is found and named: in decoding before the next call, in weights, probes and
scores.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import QUOTA_RULES, HashDenoiser, seeded, tiny_llada
from unmaskrl.core.canvas import blank_canvas, predictability
from unmaskrl.core.decoding import RULES, decode
from unmaskrl.core.finite import NotFiniteError, broken_weight, first_not_finite
from unmaskrl.core.threshold_head import ThresholdHead, best_gamma, threshold_loss
from unmaskrl.evaluation.continuation import continuation_logps
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import asset
from unmaskrl.models.probe import masked_accuracy

SETTINGS: dict[str, Any] = {"block_length": 4, "steps": 8}
GAMMAS = {
    "eb": 0.1,
    "eb_max_prob": 0.1,
    "eb_margin": 0.1,
    "confidence_threshold": 0.9,
    "factor": 1.0,
}
# the package shows the function under this name
LOOP = importlib.import_module("unmaskrl.core.decoding.decode")
BAD = (math.nan, math.inf, -math.inf)


def decoded(denoiser: Any, *, prompts: int = 3, gen_length: int = 8, **settings: Any) -> Any:
    canvas = blank_canvas([[1, 2], [3], [1]][:prompts], gen_length=gen_length, denoiser=denoiser)
    return decode(denoiser, canvas, generator=seeded(1), **{**SETTINGS, **settings})


class Counting:
    """Passes everything on; more calls than a decoding can need are a failure, and not a test that
    never ends.
    """

    def __init__(self, inner: Any, most: int) -> None:
        self.inner = inner
        self.most = most
        self.calls = 0
        self.mask_id = inner.mask_id
        self.eos_id = inner.eos_id
        self.pad_id = inner.pad_id
        self.vocab_size, self.model = inner.vocab_size, getattr(inner, "model", None)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        assert self.calls <= self.most, "the loop does not end"
        return self.inner.hidden(ids, attention_mask)

    def head(self, hidden: Tensor) -> Tensor:
        return self.inner.head(hidden)

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner.logits(ids, attention_mask)


class Poisoned(HashDenoiser):
    """Logits of one row, one position or one token that are not finite from the given call on."""

    def __init__(
        self,
        value: float,
        *,
        call: int = 1,
        position: int | slice = -1,
        token: int | slice = slice(None),
    ) -> None:
        super().__init__(length=8)
        self.value = value
        self.call = call
        self.where = (1, position, token)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = super().hidden(ids, attention_mask).clone()
        if len(self.rows) >= self.call:
            hidden[self.where] = self.value
        return hidden


@pytest.mark.parametrize("exit_at", [None, 0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("select", sorted(RULES))
def test_decode_stops_at_its_first_call_with_a_broken_weight(
    select: str, temperature: float, exit_at: float | None
) -> None:
    # its mask id is 0, the index of the maximum of a row of NaN
    denoiser = load_denoiser(asset("mini"))
    weights = dict(denoiser.model.named_parameters())
    name = next(reversed(weights))
    with torch.no_grad():
        weights[name].view(-1)[0] = math.nan
    counting = Counting(denoiser, 1)
    with pytest.raises(NotFiniteError) as caught:
        decoded(
            counting,
            select=select,
            temperature=temperature,
            exit_at=exit_at,
            gamma=GAMMAS.get(select),
        )
    assert "logits are not finite in 3 of 3 rows" in str(caught.value) and repr(name) in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("select", sorted(RULES))
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_bad_logit_is_found_before_the_call_after_it_is_drawn(
    select: str, value: float, temperature: float
) -> None:
    """Of one position (the last, so that random and left_to_right come to it at the end), one
    token, one row.
    """
    settings = {
        "select": select,
        "temperature": temperature,
        "gamma": GAMMAS.get(select),
        "block_length": 8,
    }
    late = Counting(Poisoned(value, token=2), 8)
    with pytest.raises(NotFiniteError, match="in 1 of 3 rows: all weights are finite"):
        decoded(late, **settings, stop_at_eos=False)
    if RULES[select].needs_logits:
        assert late.calls == 1, "a rule that looks at logits comes to a NaN first"


def test_decode_says_in_which_call() -> None:
    with pytest.raises(
        NotFiniteError, match="stopped after call 3: logits are not finite in 1 of 3 rows"
    ):
        decoded(Counting(Poisoned(math.nan, call=3, position=slice(None)), 3), stop_at_eos=False)


@pytest.mark.parametrize("select", QUOTA_RULES)
def test_minus_infinity_at_some_tokens_is_a_probability_of_0(select: str) -> None:
    barred = Counting(Poisoned(-math.inf, token=2), 8)
    assert not (decoded(barred, select=select, stop_at_eos=False).ids[1, -1:] == 2).any()
    with pytest.raises(NotFiniteError):
        decoded(Counting(Poisoned(-math.inf), 8), select=select, stop_at_eos=False)


def test_a_drawn_mask_token_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = HashDenoiser(length=8)

    def draw(logps_RV: Tensor, temperature: float, uniform: Tensor) -> Tensor:
        return torch.full((len(logps_RV),), denoiser.mask_id)

    def likely(logits: Tensor, mask_id: int, temperature: float) -> Tensor:
        return logits.log_softmax(-1)  # a finite log-probability of the mask token as well

    monkeypatch.setattr("unmaskrl.core.decoding.law.draw", draw)
    monkeypatch.setattr("unmaskrl.core.decoding.law.masked_log_softmax", likely)
    with pytest.raises(
        NotFiniteError, match=f"after call 1: the mask token {denoiser.mask_id} was drawn"
    ):
        decoded(Counting(denoiser, 1))


def test_a_loop_that_reveals_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Counting(HashDenoiser(length=8), 9)
    nothing = torch.zeros(0, dtype=torch.int64)
    monkeypatch.setattr(LOOP, "highest", lambda *args: nothing)
    with pytest.raises(NotFiniteError, match="3 of 3 rows have open tokens left"):
        decoded(denoiser)
    assert denoiser.calls == 9, "gen_length + 1"


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_the_bound_leaves_room_for_every_schedule(steps: int) -> None:
    for exit_at in (None, 0.0, 0.4, 1.0):
        denoiser = Counting(HashDenoiser(length=8), 8)
        assert not (decoded(denoiser, steps=steps, exit_at=exit_at).ids == denoiser.mask_id).any()


def test_a_gamma_that_is_no_number_is_an_error() -> None:
    with pytest.raises(NotFiniteError, match="gamma is NaN in 1 of 3 rows"):
        decoded(
            HashDenoiser(length=8),
            select="eb",
            gamma=lambda hidden, rows: torch.tensor([0.1, math.nan, 0.1]),
        )
    with pytest.raises(NotFiniteError, match="gamma is NaN in 1 of 3 rows"):
        decoded(HashDenoiser(length=8), select="eb", gamma=torch.tensor([0.1, math.nan, 0.1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", BAD)
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    tensors = {
        "a": torch.randn(5, 3, generator=seeded()).to(dtype),
        "none": torch.zeros(0, dtype=dtype),
    }
    tensors |= {"ids": torch.tensor([2**62]), "flags": torch.tensor([True])}
    tensors |= {"b": torch.ones((), dtype=dtype), "c": tensors["a"]}
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    assert first_not_finite(tensors | {"largest": largest}) is None and first_not_finite({}) is None
    assert first_not_finite(tensors | {"b": torch.tensor(value, dtype=dtype)}) == "b"
    bad = torch.randn(70, generator=seeded()).to(dtype)
    bad[69] = value
    assert first_not_finite({"late": bad, **tensors, "a": bad}) == "late"


def test_probe_and_scores_refuse_a_broken_model() -> None:
    denoiser = tiny_llada()
    assert broken_weight(denoiser) is None and broken_weight(HashDenoiser(length=2)) is None
    with torch.no_grad():
        next(iter(denoiser.model.parameters()))[3, 0] = math.nan
    texts = [[3, 1, 2], [3, 2, 5]]
    answers = [[3, 4, 1, 3, 5, 4, 2, 1, 3]] * 2
    for fails in (
        lambda: masked_accuracy(denoiser, texts, answers, seeded()),
        lambda: predictability(denoiser, texts, answers),
        lambda: continuation_logps(
            denoiser,
            list(zip(texts, answers, strict=True)),
            num_mc=2,
            seed=0,
            batch_size=2,
            max_canvases=8,
        ),
    ):
        with pytest.raises(NotFiniteError, match=r"wte\.weight.* is not finite"):
            fails()


def test_a_threshold_head_that_is_not_finite_is_an_error() -> None:
    denoiser = tiny_llada(torch.float32)
    head = ThresholdHead(16, (0.0, 0.1, 1.0)).init_weights(seeded())
    with torch.no_grad():
        head.outer.bias[1] = math.nan
    canvas = blank_canvas([[1, 2], [3]], gen_length=8, denoiser=denoiser)
    with pytest.raises(NotFiniteError, match="gamma is NaN in 2 of 2 rows"):
        decode(
            denoiser, canvas, select="eb", gamma=best_gamma(head, canvas.prompt_mask), **SETTINGS
        )


def test_a_head_without_floor_has_a_finite_loss_where_a_probability_underflows() -> None:
    """log softmax(-200) is -200, while the logarithm of the softmax is -inf and its entropy NaN."""
    head = ThresholdHead(16, (0.0, 0.1, 1.0), floor=0.0).init_weights(seeded())
    with torch.no_grad():
        head.outer.bias.copy_(torch.tensor([0.0, 0.0, -200.0]))
    features = torch.randn(4, 16, generator=seeded())
    index = torch.tensor([0, 1, 1, 2])
    old = head.log_probs(features).detach().gather(-1, index[:, None]).squeeze(-1)
    assert float(old[3]) == pytest.approx(-200 - math.log(2), rel=1e-4)
    loss, metrics = threshold_loss(
        head,
        features,
        index,
        old,
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
        clip=0.2,
        entropy_coef=0.01,
        num_rows=4.0,
    )
    loss.backward()
    assert float(metrics["sampler/entropy"]) == pytest.approx(math.log(2), rel=1e-4)
    assert (
        first_not_finite(
            {n: p.grad for n, p in head.named_parameters() if p.grad is not None} | {"loss": loss}
        )
        is None
    )
