"""The decoding loop against a slow decoder of one row at a time; EOS, the mask token, errors,
parity, replay.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import QUOTA_RULES, HashDenoiser, same_maths, seeded, tiny_llada
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.rng import counter_uniform, draw_seed
from unmaskrl.core.scoring import view_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Canvas, Rollout, Views

ANCHORS = [
    {},
    {0: 3, 1: 2, 5: 4},
    dict.fromkeys(range(4), 1),
    {11: 6},
    {i: i % 7 for i in range(12)},
    {4: 1, 6: 1, 9: 0},
]


@dataclass
class Slow:
    """What the slow decoder found out about one row's completion."""

    ids: list[int]
    step: list[int]
    logps: list[float]
    calls: int = 0
    exit_step: int = 0


def softmax(logits: list[float], temperature: float, banned: int | None) -> list[float]:
    scaled = [-math.inf if i == banned else x / temperature for i, x in enumerate(logits)]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    total = math.fsum(weights)
    return [w / total for w in weights]


def slow_decode(
    denoiser,
    canvas: Canvas,
    row: int,
    *,
    block_length,
    steps,
    select,
    temperature,
    seed=0,
    exit_at=None,
    stop=True,
) -> Slow:
    """One row, one position and one token at a time, on Python lists; shares only the random
    numbers with decode.
    """
    length = canvas.gen_length
    width = canvas.ids.shape[1]
    row_id = int(canvas.row_ids[row])
    ids = canvas.ids[row].tolist()
    out = Slow(ids[-length:], [0] * length, [0.0] * length)
    columns = torch.arange(length)
    call_numbers = torch.arange(length + 2)[:, None]
    order = counter_uniform(seed, torch.tensor(1), torch.tensor(row_id), columns).tolist()
    noise = counter_uniform(
        seed, torch.tensor(0), torch.tensor(row_id), call_numbers, columns
    ).tolist()
    free = out.ids.count(denoiser.mask_id)
    keep = None if exit_at is None else math.ceil(exit_at * free - 1e-9)
    quota: list[int] = []
    current = -1
    while denoiser.mask_id in out.ids:
        opened = [c for c in range(length) if out.ids[c] == denoiser.mask_id]
        block = opened[0] // block_length
        window = [c for c in opened if c // block_length == block]
        if block != current:
            current = block
            calls = math.ceil(len(window) * steps / length)
            quota = [len(window) // calls + (i < len(window) % calls) for i in range(calls)]
        decided = free - len(opened)
        if keep is not None and decided >= keep:
            window = opened
            count = len(opened)
            out.exit_step = out.calls + 1
        else:
            count = quota.pop(0) if keep is None else min(quota.pop(0), keep - decided)
        out.calls += 1
        full = torch.tensor([ids[: width - length] + out.ids])
        logits = denoiser.logits(full, canvas.attention_mask[row : row + 1])[0, -length:].tolist()
        chosen = []
        for c in window:
            probs = softmax(logits[c], temperature or 1.0, denoiser.mask_id)
            token = pick(probs, temperature, noise[out.calls][c])
            plain = softmax(logits[c], 1.0, denoiser.mask_id)
            score = {
                "confidence": softmax(logits[c], 1.0, None)[token],
                "max_prob": max(plain),
                "entropy": sum(p * math.log(p) for p in plain if p > 0),
                "margin": sorted(plain)[-1] - sorted(plain)[-2],
                "random": order[c],
                "left_to_right": -c,
            }[select]
            chosen.append((-score, c, token, math.log(probs[token])))
        for _, c, token, logp in sorted(chosen)[:count]:
            out.ids[c] = token
            out.step[c] = out.calls
            out.logps[c] = logp
        first_open = out.ids.index(denoiser.mask_id) if denoiser.mask_id in out.ids else length
        if stop and denoiser.eos_id in out.ids[:first_open]:
            for c in range(length):
                if out.ids[c] == denoiser.mask_id:
                    out.ids[c] = denoiser.eos_id
                    out.step[c] = out.calls + 1
    return out


def pick(probs: list[float], temperature: float, uniform: float) -> int:
    if temperature == 0:
        return probs.index(max(probs))
    total = 0.0
    for token, p in enumerate(probs):
        total += p
        if uniform < total:
            return token
    raise AssertionError("the uniform is beyond the sum")


def canvas_for(denoiser: Denoiser, gen_length: int = 12) -> Canvas:
    prompts = [[1, 2, 3], [4], [5, 6], [1, 1, 1], [2], [3, 3]]
    return anchored_canvas(
        prompts, ANCHORS, gen_length=gen_length, denoiser=denoiser, row_ids=[3, 1, 4, 15, 9, 2]
    )


SETTINGS = [
    {"block_length": 12, "steps": 12},
    {"block_length": 4, "steps": 5, "exit_at": 0.6},
    {"block_length": 6, "steps": 7, "exit_at": 0.0},
    {"block_length": 3, "steps": 12, "exit_at": 0.5, "stop_at_eos": False},
    {"block_length": 1, "steps": 1},
]


@pytest.mark.parametrize("select", QUOTA_RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_decode_is_the_slow_decoder(select: str, temperature: float, setting: dict) -> None:
    denoiser = HashDenoiser(length=12, eos_bias=-0.5)
    canvas = canvas_for(denoiser)
    rollout = decode(
        denoiser, canvas, select=select, temperature=temperature, generator=seeded(8), **setting
    )
    seed = draw_seed(seeded(8)) if temperature or select == "random" else 0
    slow_setting = {("stop" if k == "stop_at_eos" else k): v for k, v in setting.items()}
    for row in range(len(ANCHORS)):
        slow = slow_decode(
            denoiser, canvas, row, select=select, temperature=temperature, seed=seed, **slow_setting
        )
        assert rollout.ids[row, -12:].tolist() == slow.ids
        assert rollout.decoded_step[row, -12:].tolist() == slow.step
        assert rollout.behavior_logps[row, -12:].tolist() == pytest.approx(slow.logps, abs=1e-10)
        assert (int(rollout.nfe[row]), int(rollout.exit_step[row])) == (slow.calls, slow.exit_step)


def test_what_is_given_stays_and_what_is_recorded_is_complete() -> None:
    denoiser = HashDenoiser(length=12)
    canvas = canvas_for(denoiser)
    before = canvas.ids.clone()
    rollout = decode(denoiser, canvas, block_length=4, steps=6, temperature=1.0, generator=seeded())
    assert torch.equal(canvas.ids, before)
    given = canvas.ids != denoiser.mask_id
    assert torch.equal(rollout.ids[given], canvas.ids[given])
    assert torch.equal(rollout.fixed_mask, given)
    assert torch.equal(rollout.anchor_mask, canvas.fixed_mask)
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    assert torch.equal(rollout.behavior_logps != 0, drawn)
    assert (rollout.ids != denoiser.mask_id).all()
    assert (rollout.row_ids.tolist(), rollout.gen_length, rollout.temperature) == (
        [3, 1, 4, 15, 9, 2],
        12,
        1.0,
    )


@pytest.mark.parametrize("select", QUOTA_RULES)
def test_exact_is_claimed_by_the_rules_that_do_not_look_at_drawn_tokens(select: str) -> None:
    denoiser = HashDenoiser(length=12)
    rollout = decode(
        denoiser,
        canvas_for(denoiser),
        block_length=4,
        steps=6,
        select=select,
        temperature=1.0,
        generator=seeded(),
    )
    assert rollout.exact == (select != "confidence")


@pytest.mark.parametrize("select", QUOTA_RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("exit_at", [None, 0.4])
def test_the_mask_token_is_never_drawn(
    select: str, temperature: float, exit_at: float | None
) -> None:
    denoiser = HashDenoiser(length=12, mask_bias=1e6, eos_bias=-50.0)
    rollout = decode(
        denoiser,
        canvas_for(denoiser),
        block_length=6,
        steps=6,
        select=select,
        temperature=temperature,
        exit_at=exit_at,
        generator=seeded(),
    )
    assert (rollout.ids != denoiser.mask_id).all()
    plain = HashDenoiser(length=12, eos_bias=-50.0)
    if select != "confidence":  # whose scores keep the mask token in the sum
        same = decode(
            plain,
            canvas_for(plain),
            block_length=6,
            steps=6,
            select=select,
            temperature=temperature,
            exit_at=exit_at,
            generator=seeded(),
        )
        assert torch.equal(rollout.ids, same.ids)


@pytest.mark.parametrize("select", QUOTA_RULES)
@pytest.mark.parametrize("exit_at", [None, 0.5])
def test_tokens_up_to_the_first_eos_do_not_depend_on_stop_at_eos(
    select: str, exit_at: float | None
) -> None:
    denoiser = HashDenoiser(length=12, eos_bias=0.8)
    canvas = blank_canvas([[1]] * 40, gen_length=12, denoiser=denoiser)
    options = {
        "block_length": 3,
        "steps": 8,
        "select": select,
        "temperature": 1.0,
        "exit_at": exit_at,
    }
    short = decode(denoiser, canvas, generator=seeded(1), **options)
    full = decode(denoiser, canvas, generator=seeded(1), stop_at_eos=False, **options)
    assert short.completions() == full.completions()
    for name in ("completion_mask", "action_mask"):
        assert torch.equal(getattr(short, name), getattr(full, name))
    for name in ("ids", "decoded_step"):
        assert torch.equal(
            getattr(short, name)[short.action_mask], getattr(full, name)[short.action_mask]
        ), name
    assert same_maths(
        short.behavior_logps[short.action_mask], full.behavior_logps[short.action_mask]
    )
    assert (short.nfe <= full.nfe).all() and (short.nfe < full.nfe).any()
    never = short.decoded_step == short.nfe[:, None] + 1
    assert (short.ids[never] == denoiser.eos_id).all() and never.any()
    assert not short.action_mask[never].any()
    assert not (full.decoded_step == full.nfe[:, None] + 1).any()


def test_rows_that_ended_leave_the_batch() -> None:
    denoiser = HashDenoiser(length=12, eos_bias=0.8)
    canvas = blank_canvas([[1]] * 40, gen_length=12, denoiser=denoiser)
    rollout = decode(
        denoiser, canvas, block_length=3, steps=12, temperature=1.0, generator=seeded(1)
    )
    still_there = [int((rollout.nfe > call).sum()) for call in range(int(rollout.nfe.max()))]
    assert denoiser.rows == still_there
    assert still_there[-1] < 40


def test_eos_in_a_later_block_or_behind_open_tokens_does_not_end_a_row() -> None:
    # Token order by confidence: EOS is most certain at the last offset, so it comes first; the row
    # must go on.
    toy = ToyDenoiser(
        independent([[0.6, 0.4], [0.7, 0.3], [0.01, 0.99]]), num_tokens=2, length=3, eos_id=1
    )
    canvas = blank_canvas([[0]], gen_length=3, denoiser=toy)
    rollout = decode(toy, canvas, block_length=3, steps=3, select="max_prob")
    assert rollout.ids.tolist() == [[0, 0, 0, 1]]
    assert rollout.decoded_step.tolist() == [[0, 3, 2, 1]]
    assert rollout.nfe.tolist() == [3]


def independent(marginals: list[list[float]]) -> torch.Tensor:
    """log-weights of a product of marginals."""
    joint = torch.ones(1, dtype=torch.float64)
    for marginal in marginals:
        joint = (joint[:, None] * torch.tensor(marginal, dtype=torch.float64)).flatten()
    return joint.log()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 5}, "block_length 5 does not divide gen_length 12"),
        ({"block_length": 0}, "block_length 0"),
        ({"steps": 0}, "steps must be between 1 and gen_length 12"),
        ({"steps": 13}, "got 13"),
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"exit_at": 1.2}, "exit_at is the share"),
        ({"exit_at": -0.1}, "exit_at is the share"),
        ({"select": "entropie"}, "select must be one of .*entropy.*got 'entropie'"),
        ({"temperature": 0.5}, "pass generator="),
        ({"select": "random"}, "pass generator="),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    denoiser = HashDenoiser(length=12)
    with pytest.raises(ValueError, match=message):
        decode(denoiser, canvas_for(denoiser), **{"block_length": 4, "steps": 6, **options})


def test_an_invalid_canvas_is_refused() -> None:
    denoiser = HashDenoiser(length=12)
    canvas = canvas_for(denoiser)
    canvas.ids[0, -1] = 2
    with pytest.raises(ValueError, match="open positions"):
        decode(denoiser, canvas, block_length=4, steps=6)


def test_greedy_needs_no_generator_and_uses_none() -> None:
    denoiser = HashDenoiser(length=12)
    generator = seeded(4)
    before = generator.get_state()
    with_generator = decode(
        denoiser, canvas_for(denoiser), block_length=4, steps=6, generator=generator
    )
    assert torch.equal(generator.get_state(), before)
    without = decode(denoiser, canvas_for(denoiser), block_length=4, steps=6)
    assert torch.equal(with_generator.ids, without.ids)


def replayed(denoiser: Denoiser, rollout: Rollout) -> torch.Tensor:
    """Log-probs of all drawn tokens, each on the latent before the call that drew it."""
    total = torch.zeros(rollout.ids.shape, dtype=torch.float64)
    for call in range(1, int(rollout.nfe.max()) + 1):
        ids = rollout.latent(torch.full_like(rollout.nfe, call - 1), denoiser.mask_id)
        weight = ((rollout.decoded_step == call) & (call <= rollout.nfe)[:, None]).float()
        with torch.no_grad():
            total += view_logps(denoiser, rollout, Views(ids=ids[:, None], weight=weight[:, None]))[
                :, 0
            ]
    return total


@pytest.mark.parametrize("select", QUOTA_RULES)
@pytest.mark.parametrize("exit_at", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_behavior_logps_are_what_the_latents_give_back(
    select: str, exit_at: float | None, temperature: float
) -> None:
    for dtype in (torch.float64, torch.float32):
        denoiser = tiny_llada(dtype)
        rollout = decode(
            denoiser,
            canvas_for(denoiser),
            block_length=4,
            steps=6,
            select=select,
            temperature=temperature,
            exit_at=exit_at,
            generator=seeded(2),
        )
        assert rollout.behavior_logps.dtype == dtype
        assert (rollout.behavior_logps < 0).any()
        assert same_maths(replayed(denoiser, rollout), rollout.behavior_logps)


def parity_cases() -> list[tuple[Path, str]]:
    here = Path(__file__).resolve().parent
    roots = [
        here.parents[1] / "data",
        here.parents[1] / "data" / "parity",
        here.parents[3] / "shared" / "parity",
    ]
    for root in roots:
        files = sorted(root.glob("llada-tiny*/generate.json"))
        if files:
            return [(file.parent, name) for file in files for name in json.loads(file.read_text())]
    return []


@pytest.mark.skipif(
    not parity_cases(), reason="no parity fixtures (tests/data or ../shared/parity)"
)
@pytest.mark.parametrize(("folder", "name"), parity_cases(), ids=lambda x: getattr(x, "name", x))
def test_greedy_decodings_are_those_of_the_published_generate(folder: Path, name: str) -> None:
    from safetensors.torch import load_file

    from unmaskrl.models.checkpoint import load_denoiser

    denoiser = load_denoiser(folder)
    expected = load_file(folder / "generate.safetensors")
    options = json.loads((folder / "generate.json").read_text())[name]
    assert denoiser.mask_id == 511 and options.pop("cfg_scale", 0.0) == 0.0
    canvas = blank_canvas(
        expected["prompt"].tolist(), gen_length=options.pop("gen_length"), denoiser=denoiser
    )
    rollout = decode(denoiser, canvas, stop_at_eos=False, **options)
    assert rollout.ids.tolist() == expected[name].tolist()
