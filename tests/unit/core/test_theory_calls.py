"""Calls saved by pruning (docs/theory.md 1): what decode() counts, against closed forms and the
paper's formula.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tests.conftest import HashDenoiser, seeded
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode, exit_count, planned_calls

# (gen_length, block_length, steps); r = gen_length / steps tokens per call
WHOLE = [(12, 12, 12), (12, 4, 6), (24, 8, 12), (16, 4, 4), (24, 6, 8), (20, 5, 4)]
BROKEN = [(12, 4, 7), (12, 3, 5), (10, 5, 7), (12, 12, 7)]
EXITS = [None, 0.0, 0.3, 0.5, 0.85, 0.95, 1.0]


def patterns(length: int) -> list[tuple[int, ...]]:
    """Anchors: none, one, all but one, all, and random sets."""
    generator = seeded(1)
    drawn = [
        torch.randperm(length, generator=generator)[: 1 + k * length // 6].sort().values.tolist()
        for k in range(5)
    ]
    return [(), (0,), tuple(range(1, length)), tuple(range(length)), *map(tuple, drawn)]


def open_per_block(pattern: tuple[int, ...], length: int, block_length: int) -> list[int]:
    return [
        sum(c not in pattern for c in range(start, start + block_length))
        for start in range(0, length, block_length)
    ]


def counted(
    patterns_: list[tuple[int, ...]],
    length: int,
    block_length: int,
    steps: int,
    exit_at: float | None,
) -> list[int]:
    """Denoiser calls of each row, from a real decoding without EOS."""
    denoiser = HashDenoiser(length=length, eos_bias=-1e9)
    anchors = [{c: c % 5 for c in pattern} for pattern in patterns_]
    canvas = anchored_canvas([[1, 2]] * len(anchors), anchors, gen_length=length, denoiser=denoiser)
    rollout = decode(
        denoiser,
        canvas,
        block_length=block_length,
        steps=steps,
        select="random",
        exit_at=exit_at,
        generator=seeded(3),
    )
    assert sum(denoiser.rows) == int(rollout.nfe.sum())
    return rollout.nfe.tolist()


def closed_form(counts: list[int], rate: Fraction, keep: int) -> tuple[int, int]:
    """Calls, and blocks that any call before the exit worked on.

    Full blocks take ceil(n / r); the exit's block the fewest calls whose quotas (n // k or n // k +
    1) cover what is missing.
    """
    calls = 0
    touched = 0
    missing = keep
    for n in counts:
        if missing == 0 or n == 0:
            continue
        k = math.ceil(n / rate)
        quota, larger = divmod(n, k)
        m = min(n, missing)
        early = larger * (quota + 1)  # tokens of the calls that take one more
        calls += (
            math.ceil(m / (quota + 1)) if m <= early else larger + math.ceil((m - early) / quota)
        )
        touched = touched + 1
        missing = missing - m
    return calls + (sum(counts) > keep), touched


@pytest.mark.parametrize("exit_at", EXITS)
@pytest.mark.parametrize("setting", WHOLE + BROKEN)
def test_calls_are_the_closed_form(setting: tuple[int, int, int], exit_at: float | None) -> None:
    length, block_length, steps = setting
    nfe = counted(patterns(length), *setting, exit_at)
    for got, pattern in zip(nfe, patterns(length), strict=True):
        counts = open_per_block(pattern, length, block_length)
        keep = sum(counts) if exit_at is None else exit_count(sum(counts), exit_at)
        assert (
            got
            == closed_form(counts, Fraction(length, steps), keep)[0]
            == planned_calls(counts, length, steps, exit_at)
        )


@pytest.mark.parametrize("exit_at", EXITS)
@pytest.mark.parametrize("setting", WHOLE)
def test_t1a_holds_up_to_one_call_per_block(
    setting: tuple[int, int, int], exit_at: float | None
) -> None:
    """ceil((1 - gamma)(1 - t_c) N) + 1 <= calls <= that + the blocks worked on, for whole r; no
    slack where r divides all.
    """
    length, block_length, steps = setting
    r = length // steps
    for got, pattern in zip(
        counted(patterns(length), *setting, exit_at), patterns(length), strict=True
    ):
        counts = open_per_block(pattern, length, block_length)
        free = sum(counts)
        decided = Fraction(1) if exit_at is None else Fraction(str(exit_at))  # 1 - t_c
        gamma = Fraction(len(pattern), length)
        keep = math.ceil(decided * free)
        claim = math.ceil((1 - gamma) * decided * steps) + (free > keep)
        slack = got - claim
        assert 0 <= slack <= closed_form(counts, Fraction(r), keep)[1]
        if all(n % r == 0 for n in counts):
            assert slack == 0


def test_the_slack_of_one_call_per_block_is_reached() -> None:
    """Four tokens per call. One open token in each of 4 blocks: 4 calls, not 1. Five in one block,
    four to decide: 2, not 1.
    """
    spread = tuple(c for c in range(16) if c % 4)
    assert counted([spread], 16, 4, 4, None) == [4]
    # ceil(4 / 4) + 1, and 1: the quotas of 5 are 3 and 2
    assert counted([tuple(range(5, 16))], 16, 16, 4, 0.8) == [3]
    # 16 per call, open tokens 1, 1, 1, 17, the exit after 13: T1a says 2 calls; four blocks, four
    # more.
    anchors = tuple(c for c in range(80) if (c % 20 > 0 if c < 60 else c > 76))
    assert open_per_block(anchors, 80, 20) == [1, 1, 1, 17]
    assert math.ceil(13 / 16) + 1 == 2 and counted([anchors], 80, 20, 5, 13 / 20) == [2 + 4]


def test_if_calls_are_not_whole_tokens_the_claim_is_no_lower_bound() -> None:
    """r = 12 / 7: the first calls of a block take 2 tokens, so an exit may come earlier than the
    formula says; never later.
    """
    below = 0
    for setting in BROKEN:
        length, block_length, steps = setting
        for exit_at in (0.3, 0.5, 0.85):
            for got, pattern in zip(
                counted(patterns(length), *setting, exit_at), patterns(length), strict=True
            ):
                counts = open_per_block(pattern, length, block_length)
                keep = exit_count(sum(counts), exit_at)
                claim = math.ceil(Fraction(keep * steps, length)) + (sum(counts) > keep)
                assert got <= claim + closed_form(counts, Fraction(length, steps), keep)[1]
                below += got < claim
    assert below > 0


@pytest.mark.parametrize("arm", ["blank", "anchored", "exit", "both"])
@pytest.mark.parametrize("block_length", [40, 20, 10])
@pytest.mark.parametrize("r", [1, 2])
def test_the_saving_is_the_papers_where_everything_divides(
    arm: str, block_length: int, r: int
) -> None:
    """1 - calls / N = gamma + t_c - gamma t_c - 1/N; gamma alone with anchors only, t_c - 1/N with
    the exit only.
    """
    length = 40
    gamma = Fraction(0)
    left = Fraction(0)
    anchors: tuple[int, ...] = ()
    if arm in ("anchored", "both"):
        gamma = Fraction(2, 10)
        anchors = tuple(c for c in range(length) if c % 10 in (1, 7))
    if arm in ("exit", "both"):
        left = Fraction(1, 4)
    steps = length // r
    (got,) = counted([anchors], length, block_length, steps, float(1 - left) if left else None)
    saving = gamma + left - gamma * left - (Fraction(1, steps) if left else 0)
    assert Fraction(steps - got, steps) == saving


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 6, 12, 18])
@pytest.mark.parametrize("cut", [9, 18, 27, 33])
def test_t1b_counts_anchors_as_decided(r: int, count: int, cut: int) -> None:
    """The exit at ``cut`` of all L positions is our exit_at = (cut - |A|) / f: ceil((tau - gamma)
    N) + 1 calls, never more than T1a at the same tau, and gamma t_c N fewer before rounding.
    """
    length = 36
    steps = length // r
    free = length - count
    anchors = tuple(range(3, 3 + count))
    tau = Fraction(cut, length)
    gamma = Fraction(count, length)
    (got,) = counted([anchors], length, length, steps, max(0, cut - count) / free)
    assert got == math.ceil(max(Fraction(0), tau - gamma) * steps) + 1
    (free_count,) = counted([anchors], length, length, steps, float(tau))
    assert got <= free_count
    if cut >= count:
        assert (1 - gamma) * tau * steps - (tau - gamma) * steps == gamma * (1 - tau) * steps


@pytest.mark.parametrize("exit_at", [None, 0.5, 0.9])
def test_pruning_never_adds_a_call_but_the_exit_itself(exit_at: float | None) -> None:
    """More anchors, a subset order: calls without exit never rise; an exit costs at most one call
    more than none.
    """
    chain = [tuple(range(k)) for k in range(0, 25, 3)] + [tuple(range(24))]
    for block_length, steps in ((8, 12), (6, 8), (24, 24)):
        plain = counted(chain, 24, block_length, steps, None)
        assert plain == sorted(plain, reverse=True)
        pruned = counted(chain, 24, block_length, steps, exit_at)
        assert all(p <= q + 1 for p, q in zip(pruned, plain, strict=True))
