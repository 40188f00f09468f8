"""How fast: rollout, likelihood and a whole step against the same work written as the published
decoders write it.

Two models with random weights. "vocab": 126,464 tokens on a small body, what the vocabulary costs.
"proportional": a head of 8 % of the body, as in LLaDA-8B: what a full-size model can gain without
approximation. Quote both.

Protocol: one process, the sides in turn, best of ``repeats``, CPU time beside wall time. A ratio is
the other side's time over ours; its spread is how far the median run is above the best one, and a
ratio within it is no difference. Rows are measured with freed pages reused where the allocator can
be told so (page faults of huge tensors would flatter us); the full run shows the greedy rollout
without as well. Results that must be equal are compared; a difference is an error.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from benchmarks.speed.bench_cases import (
    CASES,
    QUICK,
    Case,
    EosAfter,
    policy_loss,
    random_canvas,
    random_denoiser,
    random_rollout,
    vocabulary_weights,
)
from benchmarks.speed.measure import (
    Laps,
    PeakBytes,
    machine,
    ratio,
    resident_growth,
    reuse_pages,
    take_turns,
)
from unmaskrl import __version__
from unmaskrl.core import estimators
from unmaskrl.core.canvas import anchored_canvas, choose_anchors, random_scores
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.rng import named_generator
from unmaskrl.core.rollouts import DecodeSettings, LocalRollouts
from unmaskrl.core.scoring import backward_in_chunks, frozen_token_logps
from unmaskrl.core.types import Canvas, LossOutputs, Rollout, Views
from unmaskrl.models.denoiser import ModelDenoiser

ELBO = estimators.elbo(num_mc=3)
DEFAULT = "default malloc"
REUSED = "pages reused"
Row = dict[str, Any]
Part = Callable[[ModelDenoiser, Case, int], list[Row]]


def run_bench(
    *,
    repeats: int = 3,
    quick: bool = False,
    models: tuple[str, ...] = ("vocab", "proportional"),
    threads: int = 1,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the named models: machine, versions, settings and rows (JSON-able); ``report`` gets a
    line per row.

    ValueError for an unknown model or fewer than one repeat; RuntimeError if two sides that must
    agree do not.
    """
    unknown = [name for name in models if name not in CASES]
    if unknown or repeats < 1:
        raise ValueError(
            f"got models {models} and repeats {repeats}; models are {', '.join(CASES)}, repeats at "
            "least 1"
        )
    cases = {name: replace(CASES[name], **QUICK) if quick else CASES[name] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        report(one_line(row))

    try:
        if not quick:
            for name, case in cases.items():
                measure_case(name, case, (bench_greedy,), repeats, DEFAULT, keep)
        malloc = REUSED if reuse_pages() else DEFAULT
        for name, case in cases.items():
            measure_case(name, case, PARTS, repeats, malloc, keep)
        if not quick and "vocab" in models:
            for row in resident_row("vocab"):
                keep(row)
    finally:
        torch.set_num_threads(before)
    shapes = {name: asdict(case) for name, case in cases.items()}
    return {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "unmaskrl": __version__,
        },
        "settings": {
            "repeats": repeats,
            "quick": quick,
            "threads": threads,
            "elbo_views": 3,
            "models": shapes,
        },
        "rows": rows,
    }


def measure_case(
    name: str,
    case: Case,
    parts: tuple[Part, ...],
    repeats: int,
    malloc: str,
    keep: Callable[[Row], None],
) -> None:
    """Run the parts on one model."""
    denoiser = random_denoiser(case)
    for part in parts:
        for row in part(denoiser, case, repeats):
            keep({"model": name, "malloc": malloc, "target": case.targets.get(row["what"])} | row)


# The other side: logits of every position at every step, as in LLaDA's generate, dllm and d1.


@torch.no_grad()
def naive_decode(
    denoiser: Denoiser,
    ids: Int[Tensor, "B L"],
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B L"]:
    """Low-confidence decoding: fp64 Gumbel noise on all logits, softmax of all, top-k row by row,
    no early end.
    """
    ids = ids.clone()
    num_blocks = gen_length // block_length
    calls = steps // num_blocks
    for block in range(num_blocks):
        end = ids.shape[1] - gen_length + (block + 1) * block_length
        for call in range(calls):
            logits = denoiser.logits(ids)
            tokens = noisy_argmax(logits, temperature, generator)
            confidence = logits.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
            confidence[ids != denoiser.mask_id] = float("-inf")
            confidence[:, end:] = float("-inf")
            count = block_length // calls + (call < block_length % calls)
            for row in range(len(ids)):
                best = confidence[row].topk(count).indices
                ids[row, best] = tokens[row, best]
    return ids


def noisy_argmax(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> Int[Tensor, "B L"]:
    """argmax of exp(logits) / (-log u)^T in fp64: a draw from softmax(logits / T)."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.double()
    uniform = torch.rand(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator)
    return (wide.exp() / (-uniform.log()) ** temperature).argmax(-1)


def naive_token_logps(denoiser: Denoiser, rollout: Rollout, views: Views) -> Float[Tensor, "B L"]:
    """ELBO token log-probs from the log-softmax of every position's logits, without the mask token
    as in ours.
    """
    logits = denoiser.logits(views.ids.flatten(0, 1))
    logits[..., denoiser.mask_id] = float("-inf")
    targets = rollout.ids.repeat_interleave(views.ids.shape[1], 0)
    logps = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return ELBO.reduce(logps.reshape(views.ids.shape), views)


def naive_backward(
    denoiser: Denoiser, rollout: Rollout, views: Views, old: Tensor, ref: Tensor
) -> None:
    """Loss and gradient with all logits kept for the backward pass."""
    policy_loss(naive_token_logps(denoiser, rollout, views), rollout, old, ref).loss.backward()


def our_backward(
    denoiser: Denoiser, rollout: Rollout, views: Views, old: Tensor, ref: Tensor
) -> None:
    """The same loss and gradient through ``scoring``."""

    def loss_fn(token_logps: Tensor) -> LossOutputs:
        return policy_loss(token_logps, rollout, old, ref)

    backward_in_chunks(
        denoiser, rollout, ELBO, views, loss_fn, max_canvases=len(views.weight.flatten(0, 1))
    )


BACKWARD = {"naive": naive_backward, "ours": our_backward}


# What is measured.


def bench_greedy(denoiser: ModelDenoiser, case: Case, repeats: int) -> list[Row]:
    """The greedy rollout of every position; the tokens must be identical."""
    canvas = random_canvas(denoiser, case)
    return compare_rollouts("greedy rollout", denoiser, canvas, case, repeats, stop_at_eos=False)


def bench_eos(denoiser: ModelDenoiser, case: Case, repeats: int) -> list[Row]:
    """Greedy rollouts whose rows end at 20 to 80 % of the completion; tokens up to the first EOS
    must be identical.
    """
    canvas = random_canvas(denoiser, case)
    ends = (torch.linspace(0.2, 0.8, case.num_rows) * case.gen_length).long()
    canvas = replace(canvas, ids=torch.cat([ends[:, None], canvas.ids[:, 1:]], 1))
    ending = EosAfter(denoiser, case.gen_length)
    return compare_rollouts("rollout, early EOS", ending, canvas, case, repeats, stop_at_eos=True)


def compare_rollouts(
    what: str, denoiser: Denoiser, canvas: Canvas, case: Case, repeats: int, stop_at_eos: bool
) -> list[Row]:
    """Both greedy decoders on one canvas."""

    def naive(laps: Laps) -> Tensor:
        ids = naive_decode(
            denoiser, canvas.ids, gen_length=case.gen_length, **decode_settings(case)
        )
        laps(what)
        return ids

    def ours(laps: Laps) -> Rollout:
        settings = DecodeSettings(**decode_settings(case), stop_at_eos=stop_at_eos)
        rollout = LocalRollouts(denoiser).sample(canvas, settings)
        laps(what)
        return rollout

    times, (their_ids, rollout) = take_turns({"naive": naive, "ours": ours}, repeats)
    compared = rollout.completion_mask if stop_at_eos else torch.ones_like(rollout.completion_mask)
    different = int(((their_ids != rollout.ids) & compared).sum())
    if different:
        raise RuntimeError(
            f"{what}: {different} tokens differ from the naive loop's; expected the same tokens"
        )
    calls = case.steps / float(rollout.nfe.double().mean())
    return [phase_row(what, times["naive"], times["ours"]) | {"calls": calls}]


def bench_step(denoiser: ModelDenoiser, case: Case, repeats: int) -> list[Row]:
    """One RL step without its optimiser, by phase: rollout at temperature 1, old and reference
    scores, loss and gradient.
    """
    canvas = random_canvas(denoiser, case)
    scored = random_rollout(denoiser, case)
    views = ELBO.make_views(scored, denoiser.mask_id, named_generator(0, "bench", "views"))

    def naive(laps: Laps) -> list[Tensor]:
        settings = decode_settings(case) | {"gen_length": case.gen_length}
        naive_decode(
            denoiser,
            canvas.ids,
            temperature=1.0,
            generator=named_generator(0, "bench", "draws"),
            **settings,
        )
        laps("sampled rollout")
        with torch.no_grad():
            old, ref = [naive_token_logps(denoiser, scored, views) for _ in range(2)]
        laps("old and reference")
        naive_backward(denoiser, scored, views, old, ref)
        laps("ELBO forward + backward")
        return take_gradients(denoiser)

    def ours(laps: Laps) -> list[Tensor]:
        settings = DecodeSettings(**decode_settings(case), temperature=1.0, stop_at_eos=False)
        LocalRollouts(denoiser).sample(canvas, settings, named_generator(0, "bench", "draws"))
        laps("sampled rollout")
        old, ref = [
            frozen_token_logps(denoiser, scored, ELBO, views, max_canvases=10**6) for _ in range(2)
        ]
        laps("old and reference")
        our_backward(denoiser, scored, views, old, ref)
        laps("ELBO forward + backward")
        return take_gradients(denoiser)

    times, gradients = take_turns({"naive": naive, "ours": ours}, repeats)
    worst = check_gradients(*gradients)
    rows = [
        phase_row(phase, times["naive"], times["ours"])
        for phase in (*times["ours"][0].seconds, "whole step")
    ]
    rows[-2]["gradient_difference"] = worst
    return rows


def bench_frozen_vocabulary(denoiser: ModelDenoiser, case: Case, repeats: int) -> list[Row]:
    """The ELBO's loss and gradient when only the body is trained, and the peak of the logits that
    are alive.
    """
    what = "ELBO, vocabulary frozen"
    sides = {name: frozen_vocabulary_side(name, denoiser, case, what) for name in BACKWARD}
    times, gradients = take_turns(sides, repeats)
    worst = check_gradients(*gradients)
    del gradients
    peaks = {}
    for name, side in sides.items():
        with PeakBytes(case.vocab_size) as tracker:
            side(Laps())
        peaks[name] = tracker.peak
    for parameter in denoiser.model.parameters():
        parameter.requires_grad_(True)
    row = phase_row(what, times["naive"], times["ours"]) | {"gradient_difference": worst}
    return [row, memory_row("loss memory", case, peaks)]


def frozen_vocabulary_side(
    name: str, denoiser: ModelDenoiser, case: Case, what: str
) -> Callable[[Laps], list[Tensor]]:
    """One side's loss and gradient, embedding and head frozen: their gradients are no memory of the
    loss.
    """
    scored = random_rollout(denoiser, case)
    views = ELBO.make_views(scored, denoiser.mask_id, named_generator(0, "bench", "views"))
    old = frozen_token_logps(denoiser, scored, ELBO, views, max_canvases=10**6)
    for weight in vocabulary_weights(denoiser.model):
        weight.requires_grad_(False)

    def run(laps: Laps) -> list[Tensor]:
        BACKWARD[name](denoiser, scored, views, old, old)
        laps(what)
        return take_gradients(denoiser)

    return run


def bench_pruned(denoiser: ModelDenoiser, case: Case, repeats: int) -> list[Row]:
    """What anchors (30 % of the completion) and exit_at (80 % of the open tokens) save in time,
    beside the calls.
    """
    blank = random_canvas(denoiser, case)
    anchors = [
        choose_anchors(
            row, random_scores(len(row), seed=0, row_id=b), keep=0.3, gen_length=case.gen_length
        )
        for b, row in enumerate(random_rollout(denoiser, case).ids[:, -case.gen_length :].tolist())
    ]
    prompts = blank.ids[:, : case.prompt_length].tolist()
    anchored = anchored_canvas(prompts, anchors, gen_length=case.gen_length, denoiser=denoiser)

    def side(canvas: Canvas, exit_at: float | None) -> Callable[[Laps], float]:
        def run(laps: Laps) -> float:
            words: Row = decode_settings(case) | {"steps": case.gen_length // 4}
            settings = DecodeSettings(**words, exit_at=exit_at, stop_at_eos=False)
            rollout = LocalRollouts(denoiser).sample(canvas, settings)
            laps("rollout")
            return float(rollout.nfe.double().mean())

        return run

    sides = {
        "unpruned": side(blank, None),
        "anchors 30 %": side(anchored, None),
        "exit at 80 %": side(blank, 0.8),
    }
    times, calls = take_turns(sides, repeats)
    rows = []
    for name, mine in zip(list(sides)[1:], calls[1:], strict=True):
        row = phase_row(f"rollout, {name}", times["unpruned"], times[name])
        rows.append(row | {"against": "ours, unpruned", "calls": calls[0] / mine})
    return rows


PARTS = (bench_greedy, bench_step, bench_frozen_vocabulary, bench_eos, bench_pruned)


def resident_row(name: str) -> list[Row]:
    """Growth of the resident memory during the ELBO's loss and gradient, each side in a process of
    its own.
    """
    code = (
        "import sys; from benchmarks.speed import bench; "
        "sys.stdout.write(str(bench.child_growth(*sys.argv[1:])))"
    )
    grown = {}
    for side in BACKWARD:
        child = subprocess.run(
            [sys.executable, "-c", code, name, side], stdout=subprocess.PIPE, text=True, check=True
        )
        if child.stdout == "None":
            return []
        grown[side] = int(child.stdout)
    return [
        memory_row("resident memory", CASES[name], grown)
        | {"model": name, "malloc": DEFAULT, "target": None}
    ]


def child_growth(name: str, side: str) -> int | None:
    """Bytes by which this (fresh) process grows; the body is warmed up first."""
    torch.set_num_threads(1)
    denoiser = random_denoiser(CASES[name])
    frozen_vocabulary_side(
        side, denoiser, replace(CASES[name], num_rows=1, prompt_length=1, gen_length=1), ""
    )(Laps())
    run = frozen_vocabulary_side(side, denoiser, CASES[name], "")
    return resident_growth(lambda: run(Laps()))


def decode_settings(case: Case) -> dict[str, Any]:
    """The settings that both decoders take."""
    return {"block_length": case.block_length, "steps": case.steps}


def take_gradients(denoiser: ModelDenoiser) -> list[Tensor]:
    """The gradients of all trained parameters; they are then cleared."""
    gradients = [p.grad for p in denoiser.model.parameters() if p.grad is not None]
    denoiser.model.zero_grad(set_to_none=True)
    return gradients


def check_gradients(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest difference of a parameter's gradients as a share of their norm; RuntimeError from
    1e-4 on.
    """
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(theirs, ours, strict=True))
    if not worst < 1e-4:
        raise RuntimeError(
            f"ELBO gradients differ from the naive ones by {worst:.1e} of their norm; expected "
            "below 1e-4"
        )
    return worst


def phase_row(what: str, theirs: list[Laps], ours: list[Laps]) -> Row:
    """The ratio of one phase, or of all of them if there is no phase of that name."""
    return {"what": what, "against": "naive"} | ratio(
        [t.of(what) for t in theirs], [t.of(what) for t in ours]
    )


def memory_row(what: str, case: Case, peaks: dict[str, int]) -> Row:
    """Our peak against one full logits tensor (the naive side holds several), in bytes."""
    value = case.logits_bytes / peaks["ours"]
    sizes = {"full logits": case.logits_bytes, **peaks}
    word = "smaller" if value > 1 else "larger"
    return {"what": what, "against": "full logits", "ratio": value, "verdict": word, "bytes": sizes}


def one_line(row: Row) -> str:
    """A row as text."""
    if "ratio" in row:
        return (
            f"{row['model']}: {row['what']} 1/{row['ratio']:.0f} of {row['against']} "
            f"({_megabytes(row)})"
        )
    calls = f", {row['calls']:.2f}x fewer calls" if row.get("calls", 1.0) != 1.0 else ""
    times = (
        f"{row['ratio_cpu']:.2f}x CPU +- {row['spread_cpu']:.0%}, {row['ratio_wall']:.2f}x "
        f"wall +- {row['spread_wall']:.0%}"
    )
    return f"{row['model']}: {row['what']} {times}{calls} ({row['verdict']}; {row['malloc']})"


def bench_table(result: dict[str, Any]) -> Table:
    """The rows as a table; a target that was missed is marked."""
    table = Table(
        title=f"{result['machine']['cpu']}, {result['settings']['threads']} thread(s): ratios, "
        "more is better"
    )
    for name in ("model", "what", "against", "CPU", "wall", "calls", "target", "verdict"):
        table.add_column(name)
    for row in result["rows"]:
        value = row.get("ratio", row.get("ratio_cpu"))
        target = (
            ""
            if row["target"] is None
            else f">= {row['target']:g} {'' if value >= row['target'] else 'MISSED'}"
        )
        if "ratio" in row:
            cells = [f"{value:.1f}x less", _megabytes(row), ""]
        else:
            cells = [
                f"{row[f'ratio_{c}']:.2f}x +- {row[f'spread_{c}']:.0%}" for c in ("cpu", "wall")
            ]
            cells.append(f"{row['calls']:.2f}x" if "calls" in row else "")
        table.add_row(
            row["model"],
            row["what"],
            row["against"],
            *cells,
            target,
            f"{row['verdict']} ({row['malloc']})",
        )
    return table


def _megabytes(row: Row) -> str:
    return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in row["bytes"].items())
