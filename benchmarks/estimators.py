"""Bias, variance, gradient error and cost of every likelihood estimator: benchmarks/estimators.json
and docs/estimators.md.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py          # measure (90 s of CPU time), then
        write the tables
    python benchmarks/estimators.py --page                     # only write the tables of the page

On the exact toy (V = 3, L = 5) every log p per masked set is tabulated with its gradient, so that a
row of uniforms is one estimate and 4000 rows per completion cost nothing. Squared biases are
corrected for the noise of the means. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmaskrl import blank_canvas, decode, load_denoiser, tasks
from unmaskrl.core.estimators import ESTIMATORS, Estimator, Update
from unmaskrl.core.rng import named_generator
from unmaskrl.core.scoring import count_canvases, frozen_token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout, Views
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import encode_prompt, load_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "estimators.json"
PAGE = ROOT / "docs" / "estimators.md"
LENGTH = 5
JOINTS = 4
COMPLETIONS = 8
COPIES = 4000
BUDGET = 6
GOOD = 1.0
BAD = -1.0


@dataclass(frozen=True)
class Setting:
    """An estimator and its options; ``advantage`` picks the bound of the sandwich."""

    name: str
    label: str
    options: dict[str, Any]
    advantage: float = GOOD

    def make(self) -> Estimator:
        """Build it."""
        return ESTIMATORS[self.name](**self.options)


ON_TOY = [
    Setting("elbo", "`elbo`, independent draws", {"num_mc": 6, "stratified": False}),
    Setting("elbo", "`elbo`", {"num_mc": 6}),
    Setting("elbo", "`elbo`, antithetic", {"num_mc": 6, "antithetic": True}),
    Setting("espo", "`espo`", {"num_mc": 3}),
    Setting("gauss", "`gauss`, rate", {"weight": "rate"}),
    Setting("gauss", "`gauss`, count", {"weight": "count"}),
    Setting("sandwich", "`sandwich`, random masks, A >= 0", {"num_mc": 6, "mask": "random"}),
    Setting(
        "sandwich",
        "`sandwich`, random masks, A < 0, mix 1",
        {"num_mc": 6, "mask": "random", "mix": 1.0},
        BAD,
    ),
    Setting("sandwich", "`sandwich`, blocks of 2, A >= 0", {"block_length": 2}),
    Setting("sandwich", "`sandwich`, blocks of 2, A < 0, mix 0.5", {"block_length": 2}, BAD),
    Setting("elbo", "`elbo`, visible", {"num_mc": 6, "visible": True}),
    Setting("coupled", "`coupled`", {}),
    Setting("coupled", "`coupled`, normalise", {"normalise": True}),
    Setting("unigrpo", "`unigrpo`, first of 4 updates", {}),
    Setting("mean_field", "`mean_field`", {}),
    Setting("two_mean_field", "`two_mean_field`", {}),
    Setting("trajectory", "`trajectory`, 2 segments", {"num_segments": 2}),
    Setting("trajectory", "`trajectory`", {}),
    Setting("left_to_right", "`left_to_right`", {}),
]
ON_MODEL = [
    Setting("elbo", "`elbo`", {}),
    Setting("elbo", "`elbo`, num_mc=4, antithetic", {"num_mc": 4, "antithetic": True}),
    Setting("espo", "`espo`", {}),
    Setting("gauss", "`gauss`", {}),
    Setting("gauss", "`gauss`, count", {"weight": "count"}),
    Setting("sandwich", "`sandwich`, blocks of 10", {"block_length": 10}),
    Setting(
        "sandwich",
        "`sandwich`, blocks of 10, p_mask_context=0",
        {"block_length": 10, "p_mask_context": 0.0},
    ),
    Setting("sandwich", "`sandwich`, random masks", {"mask": "random"}),
    Setting("coupled", "`coupled`", {}),
    Setting("coupled", "`coupled`, normalise", {"normalise": True}),
    Setting("unigrpo", "`unigrpo`, first of 4 updates", {}),
    Setting("mean_field", "`mean_field`", {}),
    Setting("mean_field", "`mean_field`, share_prompt_mask", {"share_prompt_mask": True}),
    Setting("mean_field", "`mean_field`, p_mask_prompt=0", {"p_mask_prompt": 0.0}),
    Setting("two_mean_field", "`two_mean_field`", {}),
    Setting("trajectory", "`trajectory`, 4 segments", {"num_segments": 4}),
    Setting("trajectory", "`trajectory`", {}),
    Setting("left_to_right", "`left_to_right`", {}),
]


def main() -> None:
    """Measure unless only the page is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--page", action="store_true", help="make the page's tables from the committed results"
    )
    if not parser.parse_args().page:
        torch.set_num_threads(1)
        started = time.process_time()
        results = {"toy": toy_rows(), "pruning": pruning_rows(), "model": model_rows()}
        results["cpu_seconds"] = round(time.process_time() - started)
        results["machine"] = f"{platform.machine()}, torch {torch.__version__}, one thread"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), json.loads(RESULTS.read_text())))


@dataclass(frozen=True)
class Completion:
    """One finished completion on one toy: log p (32, L) of its tokens per masked set, and their
    gradient (32 * L, W).
    """

    rollout: Rollout
    table: Tensor
    jacobian: Tensor

    def copies(self, count: int) -> Rollout:
        """``count`` rows with random numbers of their own."""
        many = self.rollout.rows(torch.zeros(count, dtype=torch.int64))
        return replace(many, row_ids=torch.arange(count))

    def elbo(self, given: set[int] = frozenset(), exits: set[int] = frozenset()) -> Tensor:
        """Coefficients (32 * L,) of the any-order ELBO: log p(y_i | M hidden) has weight (|M| - 1)!
        (f - |M|)! / f!.
        """
        free = [i for i in range(LENGTH) if i not in given | exits]
        coefficients = torch.zeros(2**LENGTH, LENGTH, dtype=torch.float64)
        for code in range(1, 2**LENGTH):
            hidden = [i for i in range(LENGTH) if code >> i & 1]
            subset = [i for i in hidden if i in free]
            if set(hidden) == set(subset) | exits and subset:
                chance = 1 / (len(subset) * math.comb(len(free), len(subset)))
                coefficients[code, subset] = chance
        if exits:
            coefficients[sum(1 << i for i in exits), list(exits)] += 1
        return coefficients.flatten()


def completions(noise: float) -> list[Completion]:
    """Rollouts of 3 calls (2 or 1 tokens each, entropy order) from random joints, seed by seed."""
    found = []
    for seed in range(JOINTS):
        toy = ToyDenoiser.random(
            named_generator(seed, "estimators"), num_tokens=3, length=LENGTH, noise=noise
        )
        canvas = blank_canvas([[0, 1]] * COMPLETIONS, gen_length=LENGTH, denoiser=toy)
        options = {"block_length": LENGTH, "steps": 3, "select": "entropy", "temperature": 1.0}
        rollout = decode(toy, canvas, generator=named_generator(seed, "rollouts"), **options)
        for b in range(COMPLETIONS):
            row = rollout.rows(torch.tensor([b]))
            found.append(Completion(row, *tabulate(toy, row.ids[0, -LENGTH:], noise)))
    return found


def tabulate(toy: ToyDenoiser, ids: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """log p of ``ids`` under each masked set, and its Jacobian with respect to the joint's
    log-weights.
    """
    hidden = (torch.arange(2**LENGTH)[:, None] >> torch.arange(LENGTH)) % 2 == 1
    canvases = torch.where(hidden, toy.mask_id, ids)

    def logps(weights: Tensor) -> Tensor:
        logits = ToyDenoiser(weights, num_tokens=3, length=LENGTH, noise=noise).hidden(canvases)[
            ..., :3
        ]
        return logits.log_softmax(-1).gather(-1, ids.expand(2**LENGTH, LENGTH)[..., None]).flatten()

    jacobian = torch.autograd.functional.jacobian(logps, toy.log_weights, vectorize=True)
    return logps(toy.log_weights).reshape(2**LENGTH, LENGTH), jacobian.nan_to_num()


def estimates(
    completion: Completion, rollout: Rollout, made: Estimator, update: Update, seed: int
) -> tuple[Tensor, Tensor]:
    """Values (N,) and their coefficients (N, 32 * L): d value / d log p(y_i | masked set)."""
    mask_id = 3
    views = made.make_views(rollout, mask_id, named_generator(seed, "views"), update)
    code = ((views.ids[..., -LENGTH:] == mask_id).long() << torch.arange(LENGTH)).sum(-1)
    logps = torch.zeros(views.ids.shape, dtype=torch.float64)
    logps[..., -LENGTH:] = completion.table[code]
    logps = (logps * (views.weight != 0)).requires_grad_()
    values = made.reduce(logps, exact(views)).sum(-1)
    (slopes,) = torch.autograd.grad(values.sum(), logps)
    coefficients = torch.zeros(len(values), 2**LENGTH, LENGTH, dtype=torch.float64)
    coefficients.scatter_add_(1, code[..., None].expand(-1, -1, LENGTH), slopes[..., -LENGTH:])
    return values.detach(), coefficients.flatten(1)


def exact(views: Views) -> Views:
    """The same views with weights in fp64."""
    return replace(views, weight=views.weight.double())


def toy_rows() -> list[dict[str, Any]]:
    """Bias, spread and gradient of each setting, over all completions of inconsistent toys; and of
    exact joints.
    """
    rows = []
    inconsistent = completions(0.5)
    joints = completions(0.0)
    for setting in ON_TOY:
        made = setting.make()
        update = Update(0, 4, 11, torch.full((COPIES,), setting.advantage))
        found = [measure(c, made, update, k) for k, c in enumerate(inconsistent)]
        consistent = [measure(c, made, update, k) for k, c in enumerate(joints)]
        canvases = statistics.mean(f["canvases"] for f in found)
        scale = canvases / BUDGET
        length = math.fsum(f["elbo_gradient"] for f in found)
        rows.append(
            {
                "estimator": setting.label,
                "options": setting.options,
                "canvases": canvases,
                "bias_elbo": mean(found, "bias"),
                "rms_elbo": root_mean(found, "bias2"),
                "rms_joint": root_mean(consistent, "bias2"),
                "rms_rollout": root_mean(found, "rollout2"),
                "error_of_bias": math.sqrt(math.fsum(f["variance"] / COPIES for f in found))
                / len(found),
                "std_at_6": math.sqrt(mean(found, "variance") * scale),
                "gradient_error": math.sqrt(
                    max(0.0, math.fsum(f["gradient_bias2"] for f in found)) / length
                ),
                "gradient_cosine": mean(found, "cosine"),
                "gradient_std_at_6": math.sqrt(
                    math.fsum(f["gradient_variance"] for f in found) / length * scale
                ),
            }
        )
    return rows


def measure(completion: Completion, made: Estimator, update: Update, seed: int) -> dict[str, float]:
    """One completion's figures from COPIES estimates; ``...2`` are squares, corrected for the noise
    of the mean.
    """
    rollout = completion.copies(COPIES)
    values, coefficients = estimates(completion, rollout, made, update, seed)
    target = completion.elbo()
    mean_value = values.mean()
    noise = values.var() / COPIES
    reference = (completion.table.flatten() * target).sum()
    sampled = completion.rollout.behavior_logps.sum()
    gradient = coefficients.mean(0) @ completion.jacobian
    wanted = target @ completion.jacobian
    gram = completion.jacobian @ completion.jacobian.T
    centred = coefficients - coefficients.mean(0)
    spread = ((centred @ gram) * centred).sum() / (COPIES - 1)
    return {
        "canvases": float(made.num_views(LENGTH, int(rollout.nfe.max()), False)),
        "bias": float(mean_value - reference),
        "bias2": float((mean_value - reference) ** 2 - noise),
        "rollout2": float((mean_value - sampled) ** 2 - noise),
        "variance": float(values.var()),
        "gradient_bias2": float(((gradient - wanted) ** 2).sum() - spread / COPIES),
        "gradient_variance": float(spread),
        "elbo_gradient": float((wanted**2).sum()),
        "cosine": float(torch.nn.functional.cosine_similarity(gradient, wanted, dim=0)),
    }


def pruning_rows() -> list[dict[str, Any]]:
    """The ELBO of the same completions (exact joints) when tokens are declared anchors, or filled
    by the exit call.
    """
    rows = []
    items = completions(0.0)
    for label, num_anchors, exits, hide in (
        ("no pruning", 0, False, False),
        ("1 anchor", 1, False, False),
        ("2 anchors", 2, False, False),
        ("2 anchors, hidden in views", 2, False, True),
        ("exit: the last 2 tokens", 0, True, False),
        ("2 anchors and exit", 2, True, False),
    ):
        found = []
        for k, item in enumerate(items):
            rollout = prune(item, num_anchors, exits, k)
            made = ESTIMATORS["elbo"](num_mc=3, hide_anchors=hide)
            values, _ = estimates(item, rollout, made, Update(), k)
            free = int(rollout.action_mask[0].sum())
            found.append(
                {"mean": float(values.mean()), "variance": float(values.var()), "free": free}
            )
        per_token = statistics.mean(math.sqrt(f["variance"]) / f["free"] for f in found)
        rows.append(
            {
                "pruning": label,
                "scored": mean(found, "free"),
                "value": mean(found, "mean"),
                "std": math.sqrt(mean(found, "variance")),
                "std_per_token": per_token,
            }
        )
    return rows


def prune(item: Completion, num_anchors: int, exits: bool, seed: int) -> Rollout:
    """Copies of a rollout in which random tokens are anchors and the last call, if wanted, was the
    exit.
    """
    rollout = item.copies(COPIES)
    step = rollout.decoded_step[0].clone()
    nfe = rollout.nfe[0]
    last = step.argsort(descending=True, stable=True)[:2].tolist()
    order = (2 + torch.randperm(LENGTH, generator=named_generator(seed, "anchors"))).tolist()
    step[[i for i in order if i not in last][:num_anchors]] = 0
    if exits:
        step[last] = nfe
    exit_step = rollout.nfe if exits else torch.zeros_like(rollout.nfe)
    return replace(rollout, decoded_step=step.expand(COPIES, -1).clone(), exit_step=exit_step)


def model_rows() -> list[dict[str, Any]]:
    """Values and CPU time on the shipped `mini` model: sudoku, 6 problems, 4 answers each, 40 draws
    of the views.
    """
    denoiser = load_denoiser(ASSETS / "mini")
    tokenizer = load_tokenizer(ASSETS / "mini")
    task = tasks.load("sudoku")
    prompts = [
        encode_prompt(tokenizer, task.prompt(e))
        for e in task.examples("test")[:6]
        for _ in range(4)
    ]
    canvas = blank_canvas(
        prompts, gen_length=20, denoiser=denoiser, group_ids=[b // 4 for b in range(24)]
    )
    options = {"block_length": 10, "steps": 20, "select": "entropy", "temperature": 1.0}
    rollout = decode(denoiser, canvas, generator=named_generator(0, "mini"), **options)
    rows = []
    update = Update(0, 4, 11, torch.ones(24))
    num_draws = 40
    for setting in ON_MODEL:
        made = setting.make()
        values = []
        seconds = []
        canvases = []
        for k in range(num_draws):
            start = time.process_time()
            views = made.make_views(rollout, denoiser.mask_id, named_generator(k, "model"), update)
            values.append(
                frozen_token_logps(denoiser, rollout, made, views, max_canvases=96).sum(-1)
            )
            seconds.append(time.process_time() - start)
            canvases.append(count_canvases(rollout, views) / 24)
            if k == 4 and all(torch.equal(v, values[0]) for v in values):
                break  # nothing is random
        stacked = torch.stack(values)
        spreads = (
            [part.var(0).mean().sqrt() for part in stacked.tensor_split(4)]
            if len(values) == num_draws
            else [stacked[0, 0] * 0]
        )
        rows.append(
            {
                "estimator": setting.label,
                "announced": made.num_views(20, int(rollout.nfe.max()), False),
                "canvases": statistics.mean(canvases),
                "ms": 1000 * statistics.median(seconds) / 24,
                "mean": float(stacked.mean()),
                "std": float(stacked.var(0).mean().sqrt()),
                "error_of_mean": float((stacked.var(0).sum() / len(values)).sqrt()) / 24,
                "error_of_std": float(torch.stack(spreads).std(correction=0)) / 2,
            }
        )
    behavior = torch.where(rollout.action_mask, rollout.behavior_logps, 0.0).sum(-1)
    rows.append({"estimator": "the rollouts' own log-probability", "mean": float(behavior.mean())})
    return rows


def mean(found: list[dict[str, Any]], key: str) -> float:
    """Mean of a figure."""
    return statistics.mean(f[key] for f in found)


def root_mean(found: list[dict[str, Any]], key: str) -> float:
    """Root of a mean of squares; noise-corrected squares may be negative together."""
    return math.sqrt(max(0.0, mean(found, key)))


def fill(text: str, results: dict[str, Any]) -> str:
    """The page with its tables made from the results."""
    for name, make in {"toy": toy_table, "pruning": pruning_table, "model": model_table}.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = (
            f"{before}<!-- {name} -->\n{make(results[name])}<!-- /{name} "
            f"-->{rest.split(f'<!-- /{name} -->')[1]}"
        )
    return text


def toy_table(rows: list[dict[str, Any]]) -> str:
    """One row per setting."""
    head = [
        "estimator",
        "canvases",
        "bias to ELBO: mean",
        "RMS",
        "RMS bias to log p",
        "RMS bias to rollout",
        "std at 6",
    ]
    head += ["gradient error", "cosine", "gradient std at 6"]
    keys = [
        "bias_elbo",
        "rms_elbo",
        "rms_joint",
        "rms_rollout",
        "std_at_6",
        "gradient_error",
        "gradient_cosine",
    ]
    body = [
        [
            r["estimator"],
            f"{r['canvases']:.0f}",
            *(f"{r[k] + 0.0:.2f}" for k in [*keys, "gradient_std_at_6"]),
        ]
        for r in rows
    ]
    return markdown(head, body)


def pruning_table(rows: list[dict[str, Any]]) -> str:
    """One row per kind of pruning."""
    head = ["rollouts", "tokens scored", "ELBO", "std", "std per scored token"]
    body = [
        [
            r["pruning"],
            f"{r['scored']:.1f}",
            f"{r['value']:.2f}",
            f"{r['std']:.2f}",
            f"{r['std_per_token']:.2f}",
        ]
        for r in rows
    ]
    return markdown(head, body)


def model_table(rows: list[dict[str, Any]]) -> str:
    """One row per estimator with the settings that are its defaults."""
    head = [
        "estimator",
        "canvases announced",
        "canvases run",
        "ms",
        "mean, nats",
        "std, nats",
        "std at 6",
    ]
    body = []
    for r in rows:
        cells = [
            f"{r[k]:{form}}" if k in r else ""
            for k, form in (("announced", "d"), ("canvases", ".2f"), ("ms", ".1f"))
        ]
        for key in ("mean", "std"):
            error = r.get(f"error_of_{key}", 0.0)
            cells.append(
                (f"{r[key]:.2f}" if key in r else "") + (f" +- {error:.2f}" if error else "")
            )
        cells.append(f"{r['std'] * math.sqrt(r['announced'] / BUDGET):.2f}" if "std" in r else "")
        body.append([r["estimator"], *cells])
    return markdown(head, body)


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table; -0.00 is 0.00."""
    lines = [
        head,
        ["---"] * len(head),
        *([re.sub(r"^-(0\.0+)$", r"\1", cell) for cell in row] for row in body),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
