"""The benchmark: its other side is the published decoder, its measures are what they say, and it
refuses unequal results.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.speed import bench, bench_cases, measure
from benchmarks.speed.bench_cases import (
    Case,
    EosAfter,
    random_canvas,
    random_denoiser,
    random_rollout,
)
from tests.conftest import chi_square_p, same_maths, seeded
from unmaskrl.core.decoding import decode
from unmaskrl.core.scoring import token_logps
from unmaskrl.models.checkpoint import load_denoiser

DATA = Path(__file__).parents[2] / "data" / "llada-tiny"
TINY = Case(
    d_model=16,
    n_heads=2,
    n_layers=2,
    mlp_hidden_size=24,
    vocab_size=90,
    num_rows=3,
    prompt_length=3,
    gen_length=8,
    block_length=4,
    steps=4,
    targets={"greedy rollout": 1e9, "loss memory": 1.0},
)


def tiny_denoiser(dtype: torch.dtype = torch.float64):
    denoiser = random_denoiser(TINY, std=0.4)
    denoiser.model.to(dtype)
    return denoiser


@pytest.mark.parametrize(
    "name", ["block8_steps32", "block8_steps16", "block32_steps32", "block16_steps10"]
)
def test_the_naive_loop_is_the_published_decoder(name: str) -> None:
    denoiser = load_denoiser(DATA)
    expected = load_file(DATA / "generate.safetensors")
    settings = json.loads((DATA / "generate.json").read_text())[name]
    prompt = expected["prompt"]
    blank = torch.full((len(prompt), settings["gen_length"]), denoiser.mask_id)
    ids = bench.naive_decode(denoiser, torch.cat([prompt, blank], 1), **settings)
    assert ids.tolist() == expected[name].tolist()


def test_both_decoders_agree_in_fp64_and_leave_the_canvas_alone() -> None:
    denoiser = tiny_denoiser()
    canvas = random_canvas(denoiser, TINY)
    before = canvas.ids.clone()
    theirs = bench.naive_decode(denoiser, canvas.ids, gen_length=8, **bench.decode_settings(TINY))
    ours = decode(denoiser, canvas, stop_at_eos=False, **bench.decode_settings(TINY))
    assert theirs.tolist() == ours.ids.tolist()
    assert torch.equal(canvas.ids, before)
    assert ours.nfe.tolist() == [4, 4, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_naive_noise_draws_from_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    tokens = bench.noisy_argmax(logits.expand(4000, 1, 4), temperature, seeded(1))
    assert (
        chi_square_p(tokens.flatten().bincount(minlength=4), (logits / temperature).softmax(-1))
        > 1e-4
    )
    assert bench.noisy_argmax(logits[None, None], 0.0, None).tolist() == [[1]]


def test_naive_scores_and_gradients_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    # five scored rows at a time
    monkeypatch.setattr("unmaskrl.core.decoding.sample.CHUNK_ELEMENTS", 5 * TINY.vocab_size)
    denoiser = tiny_denoiser()
    scored = random_rollout(denoiser, TINY)
    views = bench.ELBO.make_views(scored, denoiser.mask_id, seeded(2))
    with torch.no_grad():
        theirs = bench.naive_token_logps(denoiser, scored, views)
        ours = token_logps(denoiser, scored, bench.ELBO, views)
    assert (theirs - ours).abs().max() <= 1e-12
    assert (ours[:, -8:] < 0).any() and not ours[:, :3].any()
    gradients = {}
    for name, backward in bench.BACKWARD.items():
        backward(denoiser, scored, views, ours - 0.05, ours + 0.3)
        gradients[name] = bench.take_gradients(denoiser)
    bench.check_gradients(gradients["naive"], gradients["ours"])
    assert len(gradients["ours"]) == len(list(denoiser.model.parameters()))
    for a, b in zip(gradients["naive"], gradients["ours"], strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(a.norm())


def test_unequal_gradients_are_an_error() -> None:
    gradient = torch.tensor([3.0, 4.0])
    assert bench.check_gradients([gradient], [gradient + 1e-4]) == pytest.approx(
        2**0.5 * 2e-5, rel=1e-2
    )
    with pytest.raises(RuntimeError, match=r"differ from the naive ones by 2\.0e-04"):
        bench.check_gradients(
            [gradient, gradient], [gradient, gradient + torch.tensor([1e-3, 0.0])]
        )
    with pytest.raises(RuntimeError, match="nan"):
        bench.check_gradients([gradient], [gradient * float("nan")])


class TwoFaced:
    """Logits that depend on whether all of them are asked for."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.mask_id = inner.mask_id
        self.eos_id = inner.eos_id
        self.pad_id = inner.pad_id
        self.vocab_size = inner.vocab_size

    def hidden(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.hidden(ids, attention_mask)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner.head(hidden)

    def logits(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return -self.inner.logits(ids, attention_mask)


def test_unequal_tokens_are_an_error() -> None:
    denoiser = TwoFaced(tiny_denoiser())
    with pytest.raises(RuntimeError, match=r"greedy rollout: \d+ tokens differ"):
        bench.compare_rollouts(
            "greedy rollout", denoiser, random_canvas(denoiser, TINY), TINY, 1, False
        )


def test_eos_comes_where_the_first_token_says() -> None:
    inner = tiny_denoiser()
    denoiser = EosAfter(inner, gen_length=8)
    canvas = random_canvas(denoiser, TINY)
    canvas.ids[:, 0] = torch.tensor([0, 3, 8])
    with torch.no_grad():
        logits = denoiser.logits(canvas.ids)
        plain = inner.logits(canvas.ids)
    difference = logits - plain
    raised = difference[:, -8:, denoiser.eos_id] > 0
    assert raised.long().sum(-1).tolist() == [8, 5, 0]
    assert raised[1].tolist() == [False] * 3 + [True] * 5
    assert float(difference[0, -1, denoiser.eos_id]) == pytest.approx(
        torch.tensor(90.0).log().item()
    )
    others = torch.arange(denoiser.vocab_size) != denoiser.eos_id
    assert same_maths(logits[..., others], plain[..., others])
    rollout = decode(denoiser, canvas, block_length=4, steps=8)
    ends = rollout.completion_mask.sum(-1).tolist()
    assert ends[0] < 8 and ends[1] > 3 and ends[2] == 8


def test_ratio_by_hand() -> None:
    row = measure.ratio([(4.0, 9.0), (5.0, 8.0), (4.4, 8.8)], [(2.0, 4.0), (2.0, 4.0), (3.0, 4.0)])
    assert row["ratio_cpu"] == 2.0 and row["ratio_wall"] == 2.0
    assert row["spread_cpu"] == pytest.approx(0.1)  # 4.4 / 4 on their side, 2 / 2 on ours
    assert row["spread_wall"] == pytest.approx(0.1)
    assert row["seconds_cpu"] == [4.0, 2.0] and row["seconds_wall"] == [8.0, 4.0]
    assert row["verdict"] == "faster"
    assert measure.ratio([(1.0, 1.0)], [(2.0, 2.0)])["verdict"] == "one run"


@pytest.mark.parametrize(
    ("value", "spread", "expected"),
    [
        (1.2, 0.1, "faster"),
        (1.1, 0.1, "no difference"),
        (0.95, 0.1, "no difference"),
        (0.9, 0.1, "slower"),
        (1.0, 0.0, "no difference"),
    ],
)
def test_a_ratio_within_the_spread_is_no_difference(
    value: float, spread: float, expected: str
) -> None:
    assert measure.verdict(value, spread) == expected


def test_sides_take_turns_and_phases_are_timed_apart() -> None:
    order = []

    def side(name: str):
        def run(laps: measure.Laps) -> str:
            order.append(name)
            laps("first")
            sum(range(300_000))
            laps("second")
            return f"{name}{len(order)}"

        return run

    times, results = measure.take_turns({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 3
    assert results == ["a5", "b6"]
    assert [len(laps) for laps in times.values()] == [3, 3]
    for laps in times["a"]:
        assert 0 <= laps.of("first")[0] < laps.of("second")[0]
        assert laps.of("all")[1] == pytest.approx(laps.of("first")[1] + laps.of("second")[1])


def test_peak_bytes_counts_what_is_alive_once() -> None:
    weight = torch.ones(1000, 8)
    with measure.PeakBytes(1000) as tracker:
        logits = torch.ones(10, 8) @ weight.T  # 40,000 bytes; weight.T is no new memory
        logits.add_(1.0)
        view = logits[:5]
        assert tracker.live == tracker.peak == 40_000
        doubled = logits.double()
        assert tracker.live == 120_000
        del logits, doubled
        assert tracker.live == 40_000  # the view keeps the storage
        del view
        torch.ones(10, 999)
    assert (tracker.live, tracker.peak) == (0, 120_000)


def test_resident_growth_sees_touched_pages() -> None:
    def touch() -> None:
        with mmap.mmap(-1, 2**26) as pages:
            for start in range(0, 2**26, mmap.PAGESIZE):
                pages[start] = 1

    grown = measure.resident_growth(touch)
    if grown is None:
        pytest.skip("no /proc/self/clear_refs")
    assert grown == pytest.approx(2**26, rel=0.1)  # the kernel's counters lag by a few pages


def test_streaming_keeps_one_chunk_of_logits_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmaskrl.core.decoding.sample.CHUNK_ELEMENTS", 5 * TINY.vocab_size)
    *_, memory = bench.bench_frozen_vocabulary(tiny_denoiser(torch.float32), TINY, 1)
    full = 4 * 3 * 3 * 11 * 90
    assert memory["bytes"]["full logits"] == full
    assert memory["bytes"]["naive"] >= 2 * full
    assert memory["bytes"]["ours"] == 4 * 5 * 90
    assert memory["ratio"] == pytest.approx(99 / 5)


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "CASES", {"vocab": TINY, "proportional": replace(TINY, vocab_size=40)}
    )
    monkeypatch.setattr(bench, "QUICK", {"steps": 2})


def test_run_bench_measures_everything(tiny_cases: None) -> None:
    lines: list[str] = []
    threads = torch.get_num_threads()
    result = bench.run_bench(repeats=2, quick=True, report=lines.append)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    rows = result["rows"]
    assert len(lines) == len(rows) == 20
    names = [row["what"] for row in rows if row["model"] == "vocab"]
    assert names == [
        "greedy rollout",
        "sampled rollout",
        "old and reference",
        "ELBO forward + backward",
        "whole step",
        "ELBO, vocabulary frozen",
        "loss memory",
        "rollout, early EOS",
        "rollout, anchors 30 %",
        "rollout, exit at 80 %",
    ]
    step = {row["what"]: row["seconds_cpu"] for row in rows[1:5]}
    whole = step.pop("whole step")
    assert sum(theirs for theirs, _ in step.values()) <= whole[0] * 1.0001
    assert sum(ours for _, ours in step.values()) <= whole[1] * 1.0001
    assert rows[0]["calls"] == 1.0 and rows[0]["target"] == 1e9
    assert rows[3]["gradient_difference"] < 1e-5
    assert result["settings"]["models"]["proportional"]["steps"] == 2
    assert result["settings"]["threads"] == 1 and result["machine"]["cores"] >= 1


def test_table_shows_every_row_and_marks_missed_targets(tiny_cases: None) -> None:
    result = bench.run_bench(repeats=1, quick=True, models=("vocab",), report=lambda line: None)
    table = bench.bench_table(result)
    assert table.row_count == len(result["rows"]) == 10
    console = Console(width=250)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert sum("MISSED" in line for line in lines) == 1
    assert "MISSED" in next(line for line in lines if "greedy rollout" in line)
    assert next(line for line in lines if "loss memory" in line).count("naive") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("vocab", "huge")}, "huge.*models are vocab, proportional"),
        ({"repeats": 0}, "repeats 0"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run_bench(report=lambda line: None, **options)


def test_the_shipped_cases_are_the_sizes_they_claim() -> None:
    case = bench_cases.CASES["proportional"]
    body = case.n_layers * (4 * case.d_model**2 + 3 * case.d_model * case.mlp_hidden_size)
    # LLaDA-8B: 0.074
    assert case.d_model * case.vocab_size / body == pytest.approx(0.077, abs=0.001)
    vocab = bench_cases.CASES["vocab"]
    assert vocab.vocab_size == 126464
    # one chunk of logits must be able to meet the target
    assert vocab.logits_bytes > 20 * 4 * 2**23
