"""Whole runs in this process: replaced, damaged, lengthened, moved, started twice, deleted while
they train.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from unmaskrl.cli.main import main
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.schema import SFTRecipe
from unmaskrl.reporting.progress import Progress
from unmaskrl.training import loop as train_module
from unmaskrl.training.folder.checkpoint import CheckpointError
from unmaskrl.training.folder.config import read_config
from unmaskrl.training.loop import train
from unmaskrl.training.sft.loop import run_sft
from unmaskrl.utils.lock import Lock

SETTINGS = (
    "train.steps=3 train.prompts_per_step=2 train.group_size=4 train.num_iterations=2 "
    "run.save_every=1 run.threads=1 "
    "run.log_with=[] run.keep_checkpoints=3 optimizer.schedule=constant run.probe=false "
    "eval.size=4 eval.size_during=2 "
    "eval.every=7 decode.steps=10 prior.name=none task.train_size=20"
).split()
LOGS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def run(out: Path, *settings: str, **how: bool) -> list[str]:
    heard = Heard()
    train(
        load_recipe("sudoku-mini", [*SETTINGS, f"run.out={out}", *settings]),
        progress=heard,
        **how,
    )
    return heard.said


def rows(path: Path) -> list[dict]:
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


def assert_same(ours: Path, theirs: Path) -> None:
    for name in LOGS:
        assert rows(ours / name) == rows(theirs / name), name
    for name in ("model", "model-raw"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (ours, theirs))
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out)
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps; no test changes it."""
    out = tmp_path_factory.mktemp("short") / "run"
    run(out, "train.steps=2", "run.save_every=3")
    return out


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_finished_run_of_two_steps_becomes_one_of_three(
    straight: Path, short: Path, tmp_path: Path
) -> None:
    """It goes on from its end, where save_every=3 did not fall, in a folder that was moved, and
    equals a straight run.
    """
    out = copied(short, tmp_path)
    said = run(out, "run.keep_checkpoints=1", resume=True)
    assert "resumed from update-000004 (step 2, inner update 0)" in said
    assert any(
        "train.steps 2 -> 3" in line and "run.keep_checkpoints 3 -> 1" in line for line in said
    )
    assert_same(out, straight)
    kept, now = (
        yaml.safe_load((out / name).read_text()) for name in ("config-old-1.yaml", "config.yaml")
    )
    assert (kept["train"]["steps"], now["train"]["steps"], now["run"]["out"]) == (2, 3, str(out))
    assert json.loads((out / "summary-old-1.json").read_text())["steps"] == 2
    with pytest.raises(ValueError, match="stands at step 3 already; set at least that"):
        run(out, "train.steps=2", "run.keep_checkpoints=1", resume=True)
    assert json.loads((out / "summary.json").read_text())["steps"] == 3


def test_a_moved_run_goes_on_by_its_folder_alone(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(short, tmp_path)
    before = rows(out / "metrics.jsonl")
    assert main(["train", str(out), "--resume", "--quiet"]) == 0
    assert rows(out / "metrics.jsonl") == before
    assert main(["train", str(out), "--quiet"]) == 2
    assert "already holds a run: add --resume" in capsys.readouterr().err


def test_force_moves_a_run_aside_when_everything_could_be_built(
    short: Path, tmp_path: Path
) -> None:
    out = copied(short, tmp_path)
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="has no 'no_such'"):
        run(out, "train.reward_functions=['tests.integration.test_run_folder:no_such']", force=True)
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which no run writes"):
        run(out, force=True)
    (out / "thesis.tex").unlink()
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    said = run(out, "train.steps=1", force=True)
    old = tmp_path / "copy-old-1"
    assert said[0] == f"--force: the run that was in {out} is now {old}"
    assert {p.relative_to(old): p.read_bytes() for p in old.rglob("*") if p.is_file()} == before
    assert len(rows(out / "metrics.jsonl")) == 1


def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "my_reward.py").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for words in (["train", "sudoku-mini"], ["sft", "mini-base"]):
        assert main([*words, "run.out=.", "--force"]) == 2
        said = capsys.readouterr().err
        assert (
            said
            == "unmaskrl: error: --force: . is left alone, it is the current folder; set run.out "
            "to another folder, "
            "or move it yourself\n"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["my_reward.py"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """A state that was changed with its digest taken out."""
    state = json.loads(path.read_text())
    state.pop("state_sha256")
    change(state)
    path.write_text(json.dumps(state))


def other_tensors(folder: Path, change: Callable[[dict], dict]) -> None:
    """Another model's weights, with a state that says so."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    edit(
        folder / "state.json",
        lambda s: s["files"].update({"model.safetensors": file.stat().st_size}),
    )


KEYS = "step inner updates calls elapsed keep num_ranks log_bytes".split()
UNFIT: dict[str, Callable[[Path], object]] = {
    "flipped": lambda p: flip(p / "model.safetensors"),
    "flipped average": lambda p: flip(p / "ema.safetensors"),
    "other names": lambda p: other_tensors(p, lambda t: {f"x.{k}": v for k, v in t.items()}),
    "other shapes": lambda p: other_tensors(p, lambda t: {k: v[:1].clone() for k, v in t.items()}),
    "no group": lambda p: edit(p / "state.json", lambda s: s["files"].pop("ema.safetensors")),
    "no batch": lambda p: edit(p / "state.json", lambda s: s.update(inner=1)),
    "a batch of nothing": lambda p: edit(p / "state.json", lambda s: s.update(batch={})),
    "log bytes of no number": lambda p: edit(
        p / "state.json", lambda s: s["log_bytes"].update({"eval.jsonl": "5"})
    ),
    "another update": lambda p: edit(p / "state.json", lambda s: s.update(updates=77)),
    "solved": lambda p: edit(p / "state.json", lambda s: s.update(solved=[1])),
    **{
        f"{key} gone": lambda p, key=key: edit(p / "state.json", lambda s: s.pop(key))
        for key in KEYS
    },
    **{
        f"{key} null": lambda p, key=key: edit(p / "state.json", lambda s: s.update({key: None}))
        for key in KEYS
    },
}


@pytest.fixture(scope="module")
def built(straight: Path):
    """A run that was built once and is put where checkpoints stand again and again."""
    from unmaskrl.training.setup import start_run

    out = straight.parent / "built"
    shutil.copytree(straight, out)
    built = start_run(
        load_recipe("sudoku-mini", [*SETTINGS, f"run.out={out}"]), resume=True, force=False
    )
    yield built
    assert built.lock is not None
    built.lock.release()


@pytest.mark.parametrize("damage", UNFIT)
def test_what_does_not_fit_is_passed_over_and_set_aside(damage: str, built, straight: Path) -> None:
    from unmaskrl.training.resume import load_run

    shutil.rmtree(built.out / "checkpoints")
    shutil.copytree(straight / "checkpoints", built.out / "checkpoints")
    newest = sorted((built.out / "checkpoints").iterdir())[-1]
    UNFIT[damage](newest)
    notes = load_run(built)
    assert (built.step, built.inner, built.updates) == (2, 1, 5)
    assert notes[0].startswith("checkpoint update-000006 is damaged and is passed over: ")
    assert "update-000006 is kept as damaged-000006" in notes
    if damage in ("other names", "other shapes"):
        assert "than the recipe's model" in notes[0]


def test_when_no_checkpoint_can_be_used_the_run_is_left_as_it_is(
    straight: Path, tmp_path: Path
) -> None:
    out = copied(straight, tmp_path)
    for folder in (out / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints .* nothing was changed"):
        run(out, resume=True)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_without_checkpoints_it_begins_anew_and_keeps_the_old_logs(
    straight: Path, tmp_path: Path
) -> None:
    out = copied(straight, tmp_path)
    shutil.rmtree(out / "checkpoints")
    metrics = (out / "metrics.jsonl").read_text()
    said = run(out, resume=True)
    assert "no checkpoint yet: starting from the beginning" in said
    assert (out / "metrics-old-1.jsonl").read_text() == metrics
    assert_same(out, straight)


def test_a_state_file_names_nothing_outside_its_folder(straight: Path, tmp_path: Path) -> None:
    out = copied(straight, tmp_path)
    victim = tmp_path / "victim.txt"
    victim.write_text("not a run's file\n")
    for folder in (out / "checkpoints").iterdir():
        edit(
            folder / "state.json",
            lambda s: s["log_bytes"].update({"../victim.txt": 0, str(victim): 0}),
        )
    run(out, resume=True)
    assert victim.read_text() == "not a run's file\n"


def test_a_log_that_lost_lines_is_said_and_the_run_goes_on(straight: Path, tmp_path: Path) -> None:
    out = copied(straight, tmp_path)
    for name in ("eval.jsonl", "metrics.jsonl"):
        text = (out / name).read_text()
        (out / name).write_text(text[: text.index("\n") - 50])  # a power cut: not one whole line
    said = " ".join(run(out, resume=True))
    assert "eval.jsonl has" in said and "metrics.jsonl has" in said and "lines are lost" in said
    assert b"\0" not in (out / "eval.jsonl").read_bytes() + (out / "metrics.jsonl").read_bytes()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"] is None and set(summary["after"]) == {"raw", "ema"}


def test_a_run_that_another_process_holds_is_refused(short: Path, tmp_path: Path) -> None:
    out = copied(short, tmp_path)
    held = Lock.take(out / ".lock", str(out))
    for how in ({"resume": True}, {"force": True}):
        with pytest.raises(ValueError, match="copy is in use by process"):
            run(out, **how)
    held.release()


def test_the_second_of_two_fresh_starts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked when the folder was not there yet; one was faster."""
    from unmaskrl.training import setup as run_module

    out = tmp_path / "run"
    build = run_module._build_run

    def slowly(*args, **kwargs):
        built = build(*args, **kwargs)
        out.mkdir()
        other.append(Lock.take(out / ".lock", str(out)))
        return built

    other: list[Lock] = []
    monkeypatch.setattr(run_module, "_build_run", slowly)
    with pytest.raises(ValueError, match="run is in use by process"):
        run(out)
    other[0].release()
    assert not list(out.iterdir())


@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_folder_that_goes_away_in_mid_run_is_one_clear_line(
    what: str, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "run"
    update = train_module.update

    def gone(run, *args, **kwargs):
        update(run, *args, **kwargs)
        if run.step == 1 and out.exists():
            shutil.rmtree(out) if what == "deleted" else out.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(train_module, "update", gone)
    with pytest.raises(
        ValueError, match=r"was deleted, moved or taken by another process .* stopped at step 1"
    ):
        run(out)
    assert not out.exists()


def test_sft_is_replaced_lengthened_and_refused_alike(tmp_path: Path) -> None:
    out = tmp_path / "sft"
    small = [
        "run.save_every=5",
        "run.log_every=1",
        "data.0.num_examples=50",
        "data.1.num_examples=50",
        "run.threads=1",
    ]
    small += ["data.0.batch_size=4", "data.1.batch_size=4", f"run.out={out}"]
    short, longer = (
        load_recipe("mini-base", [*small, f"train.steps={n}"], SFTRecipe) for n in (2, 3)
    )
    run_sft(short)
    with pytest.raises(
        ValueError, match="already holds a run: add --resume to go on, --force to move it aside"
    ):
        run_sft(short)
    with pytest.raises(ValueError, match=r"--resume: optimizer\.lr .* differs"):
        run_sft(
            load_recipe("mini-base", [*small, "train.steps=2", "optimizer.lr=1"], SFTRecipe),
            resume=True,
        )
    run_sft(longer, resume=True)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3]
    assert read_config(out / "config-old-1.yaml", SFTRecipe).train.steps == 2
    heard = Heard()
    run_sft(short, force=True, progress=heard)
    assert next(text for text in heard.said if "is now" in text).endswith(f"is now {out}-old-1")
    assert len(rows(tmp_path / "sft-old-1" / "metrics.jsonl")) == 3
    flip(next((out / "checkpoints").iterdir()) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        run_sft(short, resume=True)
