"""Closed forms for the count of denoiser calls, against what decode counts and what the denoiser
was asked.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import HashDenoiser, same_maths, seeded
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode, exit_count, planned_calls

LENGTH = 12
# No anchors, spread, one block full, all but one, everything, and a few at both ends.
PATTERNS = [(), (0, 3, 5, 10), (0, 1, 2, 3), tuple(range(1, 12)), tuple(range(12)), (0, 11), (4, 5)]


def no_eos() -> HashDenoiser:
    return HashDenoiser(length=LENGTH, eos_bias=-1e9)


def open_per_block(pattern: tuple[int, ...], block_length: int, length: int = LENGTH) -> list[int]:
    return [
        sum(c not in pattern for c in range(start, start + block_length))
        for start in range(0, length, block_length)
    ]


def decoded(denoiser, patterns, **options):
    anchors = [{c: c % 5 for c in pattern} for pattern in patterns]
    canvas = anchored_canvas(
        [[1, 2]] * len(patterns), anchors, gen_length=denoiser.length, denoiser=denoiser
    )
    return decode(denoiser, canvas, temperature=1.0, generator=seeded(3), **options)


@pytest.mark.parametrize("block_length", [12, 6, 4, 3, 1])
@pytest.mark.parametrize("steps", [12, 7, 5, 3, 1])
@pytest.mark.parametrize("exit_at", [None, 0.0, 0.5, 0.7, 1.0])
def test_planned_calls_are_the_calls(block_length: int, steps: int, exit_at: float | None) -> None:
    """Rows of all patterns in one batch: each has its own count, and the denoiser saw no row more
    often.
    """
    denoiser = no_eos()
    rollout = decoded(
        denoiser, PATTERNS, block_length=block_length, steps=steps, exit_at=exit_at, select="random"
    )
    want = [
        planned_calls(open_per_block(p, block_length), LENGTH, steps, exit_at) for p in PATTERNS
    ]
    assert rollout.nfe.tolist() == want
    assert sum(denoiser.rows) == sum(want)
    assert denoiser.rows == [sum(n > call for n in want) for call in range(max(want))]
    for row, pattern in enumerate(PATTERNS):
        steps_of_row = rollout.decoded_step[row, -LENGTH:].tolist()
        # Every open token in exactly one call, every call reveals something, anchors in none.
        assert set(steps_of_row) - {0} == set(range(1, want[row] + 1))
        assert [c for c, s in enumerate(steps_of_row) if s == 0] == list(pattern)


@pytest.mark.parametrize("block_length", [12, 6, 4, 3])
@pytest.mark.parametrize("steps", [12, 7, 6, 4, 2])
def test_without_exit_calls_are_the_sum_of_rounded_up_blocks(block_length: int, steps: int) -> None:
    for pattern in PATTERNS:
        counts = open_per_block(pattern, block_length)
        assert planned_calls(counts, LENGTH, steps) == sum(
            math.ceil(n * steps / LENGTH) for n in counts
        )


@pytest.mark.parametrize("block_length", [12, 4])
@pytest.mark.parametrize("steps", [12, 7, 5])
def test_blocks_are_in_order_and_quotas_differ_by_at_most_one_token(
    block_length: int, steps: int
) -> None:
    rollout = decoded(no_eos(), PATTERNS, block_length=block_length, steps=steps, select="max_prob")
    for row in range(len(PATTERNS)):
        latest = 0
        for start in range(0, LENGTH, block_length):
            calls = [
                s
                for s in rollout.decoded_step[row, 2 + start : 2 + start + block_length].tolist()
                if s > 0
            ]
            if not calls:
                continue
            assert min(calls) == latest + 1
            latest = max(calls)
            sizes = [calls.count(s) for s in range(min(calls), latest + 1)]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)  # LLaDA: the first calls take the remainder
            assert len(sizes) == math.ceil(len(calls) * steps / LENGTH)


@pytest.mark.parametrize("exit_at", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_the_exit_call_fills_all_that_is_left_and_nothing_else_is_left_early(
    exit_at: float,
) -> None:
    rollout = decoded(
        no_eos(), PATTERNS, block_length=4, steps=12, exit_at=exit_at, select="entropy"
    )
    for row, pattern in enumerate(PATTERNS):
        free = LENGTH - len(pattern)
        keep = exit_count(free, exit_at)
        exited = rollout.exit_mask[row].sum()
        assert int(exited) == free - keep
        assert int(rollout.exit_step[row]) == (int(rollout.nfe[row]) if free > keep else 0)
        if free > keep:
            assert int(rollout.nfe[row]) == keep + 1  # one token per call before


def test_exit_count_is_robust_to_binary_fractions() -> None:
    assert 0.7 * 10 != 7.000000000000001 and 0.07 * 100 > 7  # 0.07 * 100 is 7.000000000000001
    assert exit_count(10, 0.7) == 7
    assert exit_count(100, 0.07) == 7
    assert [exit_count(10, x) for x in (0.0, 0.01, 0.1, 0.11, 0.95, 1.0)] == [0, 1, 1, 2, 10, 10]
    assert exit_count(0, 0.5) == 0
    denoiser = HashDenoiser(length=10, eos_bias=-1e9)
    rollout = decoded(denoiser, [()], block_length=5, steps=10, exit_at=0.7, select="left_to_right")
    assert rollout.nfe.tolist() == [8]
    assert rollout.decoded_step[0, 2:].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    denoiser = HashDenoiser(length=100, eos_bias=-1e9)
    rollout = decoded(
        denoiser, [()], block_length=100, steps=100, exit_at=0.07, select="left_to_right"
    )
    assert rollout.nfe.tolist() == [8]


@pytest.mark.parametrize("per_call", [1, 2, 3])
@pytest.mark.parametrize("anchors", [0, 6, 12, 18])
@pytest.mark.parametrize("left", [0.25, 0.5, 0.75, 0.05])
def test_stp_theorem_for_one_block(per_call: int, anchors: int, left: float) -> None:
    """T1a of docs/theory.md: ceil((1 - gamma)(1 - t_c) N) + 1 calls if r = L / N divides the free
    tokens.
    """
    length = 36
    steps = length // per_call
    gamma = anchors / length
    free = length - anchors
    pattern = tuple(range(3, 3 + anchors))
    rollout = decoded(
        HashDenoiser(length=length, eos_bias=-1e9),
        [pattern],
        block_length=length,
        steps=steps,
        exit_at=1 - left,
        select="random",
    )
    claim = math.ceil((1 - gamma) * (1 - left) * steps - 1e-9) + 1
    # If rounding (1 - t_c) f up to tokens leaves nothing for the exit call, there is none.
    assert rollout.nfe.tolist() == [claim - (exit_count(free, 1 - left) == free)]


def test_block_rounding_adds_at_most_one_call_per_block() -> None:
    for block_length in (12, 6, 4, 3):
        for pattern in PATTERNS:
            counts = open_per_block(pattern, block_length)
            one_block = math.ceil(sum(counts) * 5 / LENGTH)
            assert one_block <= planned_calls(counts, LENGTH, 5) <= one_block + len(counts)


def test_rows_decode_alone_as_they_do_in_a_mixed_batch() -> None:
    denoiser = HashDenoiser(length=LENGTH, eos_bias=0.5)
    options = {"block_length": 4, "steps": 7, "exit_at": 0.6, "select": "entropy"}
    together = decoded(denoiser, PATTERNS, **options)
    anchors = [{c: c % 5 for c in pattern} for pattern in PATTERNS]
    for row in range(len(PATTERNS)):
        canvas = anchored_canvas(
            [[1, 2]], [anchors[row]], gen_length=LENGTH, denoiser=denoiser, row_ids=[row]
        )
        alone = decode(denoiser, canvas, temperature=1.0, generator=seeded(3), **options)
        for name in ("ids", "decoded_step", "nfe", "exit_step"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name
        assert same_maths(alone.behavior_logps[0], together.behavior_logps[row])


def test_eos_ends_a_row_before_its_planned_calls_and_never_later() -> None:
    denoiser = HashDenoiser(length=LENGTH, eos_bias=1.0)
    rollout = decoded(denoiser, [()] * 60, block_length=4, steps=12, select="left_to_right")
    length = rollout.completion_mask.sum(-1)
    # left to right, one token per call: the calls are the tokens
    assert torch.equal(rollout.nfe, length)
    assert (length < LENGTH).any()
    assert sum(denoiser.rows) == int(length.sum())
