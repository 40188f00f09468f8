# ruff: noqa: B905 (as such files are written)
"""Reward functions in the ways that TRL's documentation allows, written for these tests."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import torch


def by_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def by_characters(completions, **kwargs):
    """For rows whose prompts are texts."""
    return [float(len(completion)) for completion in completions]


def opens_with_tag(completions, **kwargs):
    """For rows whose prompts are chats."""
    return [
        1.0 if completion[0]["content"].startswith("<answer>") else 0.0
        for completion in completions
    ]


def equals_reference(completions, ground_truth, **kwargs):
    return [
        1.0 if completion == gold else 0.0 for completion, gold in zip(completions, ground_truth)
    ]


def only_even_rows(prompts, completions, level, **kwargs):
    return [None if n % 2 else 1.0 for n in level]


def only_odd_rows(prompts, completions, level, **kwargs):
    return [-1.0 if n % 2 else None for n in level]


def by_progress(completions, trainer_state=None, log_extra=None, log_metric=None, **kwargs):
    share = trainer_state.global_step / trainer_state.max_steps
    if log_extra:
        log_extra("share", [share] * len(completions))
    if log_metric:
        log_metric("share", share)
    return [share] * len(completions)


def as_array(completions, **kwargs):
    return np.arange(len(completions), dtype=np.float32)


def as_tensor(completions, **kwargs):
    return torch.linspace(0, 1, len(completions), requires_grad=True)


def as_scalars(completions, **kwargs):
    kinds = [
        np.float32(0.5),
        np.bool_(True),
        torch.tensor(0.25),
        True,
        np.int64(3),
        np.array(2.0),
        torch.tensor([1.5]),
    ]
    return [kinds[row % len(kinds)] for row in range(len(completions))]


def as_iterator(completions, **kwargs):
    return (float(row) for row in range(len(completions)))


class Counted:
    """A reward that is an object."""

    def __call__(self, prompts, completions):
        return [1.0] * len(completions)


counted = Counted()
LOOPS: list[int] = []
EVENTS: list[str] = []  # in the order in which they came


async def slow_one(prompts, completions, **kwargs):
    LOOPS.append(id(asyncio.get_running_loop()))
    EVENTS.append("begins")
    await asyncio.sleep(0.01)
    EVENTS.append("ends")
    return [1.0 if completion else 0.0 for completion in completions]


async def slow_two(completions, **kwargs):
    EVENTS.append("begins")
    await asyncio.sleep(0.01)
    EVENTS.append("ends")
    return np.zeros(len(completions)) + random.random() * 0
