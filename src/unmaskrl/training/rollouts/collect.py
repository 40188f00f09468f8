"""From problems to rewarded rollouts: prompts, anchors, decoding, rewards.

One step is a pure function of (weights, seed, step), so it can be repeated exactly after a crash
and split over ranks by whole groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...core.canvas import anchored_canvas
from ...core.decoding import Gamma, planned_calls, whole_blocks
from ...core.rng import named_generator
from ...core.rollouts import Rollouts
from ...core.types import Canvas, Rollout
from ...models.denoiser import ModelDenoiser
from ...models.tokenizer import decode_texts
from ...recipes.registry import selection_rule, settings_at
from ...recipes.schema import DecodeConfig, Recipe
from ...tasks import CallContext, Example, Grades, TrainerState, TrlReward, grade
from .anchors import Anchors
from .problems import Problems, Rewarded


def rollout_step(
    recipe: Recipe,
    problems: Problems,
    anchors: Anchors,
    rollouts: Rollouts,
    denoiser: ModelDenoiser,
    functions: dict[str, TrlReward],
    step: int,
    share_done: float,
    rank: int = 0,
    num_ranks: int = 1,
    gamma_of: Callable[[Tensor, Tensor], Gamma] | None = None,
) -> Rewarded:
    """Decode and reward this rank's groups of one step; row ids are global, so ranks and batches
    change nothing.

    ``rollouts`` decodes; ``denoiser`` says which ids are special and where tensors belong.
    ``gamma_of(prompt_mask, row_ids)``: a threshold policy's ``gamma`` in place of the recipe's
    number. With ``prior.when=all_wrong`` groups without a right rollout are decoded again,
    anchored.
    """
    indices = problems.indices(step)
    size = recipe.train.group_size
    first = step * recipe.train.prompts_per_step
    groups = [
        _Group(indices[position], first + position, size)
        for position in range(rank, len(indices), num_ranks)
    ]

    def attempt(given: list[list[dict[int, int]]], rows: list[int], name: str) -> Rewarded:
        canvas = anchored_canvas(
            [problems.prompt(group.problem) for group in groups for _ in range(size)],
            [one for group in given for one in group],
            gen_length=recipe.decode.gen_length,
            denoiser=denoiser,
            row_ids=[row for group in groups for row in group.rows],
            group_ids=[group.id for group in groups for _ in range(size)],
            device=denoiser.device,
        )
        canvas = canvas.rows(torch.tensor(rows, device=denoiser.device))
        rollout = _sampled(recipe, rollouts, canvas, step, name, gamma_of)
        examples = [problems.examples[groups[row // size].problem] for row in rows]
        return _rewarded(recipe, problems, functions, step, rollout, examples)

    def hints(group: _Group) -> list[dict[int, int]]:
        return anchors.of_group(group.problem, step, share_done, group.rows)

    every = list(range(len(groups) * size))
    if recipe.prior.when == "always":
        return attempt([hints(group) for group in groups], every, "rollout")
    blank: list[dict[int, int]] = [{}] * size
    done = attempt([blank] * len(groups), every, "rollout")
    wrong = [i for i in range(len(groups)) if not done.correct[i * size :][:size].any()]
    if not wrong:
        return done
    given = [hints(group) if i in wrong else blank for i, group in enumerate(groups)]
    rows = [i * size + k for i in wrong for k in range(size)]
    again = attempt(given, rows, "rollout-again")
    return rescued(done, again, rows, size, recipe.prior.most_replaced or size)


@dataclass(frozen=True, slots=True)
class _Group:
    """A problem's rollouts: its index, and the ids of the group and of its rows."""

    problem: int
    id: int
    size: int

    @property
    def rows(self) -> list[int]:
        return [self.id * self.size + i for i in range(self.size)]


def rescued(done: Rewarded, again: Rewarded, rows: list[int], size: int, most: int) -> Rewarded:
    """``done`` with the right ones of ``again`` in place of the same rows, ``most`` of each group
    (IGPO, arXiv 2509.10396); ``again`` holds whole groups of ``size``, at ``rows``.

    A wrong group's rollouts are exchangeable, so which of them go makes no difference.
    """
    right = again.correct.view(-1, size)
    taken = (right & (right.cumsum(-1) <= most)).flatten()
    new = taken.nonzero().squeeze(-1)
    old = torch.tensor(rows)[new]
    places = dict(zip(old.tolist(), new.tolist(), strict=True))

    def merged(ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
        return [theirs[places[i]] if i in places else one for i, one in enumerate(ours)]

    def put(ours: Tensor, theirs: Tensor) -> Tensor:
        device = ours.device
        return ours.index_copy(0, old.to(device), theirs[new.to(theirs.device)].to(device))

    tensors = {
        f.name: put(value, getattr(again.rollout, f.name))
        for f in fields(done.rollout)
        if isinstance(value := getattr(done.rollout, f.name), Tensor)
    }
    # grades may differ in their parts; one that a text does not have abstains
    absent: tuple[list[None], list[None]] = ([None] * len(done.texts), [None] * len(rows))
    parts = {
        name: merged(done.parts.get(name, absent[0]), again.parts.get(name, absent[1]))
        for name in {**done.parts, **again.parts}
    }
    spent = int(done.rollout.nfe.sum() + again.rollout.nfe.sum())
    rollout = replace(done.rollout, **tensors)
    return replace(
        done,
        rollout=rollout,
        texts=merged(done.texts, again.texts),
        rewards=put(done.rewards, again.rewards),
        parts=parts,
        correct=put(done.correct, again.correct),
        anchored=put(done.anchored, again.anchored),
        unscored=Grades(parts=parts, correct=done.correct.tolist()).unscored(),
        logged={**again.logged, **done.logged},
        extra={
            name: merged(values, again.extra[name])
            for name, values in done.extra.items()
            if len(again.extra.get(name, ())) == len(again.texts)
        },
        dropped_calls=spent - int(rollout.nfe.sum()),
        asked_again=len(rows),
        replaced=len(places),
    )


def _rewarded(
    recipe: Recipe,
    problems: Problems,
    functions: dict[str, TrlReward],
    step: int,
    rollout: Rollout,
    examples: list[Example],
) -> Rewarded:
    ids = rollout.completions()
    texts = decode_texts(problems.tokenizer, ids)
    context = _context(recipe, step, ids, len(problems.examples))
    grades = grade(problems.task, examples, texts, context, functions)
    return Rewarded(
        rollout=rollout,
        examples=examples,
        texts=texts,
        rewards=torch.tensor(grades.totals()),
        parts=grades.parts,
        correct=torch.tensor(grades.correct),
        anchored=rollout.anchor_mask.any(-1).cpu(),
        unscored=grades.unscored(),
        logged={name: sum(values) / len(values) for name, values in context.metrics.items()},
        extra=context.extra,
    )


def _context(recipe: Recipe, step: int, ids: list[list[int]], num_problems: int) -> CallContext:
    """What reward functions are told of the step."""
    state = TrainerState(
        global_step=step,
        max_steps=recipe.train.steps,
        epoch=step * recipe.train.prompts_per_step / num_problems,
    )
    return CallContext(completion_ids=ids, trainer_state=state, run_name=recipe.name)


def _sampled(
    recipe: Recipe,
    rollouts: Rollouts,
    canvas: Canvas,
    step: int,
    name: str,
    gamma_of: Callable[[Tensor, Tensor], Gamma] | None,
) -> Rollout:
    gamma: Gamma | None = recipe.decode.gamma
    if gamma_of is not None:
        gamma = gamma_of(canvas.prompt_mask, canvas.row_ids)
    return rollouts.sample(
        canvas,
        settings_at(recipe.decode, recipe.decode.temperature),
        named_generator(recipe.run.seed, name, step),
        gamma,
    )


def most_calls(decode: DecodeConfig, grid: int | None) -> int:
    """The most denoiser calls that decoding a batch can take with a denoiser whose blocks have
    ``grid`` tokens (None: full attention).
    """
    if selection_rule(decode.select).prefix is not None:
        return decode.gen_length  # a token per call, where the rule decides as it goes
    d = decode
    return max(
        planned_calls(
            whole_blocks(d.gen_length, d.block_length, shared),
            d.gen_length,
            d.steps,
            d.exit_at,
            grid,
        )
        for shared in range(grid or 1)
    )
