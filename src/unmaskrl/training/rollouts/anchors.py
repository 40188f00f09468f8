"""Spatial pruning in training: which tokens of a prior answer are fixed in which rollout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.canvas import choose_anchors, predictability, random_scores
from ...core.denoiser import end_ids
from ...core.rng import named_seed
from ...models.denoiser import ModelDenoiser
from ...models.tokenizer import encode_reference
from ...recipes.schema import Recipe
from .problems import Problems, Rewarded

ADAPT_RATE = 0.3  # of keep per step, at a success rate that is off by 1
# weight of a prompt's newest visit in its running success: visits are rare, one per epoch
SOLVED_RATE = 0.5


class Anchors:
    """Spatial pruning: which reference tokens are fixed in which rollout."""

    def __init__(self, recipe: Recipe, problems: Problems, base: ModelDenoiser) -> None:
        self.prior = recipe.prior
        self.recipe = recipe
        self.problems = problems
        self.base = base
        self.stored = None
        if self.prior.name == "anchors" and self.prior.source != "reference":
            self.stored = read_priors(Path(self.prior.source), only_correct=self.prior.only_correct)
            self._check_stored(self.stored)
        self.static: dict[int, list[float]] = {}
        self.adapted = recipe.prior.keep
        self.solved: dict[int, float] = {}  # by problem: running success of its blank rollouts

    def _check_stored(self, stored: dict[str, tuple[list[int], list[bool]]]) -> None:
        """The file belongs to this task and this vocabulary, and anchors something."""
        source = self.prior.source
        own = [stored.get(e.id, ([], []))[0] for e in self.problems.examples]
        if not any(own):
            kind = "right answer" if self.prior.only_correct else "answer"
            raise ValueError(
                f"prior.source {source} holds {len(stored)} problems, but no {kind} to any of the "
                f"{len(own)} to train on: "
                "nothing would be anchored; give the file that `unmaskrl prior` wrote for this "
                "task and these settings of it"
            )
        top = max(map(max, filter(None, own)))
        if top >= self.base.vocab_size or min(map(min, filter(None, own))) < 0:
            raise ValueError(
                f"prior.source {source} has token ids up to {top}, the model's vocabulary ends at "
                f"{self.base.vocab_size - 1}; "
                "write it with a model of the same tokenizer"
            )

    def keep(self, share_done: float) -> float:
        """Fraction of the reference fixed when ``share_done`` of the run is over: constant,
        annealed, or adapted.
        """
        p = self.prior
        if p.adapt_to is not None:
            return self.adapted
        if p.keep_end is None:
            return p.keep
        return p.keep + (p.keep_end - p.keep) * min(1.0, share_done / p.anneal_until)

    def adapt(self, success: float) -> None:
        """Fix fewer tokens after a step in which more anchored rollouts succeeded than wanted, and
        more after fewer.
        """
        if self.prior.adapt_to is not None:
            change = ADAPT_RATE * (success - self.prior.adapt_to)
            self.adapted = min(self.prior.keep, max(0.0, self.adapted - change))

    def num_anchored(self, index: int, group_size: int) -> int:
        """How many rollouts of a problem's group are anchored: a constant share of them, or 1 - its
        running blank success.

        With ``adapt_share`` a problem starts at ``share``, and one rollout at least is blank, to be
        learned from.
        """
        if not self.prior.adapt_share:
            return round(self.prior.share * group_size)
        return min(
            group_size - 1, round((1 - self.solved.get(index, 1 - self.prior.share)) * group_size)
        )

    def learn(self, done: Rewarded, step: int, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move keep and the problems' shares by what a step's rollouts achieved; ``reduce`` sums
        over ranks.

        Sums of whole numbers: every rank comes to the same values. A step that anchored nothing
        leaves keep as it is.
        """
        indices = self.problems.indices(step)
        position = done.rollout.group_ids.cpu() - step * len(indices)
        kinds = torch.stack(
            [
                done.anchored,
                done.anchored & done.correct,
                ~done.anchored,
                ~done.anchored & done.correct,
            ],
            1,
        )
        counts = torch.zeros(len(indices), 4, dtype=torch.float64).index_add(
            0, position, kinds.double()
        )
        counts = reduce(counts)
        anchored, anchored_right = counts[:, :2].sum(0).tolist()
        if anchored:
            self.adapt(anchored_right / anchored)
        if self.prior.adapt_share:
            for index, (blank, right) in zip(indices, counts[:, 2:].tolist(), strict=True):
                before = self.solved.get(index, 1 - self.prior.share)
                if blank:
                    self.solved[index] = before + SOLVED_RATE * (right / blank - before)

    def of_group(
        self, index: int, step: int, share_done: float, row_ids: Sequence[int]
    ) -> list[dict[int, int]]:
        """Anchors of each rollout of a problem; the last ones of the group stay blank if share <
        1.
        """
        blank: list[dict[int, int]] = [{} for _ in row_ids]
        keep = self.keep(share_done)
        most = max(keep, self.prior.keep_to or 0.0)
        if self.prior.name == "none" or most == 0:
            return blank
        reference, protected = self.reference(index)
        if not reference:
            return blank
        protect = protected if "protect_answer" in self.prior.select else None
        never = (*end_ids(self.base), self.base.pad_id, self.base.mask_id)
        seed = named_seed(self.recipe.run.seed, "anchors", step)
        shares = named_seed(self.recipe.run.seed, "anchors/keep", step)
        result = []
        for row_id in row_ids[: self.num_anchored(index, len(row_ids))]:
            scores = self.scores(index, reference, seed, row_id)
            chosen = choose_anchors(
                reference,
                scores,
                keep=keep + (most - keep) * random_scores(1, seed=shares, row_id=row_id)[0],
                gen_length=self.recipe.decode.gen_length,
                protected=protect,
                never=never,
                count=self.prior.count,
            )
            result.append(chosen)
        return result + blank[len(result) :]

    def notes(self) -> list[str]:
        """What is told at the start: problems without a prior answer, wrong answers left out,
        shares that cannot adapt.
        """
        t = self.recipe.train
        examples = self.problems.examples
        notes = []
        if self.stored is not None:
            missing = sum(e.id not in self.stored for e in examples)
            skipped = sum(e.id in self.stored and not self.stored[e.id][0] for e in examples)
            if missing:
                notes.append(
                    f"prior.source: {missing} of {len(examples)} problems have no answer in the "
                    "file and start blank"
                )
            if self.prior.only_correct:
                notes.append(
                    f"prior.only_correct: {skipped} of {len(examples)} answers are left out; their "
                    "problems start blank"
                )
        if self.prior.adapt_share and t.steps * t.prompts_per_step <= len(examples):
            notes.append(
                "prior.adapt_share: no problem comes twice in this run "
                f"({t.steps * t.prompts_per_step} visits, "
                f"{len(examples)} problems), so no share can adapt; lower train.num_prompts"
            )
        return notes

    def reference(self, index: int) -> tuple[list[int], list[bool]]:
        """Ids of the prior answer and its protected (answer) positions; empty if there is none."""
        example = self.problems.examples[index]
        task = self.problems.task
        if self.stored is not None:
            return self.stored.get(example.id, ([], []))
        text = task.reference(example)
        if text is None:
            return [], []
        return encode_reference(self.problems.tokenizer, text, task.answer_spans(text))

    def scores(self, index: int, reference: Sequence[int], seed: int, row_id: int) -> list[float]:
        """Random per row, or the base model's log-probs from the fully masked completion (static,
        as published).
        """
        if "most_predictable" not in self.prior.select:
            return chunked(len(reference), self.prior.chunk, seed=seed, row_id=row_id)
        if index not in self.static:
            self.static[index] = predictability(
                self.base, [self.problems.prompt(index)], [reference], self.base.device
            )[0]
        return self.static[index]


def chunked(length: int, sizes: tuple[int, int], *, seed: int, row_id: int) -> list[float]:
    """Random scores, one for each chunk of tokens; chunks have ``sizes`` from..to (uniform)."""
    scores = random_scores(length, seed=seed, row_id=row_id)
    low, high = sizes
    if high == 1:
        return scores
    widths = random_scores(length, seed=named_seed(seed, "chunks"), row_id=row_id)
    chunks = [
        [score] * min(length, low + int(width * (high - low + 1)))
        for score, width in zip(scores, widths, strict=True)
    ]
    return [score for chunk in chunks for score in chunk][:length]


def read_priors(path: Path, only_correct: bool = False) -> dict[str, tuple[list[int], list[bool]]]:
    """Answers by problem id from a file of `unmaskrl prior`: rows with id, ids, protected and
    correct.

    With ``only_correct`` a wrong answer is an empty one.
    """
    if not path.is_file():
        raise ValueError(
            f"prior.source {path} is not a file; write one with `unmaskrl prior` or use 'reference'"
        )
    result = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            ids = [int(i) for i in row["ids"]]
            protected = [bool(p) for p in row["protected"]]
            used = bool(row["correct"]) if only_correct else True
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = (
                "id, ids, protected and correct (prior.only_correct)"
                if only_correct
                else "id, ids and protected"
            )
            raise ValueError(
                f"{path}:{number}: expected an object with {wanted}, got {line[:60]!r}"
            ) from None
        if len(ids) != len(protected):
            raise ValueError(
                f"{path}:{number}: {len(ids)} ids but {len(protected)} protected flags"
            )
        result[str(row["id"])] = (ids, protected) if used else ([], [])
    return result
