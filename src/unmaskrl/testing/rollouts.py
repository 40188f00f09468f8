"""``check_rollouts``: what training, evaluation and scoring ask of a rollout engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.block_causal import block_length_of, completed
from ..core.canvas import anchored_canvas
from ..core.decoding import RULES
from ..core.denoiser import Denoiser, end_ids
from ..core.estimators import trajectory
from ..core.rollouts import FEATURES, DecodeSettings, LocalRollouts, Rollouts, RolloutsFactory
from ..core.scoring import token_logps
from ..core.toy import ToyDenoiser
from ..core.types import Canvas, Rollout, completion_columns, first_eos_mask
from .require import close, nothing_drawn, require

_LENGTH = 6
_ROWS = 5


def check_rollouts(factory: RolloutsFactory, denoiser: Denoiser | None = None) -> None:
    """AssertionError unless the engine keeps what is given, fills the rest, says truly how, and
    follows the weights.

    ``denoiser``: what to sample from (default: an exact toy of 6 tokens), block-causal or not; its
    weights are changed and put back. Every rule that the engine names is used, greedy and at
    temperature 1, and every feature that it claims: anchors and exits; ``step_maps`` and
    ``behavior_logps`` together must replay to the same log-probabilities, truncated ones
    (``truncation``) over their ``kept_ids``; with ``row_keys`` a row is the same in another batch.
    Greedy completions must be those of ``decode`` on the same weights, also after ``sync``.
    """
    den = denoiser or ToyDenoiser.random(
        torch.Generator().manual_seed(3), num_tokens=4, length=_LENGTH, eos_id=3
    )
    engine = factory(den)
    require(isinstance(engine, Rollouts), f"a {type(engine).__name__} is no engine: see Rollouts")
    unknown = engine.features - FEATURES.keys()
    require(not unknown, f"features names {sorted(unknown)}; known: {', '.join(FEATURES)}")
    require(
        bool(engine.rules) and engine.rules <= RULES.keys(),
        f"rules is {sorted(engine.rules)}; expected some of {', '.join(RULES)}",
    )
    canvas = _canvas(den, anchors="anchors" in engine.features)
    for select in sorted(engine.rules):
        for temperature in (0.0, 1.0):
            with nothing_drawn("sample"):
                rollout = _sample(engine, den, canvas, select, temperature)
            _check_facts(canvas, rollout, den, engine, f"select={select}, T={temperature:g}")
        _check_greedy(engine, den, canvas, select)
    # a quota, so that an exit can be seen, and exact, so that it can be replayed
    select = min(
        engine.rules,
        key=lambda name: (RULES[name].prefix is not None, RULES[name].needs_draw, name),
    )
    first = _sample(engine, den, canvas, select, 1.0)
    if "row_keys" in engine.features:
        _check_rows(engine, den, canvas, select, first)
    if engine.features >= {"step_maps", "behavior_logps"}:
        _check_replay(den, first)
    if "truncation" in engine.features:
        cut = _sample(engine, den, canvas, select, 1.0, top_k=2, top_p=0.95)
        _check_facts(canvas, cut, den, engine, "top_k=2, top_p=0.95")
        _check_truncated(cut, den, engine)
    if "exit_at" in engine.features:
        exited = _sample(engine, den, canvas, select, 1.0, exit_at=0.5)
        require(
            bool((exited.exit_step > 0).any()) and bool((exited.nfe <= first.nfe).all()),
            "exit_at=0.5 left no row early",
        )
    if "gamma_function" in engine.features:
        _check_gamma_function(engine, canvas)
    _check_sync(engine, den, canvas, select)


def _canvas(den: Denoiser, *, anchors: bool) -> Canvas:
    special = {den.mask_id, den.pad_id, *end_ids(den)}
    ordinary = [token for token in range(den.vocab_size) if token not in special]
    prompts = [
        [ordinary[(row + i) % len(ordinary)] for i in range(1 + row)] for row in range(_ROWS)
    ]
    given = [{row: ordinary[row % len(ordinary)]} if row % 2 else {} for row in range(_ROWS)]
    return anchored_canvas(
        prompts,
        given if anchors else [{}] * _ROWS,
        gen_length=_LENGTH,
        denoiser=den,
        row_ids=[7, 3, 11, 20, 5],
        group_ids=[0, 0, 1, 1, 2],
        device=getattr(den, "device", "cpu"),
    )


def _sample(
    engine: Rollouts,
    den: Denoiser,
    canvas: Canvas,
    select: str,
    temperature: float,
    **changes: Any,
) -> Rollout:
    settings = DecodeSettings(
        block_length=block_length_of(den) or _LENGTH,
        steps=_LENGTH,
        select=select,
        temperature=temperature,
        **changes,
    )
    gamma = None if RULES[select].prefix is None else 0.5
    return engine.sample(canvas, settings, torch.Generator().manual_seed(1), gamma)


def _check_facts(
    canvas: Canvas, rollout: Rollout, den: Denoiser, engine: Rollouts, where: str
) -> None:
    """What a rollout says of itself."""
    grid = block_length_of(den)
    if grid is not None:
        canvas = completed(canvas, grid, den.mask_id, den.pad_id)
    for name in ("prompt_mask", "attention_mask", "row_ids", "group_ids"):
        require(
            torch.equal(getattr(rollout, name), getattr(canvas, name)),
            f"{where}: {name} is not the canvas'",
        )
    open_mask = completion_columns(canvas.ids, canvas.gen_length) & ~canvas.fixed_mask
    open_mask &= canvas.attention_mask
    require(
        torch.equal(rollout.ids[~open_mask], canvas.ids[~open_mask]),
        f"{where}: pads, prompts or anchors were changed",
    )
    require(not bool((rollout.ids == den.mask_id).any()), f"{where}: a mask token is left")
    ends = first_eos_mask(rollout.ids, canvas.gen_length, *end_ids(den))
    ends &= ~completion_columns(rollout.ids, (grid or 1) - 1)
    require(
        torch.equal(rollout.completion_mask, ends),
        f"{where}: completion_mask does not end at the first EOS or end-of-turn token",
    )
    require(
        torch.equal(rollout.decoded_step == 0, ~open_mask),
        f"{where}: decoded_step must be 0 at what is given, and nowhere else",
    )
    drawn = open_mask & (rollout.decoded_step <= rollout.nfe[:, None])
    require(bool((rollout.nfe >= 1).all()), f"{where}: rows with open tokens made no call")
    require(
        bool((drawn | ~rollout.action_mask).all()),
        f"{where}: an action token was revealed by none of the row's nfe calls",
    )
    if "step_maps" in engine.features:
        steps = rollout.decoded_step.masked_fill(~drawn, 0)
        calls = [set(row.tolist()) - {0} for row in steps]
        require(
            all(
                own == set(range(1, int(n) + 1)) for own, n in zip(calls, rollout.nfe, strict=True)
            ),
            f"{where}: every call of 1..nfe reveals a token, and decoded_step tells which",
        )
    if "behavior_logps" in engine.features:
        logps = rollout.behavior_logps
        require(
            bool((logps.isfinite() & (logps <= 0)).all()) and not bool(logps[~drawn].any()),
            f"{where}: behavior_logps must be finite, at most 0, and 0 where nothing was drawn",
        )


def _check_greedy(engine: Rollouts, den: Denoiser, canvas: Canvas, select: str) -> None:
    if select == "random":
        return
    ours = _sample(engine, den, canvas, select, 0.0)
    want = _sample(LocalRollouts(den), den, canvas, select, 0.0)
    same = (ours.ids == want.ids) | ~want.completion_mask
    require(
        bool(same.all()),
        f"select={select}: greedy completions are not those of decode on the same weights",
    )


def _check_rows(
    engine: Rollouts, den: Denoiser, canvas: Canvas, select: str, first: Rollout
) -> None:
    order = torch.tensor([3, 0, 4], device=canvas.ids.device)
    again = _sample(engine, den, canvas.rows(order), select, 1.0)
    want = first.rows(order)
    for name in ("ids", "decoded_step", "nfe"):
        require(
            torch.equal(getattr(again, name), getattr(want, name)),
            f"row_keys: in another batch and order a row has other {name}",
        )


def _check_replay(den: Denoiser, rollout: Rollout) -> None:
    """Scoring equals sampling: the replayed trajectory has the recorded log-probabilities."""
    exact = trajectory()
    views = exact.make_views(rollout, den.mask_id, torch.Generator().manual_seed(0))
    with torch.no_grad():
        replayed = token_logps(den, rollout, exact, views)
    recorded = torch.where(rollout.action_mask, rollout.behavior_logps, 0.0)
    require(
        close(replayed.to(recorded.dtype), recorded, units=2048),
        "behavior_logps are not what the denoiser says of the tokens at the calls of decoded_step",
    )


def _check_truncated(rollout: Rollout, den: Denoiser, engine: Rollouts) -> None:
    require(
        (rollout.top_k, rollout.top_p) == (2, 0.95),
        f"truncation: a rollout of top_k=2, top_p=0.95 says {rollout.top_k}, {rollout.top_p}",
    )
    if "kept_ids" not in engine.features:
        return
    kept = rollout.kept
    require(kept is not None, "kept_ids: kept of a rollout with top_k=2 is None")
    assert kept is not None
    require(
        kept.shape[:2] == (len(rollout.ids), rollout.gen_length),
        f"kept must be (rows, gen_length, K), got {tuple(kept.shape)}",
    )
    tokens = rollout.ids[:, -rollout.gen_length :, None]
    drawn = rollout.action_mask[:, -rollout.gen_length :]
    require(bool(((kept == tokens).any(-1) | ~drawn).all()), "a token is none of its kept ids")
    require(bool(((kept >= 0).sum(-1) <= 2).all()), "top_k=2: more than 2 ids are kept")
    if engine.features >= {"step_maps", "behavior_logps"}:
        _check_replay(den, rollout)


def _check_gamma_function(engine: Rollouts, canvas: Canvas) -> None:
    adaptive = sorted(name for name in engine.rules if RULES[name].prefix is not None)
    require(bool(adaptive), "gamma_function is of use to adaptive rules, and rules has none")
    settings = DecodeSettings(block_length=_LENGTH, steps=_LENGTH, select=adaptive[0])

    def gamma(hidden: Tensor, rows: Tensor) -> Tensor:
        return torch.full((len(hidden),), 0.5, dtype=torch.float64, device=hidden.device)

    by_number = engine.sample(canvas, settings, None, 0.5)
    by_function = engine.sample(canvas, settings, None, gamma)
    require(
        torch.equal(by_number.ids, by_function.ids)
        and torch.equal(by_number.gamma, by_function.gamma),
        "gamma as a function that returns 0.5 is not gamma 0.5",
    )


@torch.no_grad()
def _check_sync(engine: Rollouts, den: Denoiser, canvas: Canvas, select: str) -> None:
    weights = _weights(den)
    kept = [weight.clone() for weight in weights]
    before = _sample(LocalRollouts(den), den, canvas, select, 0.0)
    try:
        for weight in weights:
            weight.neg_()
        after = _sample(LocalRollouts(den), den, canvas, select, 0.0)
        require(
            not torch.equal(before.ids, after.ids),
            "the check needs a denoiser whose greedy completions depend on its weights",
        )
        engine.sync()
        _check_greedy(engine, den, canvas, select)
    finally:
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
        engine.sync()


def _weights(den: Any) -> list[Tensor]:
    model = getattr(den, "model", None)
    return list(model.parameters()) if isinstance(model, nn.Module) else [den.log_weights]
