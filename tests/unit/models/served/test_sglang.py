"""Rollouts on a server: what is asked, what is answered, faults, versions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import seeded
from tests.stub_server import THRESHOLD, Stub
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.denoiser import end_ids
from unmaskrl.core.estimators import trajectory
from unmaskrl.core.rollouts import DecodeSettings, LocalRollouts
from unmaskrl.core.scoring import behavior_gap, token_logps
from unmaskrl.core.types import Canvas
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.served.sglang import Sglang
from unmaskrl.testing import check_rollouts
from unmaskrl.utils.stopping import Abandoned, Lost

SETTINGS = DecodeSettings(block_length=4, steps=1, select="confidence_threshold", temperature=1.0)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12], [13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    stub = Stub(tmp_path_factory.mktemp("model") / "base")
    yield stub
    stub.stop()


@pytest.fixture
def stub(running: Stub) -> Stub:
    return as_new(running)


def as_new(running: Stub) -> Stub:
    """Without what the test before has done to it."""
    running.faults.clear()
    running.updates.clear()
    running.bodies.clear()
    running.told = {}
    running.threshold = THRESHOLD
    running.algorithm.write_text(f"{{block_size: 4, threshold: {THRESHOLD}}}\n")
    for name in ("greedy", "ignores_seeds", "keeps_cache", "wrong_version"):
        setattr(running, name, False)
    for name in ("step_maps", "logps", "trims"):
        setattr(running, name, True)
    if running.server is None:
        running.start()
    return running


@pytest.fixture(scope="module")
def denoiser(running: Stub) -> ModelDenoiser:
    return load_denoiser(running.folder)


@pytest.fixture(scope="module")
def met(running: Stub, denoiser: ModelDenoiser, tmp_path_factory: pytest.TempPathFactory) -> Sglang:
    # built before the function's own fixtures, so behind whatever test came before
    as_new(running)
    return Sglang(denoiser, url=running.url, folder=str(tmp_path_factory.mktemp("served")))


@pytest.fixture
def engine(stub: Stub, met: Sglang) -> Sglang:
    """As new, with its weights on the server."""
    met.patience = 0.5
    met.timeout = 20.0
    met.retries = 4
    met.rows_at_once = 256
    met.label = lambda: "step-0"
    met.place(Path(), met.label, lambda: None, lambda text: None)
    met.sync()
    return met


@contextmanager
def trained(denoiser: ModelDenoiser) -> Iterator[None]:
    """With other weights."""
    weights = list(denoiser.model.parameters())
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    yield
    with torch.no_grad():
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)


def canvas(denoiser: ModelDenoiser, prompts: list[list[int]] = PROMPTS) -> Canvas:
    return blank_canvas(prompts, gen_length=10, denoiser=denoiser, row_ids=[40, 7, 19, 3])


def test_rows_are_what_the_server_decoded(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    stub.trims = False
    rollout = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    assert rollout.block_length == 4 and rollout.gen_length == 13 and not rollout.exact
    assert engine.features == {"step_maps", "shown_logps", "row_keys", "truncation"}
    assert int(rollout.local_step.max()) > 1
    assert behavior_gap(denoiser, rollout) < 1e-4
    # of the tokens that are trained on: the replayed trajectory is what the server drew from
    exact = trajectory()
    views = exact.make_views(rollout, denoiser.mask_id, seeded())
    with torch.no_grad():
        scores = token_logps(denoiser, rollout, exact, views)
    told = rollout.behavior_logps * rollout.action_mask
    assert torch.allclose(scores, told, rtol=1e-4, atol=0)
    local = LocalRollouts(denoiser).sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    for name in ("prompt_mask", "attention_mask", "row_ids", "group_ids"):
        assert torch.equal(getattr(rollout, name), getattr(local, name)), name
    given = rollout.decoded_step == 0
    assert torch.equal(given, local.decoded_step == 0)
    assert torch.equal(rollout.ids[given], local.ids[given])


def test_greedy_completions_are_those_of_decode(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    stub.trims = False
    settings = DecodeSettings(block_length=4, steps=1, select="confidence_threshold")
    ours = LocalRollouts(denoiser).sample(canvas(denoiser), settings, None, THRESHOLD)
    theirs = engine.sample(canvas(denoiser), settings, None, THRESHOLD)
    assert theirs.completions() == ours.completions()
    assert torch.equal(theirs.completion_mask, ours.completion_mask)
    seen = ours.action_mask
    assert torch.equal(theirs.decoded_step[seen], ours.decoded_step[seen])


def test_the_engine_passes_the_checker(engine: Sglang, stub: Stub, denoiser: ModelDenoiser) -> None:
    stub.threshold = 0.5  # the checker's gamma
    stub.algorithm.write_text("{block_size: 4, threshold: 0.5}\n")
    check_rollouts(lambda _: engine, denoiser)


def test_what_is_sent(engine: Sglang, stub: Stub, denoiser: ModelDenoiser) -> None:
    stub.bodies.clear()
    engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    (body,) = stub.bodies
    assert body["input_ids"] == PROMPTS and "text" not in body
    params = body["sampling_params"]
    assert all(
        (len(p) + q["max_new_tokens"]) % 4 == 0 for p, q in zip(PROMPTS, params, strict=True)
    )
    assert len({q["sampling_seed"] for q in params}) == 4
    assert all(
        (q["n"], q["temperature"], q["top_p"], q["top_k"], q["min_p"]) == (1, 1.0, 1.0, -1, 0.0)
        and q["stop_token_ids"] == list(end_ids(denoiser))
        and q["repetition_penalty"] == 1.0
        for q in params
    )


def test_a_truncated_vocabulary_is_asked_for(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    stub.bodies.clear()
    settings = replace(SETTINGS, top_k=5, top_p=0.9)
    rollout = engine.sample(canvas(denoiser), settings, seeded(), THRESHOLD)
    (body,) = stub.bodies
    assert {(q["top_k"], q["top_p"]) for q in body["sampling_params"]} == {(5, 0.9)}
    assert (rollout.top_k, rollout.top_p, rollout.kept) == (5, 0.9, None)


def test_a_row_is_the_same_in_any_batch(engine: Sglang, denoiser: ModelDenoiser) -> None:
    whole = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    engine.rows_at_once = 3
    order = torch.tensor([2, 0])
    part = engine.sample(canvas(denoiser).rows(order), SETTINGS, seeded(), THRESHOLD)
    assert torch.equal(part.ids, whole.ids[order])
    assert torch.equal(part.decoded_step, whole.decoded_step[order])
    again = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    assert torch.equal(again.ids, whole.ids)
    other = engine.sample(canvas(denoiser), SETTINGS, seeded(2), THRESHOLD)
    assert not torch.equal(other.ids, whole.ids)


def test_new_weights_are_handed_over_once(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    first = str(stub.version)
    assert first == engine.version and first.startswith("step-0-")
    stub.loaded.clear()
    engine.sync()
    assert not stub.loaded  # unchanged
    before = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    with trained(denoiser):
        engine.label = lambda: "step-1"
        engine.sync()
        assert stub.version == engine.version != first
        assert str(stub.version).startswith("step-1-")
        assert engine.folder is not None  # the old one was removed
        assert [p.name for p in engine.folder.iterdir()] == [stub.version]
        after = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
        assert not torch.equal(before.ids, after.ids)
        stub.trims = False
        whole = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
        assert behavior_gap(denoiser, whole) < 1e-4


@pytest.mark.parametrize("fault", [500, "drop", "hang"])
def test_a_failure_that_passes(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser, fault: Any
) -> None:
    want = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    engine.timeout = 2.0 if fault == "hang" else 20.0
    stub.faults.extend([fault])
    got = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    assert torch.equal(got.ids, want.ids) and not stub.faults


def test_failures_have_a_bound(engine: Sglang, stub: Stub, denoiser: ModelDenoiser) -> None:
    engine.retries = 1
    stub.faults.extend([500, 500, 500])
    with pytest.raises(
        Lost, match=r"failed 2 times in a row: /generate answered 500 .the stub fail"
    ):
        engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    assert len(stub.faults) == 1


def test_a_server_that_comes_back_gets_the_weights_first(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    with trained(denoiser):
        engine.sync()
        want = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
        stub.stop()
        stub.start()  # with its first weights, between two requests: no connection was cut
        got = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
        assert torch.equal(got.ids, want.ids) and stub.version == engine.version
        stub.faults.append("die")  # in the middle of one, and back after a while
        engine.note = lambda text: stub.start()
        got = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
        assert torch.equal(got.ids, want.ids)


def test_a_server_that_stays_away_is_lost(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser
) -> None:
    stub.stop()
    with pytest.raises(Lost, match=f"{stub.url} is away for 0.5 s: .*refused"):
        engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)


def test_a_signal_ends_the_wait(engine: Sglang, stub: Stub, denoiser: ModelDenoiser) -> None:
    def leave() -> None:
        raise Abandoned

    stub.faults.append("hang")
    engine.client.check = leave
    with pytest.raises(Abandoned):
        engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)


def meta(**changes: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[1]["meta_info"] |= changes
        return rows

    return edit


def ids(change: Callable[[list[int]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[1]["output_ids"] = change(rows[1]["output_ids"])
        return rows

    return edit


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda rows: rows[:3], "answered 3 of 4 rows"),
        (lambda rows: rows[::-1], "rows are in another order"),
        (meta(prompt_tokens=9), "a prompt of 9 tokens, 4 were sent"),
        (ids(lambda own: None), "no output_ids in the answer; ids are needed, not text"),
        (ids(lambda own: []), "row 1 is empty"),
        (ids(lambda own: own[:2]), "row 1 ends after 2 of 12 tokens without an end token"),
        (ids(lambda own: own + own), "row 1 has 24 tokens, 12 were asked for"),
        (ids(lambda own: [9999, *own[1:]]), "holds the id 9999, the vocabulary has"),
        (ids(lambda own: [0, *own[1:]]), "holds the mask token 0"),
        (meta(step_maps=[1] * 11), "step_maps has 11 entries for 12 tokens"),
        (meta(step_maps=[1, 3, 3, 1] * 3), "without a hole"),
        (meta(step_maps=None), "a row without step_maps"),
        (lambda rows: [{}] * 4, "no meta_info in the answer"),
    ],
)
def test_an_answer_that_is_wrong_ends_it_in_one_line(
    engine: Sglang, stub: Stub, denoiser: ModelDenoiser, fault: Any, said: str
) -> None:
    stub.faults.append(fault)
    with pytest.raises(ValueError, match=said) as caught:
        engine.sample(canvas(denoiser), SETTINGS, seeded(5), THRESHOLD)
    assert "\n" not in str(caught.value) and stub.url in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"greedy": True}, "4 samples of one prompt at temperature 1 are equal"),
        ({"told": {"weight_version": None}}, "does not tell the version of its weights"),
        ({"told": {"vocab_size": 9}}, "another model: its vocabulary is 9, ours is"),
        ({"told": {"mask_token_id": 9}}, "its mask id is 9, ours is 0"),
        ({"told": {"block_size": 32}}, "its block length is 32, ours is 4"),
        ({"told": {"model_type": "llada2_moe"}}, "its model type is llada2_moe, ours is sdar"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    stub: Stub, denoiser: ModelDenoiser, change: dict[str, Any], said: str
) -> None:
    for name, value in change.items():
        setattr(stub, name, value)
    if "block_size" in stub.told:
        stub.algorithm.write_text(f"{{block_size: 32, threshold: {THRESHOLD}}}\n")
    with pytest.raises(ValueError, match=said) as caught:
        Sglang(denoiser, url=stub.url)
    assert "\n" not in str(caught.value)


def test_two_runs_share_a_folder_and_keep_apart(
    stub: Stub, denoiser: ModelDenoiser, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        engine = Sglang(denoiser, url=stub.url, folder=str(tmp_path / "shared"))
        engine.place(tmp_path / name / "served", lambda: "step-3", lambda: None, lambda text: None)
        engine.sync()
        assert engine.folder is not None and engine.folder.parent == tmp_path / "shared"
        assert [p.name for p in engine.folder.iterdir()] == [engine.version]
        last = engine.folder
        if name == "one":
            first = engine  # lives on
    assert first.folder != last and first.path is not None and first.path.is_dir()
    del engine
    assert not last.exists()  # its run is over


def test_no_server(stub: Stub, denoiser: ModelDenoiser) -> None:
    stub.stop()
    with pytest.raises(ValueError, match=f"no server answers at {stub.url} .*: start it"):
        Sglang(denoiser, url=stub.url)


def test_what_a_build_lacks_is_no_feature(
    stub: Stub, denoiser: ModelDenoiser, tmp_path: Path
) -> None:
    stub.step_maps = False
    stub.ignores_seeds = True
    engine = Sglang(denoiser, url=stub.url, folder=str(tmp_path))
    assert engine.features == {"truncation"}
    rollout = engine.sample(canvas(denoiser), SETTINGS, seeded(), THRESHOLD)
    assert int(rollout.num_local_steps.max()) == 1  # a call per block, where none is told
    assert not rollout.behavior_logps.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wrong_version": True}, "has weights default after an update to step-0-"),
        ({"keeps_cache": True}, "kept 64 cached prompt tokens over an update"),
    ],
)
def test_an_update_that_cannot_be_trusted(
    stub: Stub, denoiser: ModelDenoiser, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    stub.stop()
    stub.start()
    engine = Sglang(denoiser, url=stub.url, folder=str(tmp_path))
    engine.sync()
    stub.stop()
    stub.start()
    for name, value in change.items():
        setattr(stub, name, value)
    stub.cached = {tuple(body["input_ids"][0]) for body in stub.bodies}
    with pytest.raises(ValueError, match=said):
        engine.sync()


def test_an_update_that_is_refused(stub: Stub, denoiser: ModelDenoiser, tmp_path: Path) -> None:
    engine = Sglang(denoiser, url=stub.url, folder=str(tmp_path))
    stub.updates.append({"success": False, "message": "Failed: size of tensor a"})
    with pytest.raises(ValueError, match=r"answered 400 .Failed: size of tensor a"):
        engine.sync()
    assert engine.version is None
    stub.updates.append({"success": False, "message": "Flush cache failed: requests are running"})
    engine.sync()  # loaded, and not flushed: again
    assert stub.version == engine.version and not stub.updates


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "url is not set"),
        ({"url": "localhost:3000"}, "url: expected http://host:port"),
        ({"url": "http://a:b"}, "url: expected http://host:port"),
        ({"url": "http://a:1", "patience": -1.0}, "patience: expected a number of at least 0"),
        ({"url": "http://[::1"}, "url: expected http://host:port, got 'http://\\[::1'"),
        ({"url": "http://a:1", "patience": math.nan}, "patience: expected a number of at least 0"),
        ({"url": "http://a:1", "timeout": math.nan}, "timeout: expected a number of at least 0.1"),
        ({"url": "http://a:1", "timeout": math.inf}, "and at most 2147483, got inf"),
        ({"url": "http://a:1", "rows": 0}, "rows: expected a whole number of at least 1"),
        ({"url": "http://a:1", "rows": 1.5}, "rows: expected a whole number of at least 1"),
        ({"url": "http://a:1", "retries": True}, "retries: expected a whole number of at least 0"),
        ({"url": "http://a:1", "folder": 5}, "folder: expected a path"),
        ({"url": "http://a:1", "agreement": "all"}, "agreement: expected a share"),
        ({"url": "http://a:1", "agreement": 2.0}, "agreement: expected a share"),
    ],
)
def test_settings_that_cannot_be_meant(
    denoiser: ModelDenoiser, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Sglang(denoiser, **settings)


def test_what_is_not_served(engine: Sglang, denoiser: ModelDenoiser) -> None:
    given = anchored_canvas([[5]], [{2: 6}], gen_length=8, denoiser=denoiser)
    with pytest.raises(ValueError, match="has anchors"):
        engine.sample(given, SETTINGS, seeded(), THRESHOLD)
    with pytest.raises(ValueError, match=r"decodes with threshold 0.9, decode.gamma is 0.5"):
        engine.sample(canvas(denoiser), SETTINGS, seeded(), 0.5)
    other = DecodeSettings(block_length=4, steps=1, select="eb", temperature=1.0)
    with pytest.raises(ValueError, match="decodes by select=confidence_threshold"):
        engine.sample(canvas(denoiser), other, seeded(), THRESHOLD)
    with pytest.raises(ValueError, match="pass generator="):
        engine.sample(canvas(denoiser), SETTINGS, None, THRESHOLD)


def test_a_disk_without_room_is_a_loss_that_a_run_survives(
    stub: Stub, denoiser: ModelDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Sglang(denoiser, url=stub.url, folder=str(tmp_path))
    room = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("unmaskrl.models.served.weights.shutil.disk_usage", lambda _: room)
    with pytest.raises(Lost, match=r"set rollouts.folder to a larger one"):
        engine.sync()
    assert engine.version is None and not list(tmp_path.glob("*/step-*"))
