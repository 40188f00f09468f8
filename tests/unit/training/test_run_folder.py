"""What a run folder is, who may replace it, who holds it, and how its logs are cut: nothing of
somebody else's is touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.folder.config import (
    check_changes,
    describe_changes,
    read_config,
    write_config,
)
from unmaskrl.training.folder.run_folder import (
    check_folder,
    claim_folder,
    cut_log,
    folder_of,
    hold_folder,
    sync_logs,
)
from unmaskrl.utils import files, lock
from unmaskrl.utils.files import (
    append_jsonl,
    free_name,
    is_alive,
    process_start,
    read_jsonl,
    remove_left_parts,
    write_text,
)
from unmaskrl.utils.lock import Lock, holding

RECIPE = load_recipe("sudoku-mini")


def a_run(folder: Path) -> Path:
    """Everything that `train` leaves behind, as empty files."""
    inside = (
        "metrics.jsonl eval.jsonl samples.jsonl metrics-old-1.jsonl config-old-1.yaml "
        "summary-old-12.json run.json "
    )
    inside += (
        "threads.json summary.json report.html .lock .report.html.4194303.part "
        "model/model.safetensors "
    )
    inside += "model/config.json model/decode.json model/tokenizer.json model/threshold.json "
    inside += "model/adapter/adapter_model.safetensors model-raw/model.safetensors "
    inside += "checkpoints/update-000002/state.json checkpoints/update-000002/ema.safetensors "
    inside += "checkpoints/damaged-000003/state.json checkpoints/.partial-000004/model.safetensors "
    inside += "tensorboard/sudoku/events.out.tfevents.1.host.2.0 tensorboard/sudoku/hparams.yml"
    for name in inside.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    write_config(RECIPE, folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_run_is_moved_aside_and_counted(tmp_path: Path) -> None:
    run = tmp_path / "run.v2"
    for number in (1, 2):
        before = tree(a_run(run))
        check_folder(run, resume=False, force=True)
        held, notes = claim_folder(run, force=True)
        assert notes == [f"--force: the run that was in {run} is now {run}-old-{number}"]
        assert tree(tmp_path / f"run.v2-old-{number}").keys() == before.keys() - {
            ".lock",
            ".report.html.4194303.part",
        }
        assert [p.name for p in run.iterdir()] == [".lock"]
        held.release()
    assert not list(run.iterdir())


FOREIGN = [
    "notes.txt",
    "model/notes.md",
    "checkpoints/update-000002/thesis.tex",
    ".key",
    "src/a.py",
    "metrics.json",
    "old-1.txt",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_with_foreign_files_is_left_alone(name: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    before = tree(run)
    with pytest.raises(
        ValueError, match=r"--force: .* is left alone, it holds .* no run writes; set run\.out"
    ):
        check_folder(run, resume=False, force=True)
    with pytest.raises(ValueError, match="left alone"):
        claim_folder(run, force=True)
    assert tree(run) == before


@pytest.mark.parametrize(
    "config", [None, "", "- 1", "train: 3\n", "a: !!python/object/apply:os.system [x]", "\0"]
)
def test_what_is_no_run_is_left_alone(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    for force in (True, False):
        with pytest.raises(ValueError, match=r"holds no run|holds files and no run"):
            check_folder(tmp_path, resume=False, force=force)


def test_where_one_stands_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run")
    (run / "model" / "deep").mkdir()
    (tmp_path / "link").symlink_to(run)
    monkeypatch.setenv("HOME", str(run / "model"))
    places = {tmp_path / "link": "it is a link", run: "the home folder lies in it"}
    for folder, reason in places.items():
        with pytest.raises(ValueError, match=reason):
            check_folder(folder, resume=False, force=True)
    monkeypatch.setenv("HOME", str(run))
    with pytest.raises(ValueError, match="it is the home folder"):
        check_folder(run, resume=False, force=True)
    for place, reason in (
        (run, "it is the current folder"),
        (run / "model", "the current folder lies in it"),
    ):
        monkeypatch.chdir(place)
        for name in (run, Path(os.path.relpath(run))):
            with pytest.raises(ValueError, match=reason):
                check_folder(name, resume=False, force=True)


def test_what_may_begin_and_go_on(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", resume=False, force=False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()  # killed before its run began
    check_folder(tmp_path / "new", resume=False, force=False)
    with pytest.raises(ValueError, match="holds no run"):
        check_folder(tmp_path / "new", resume=True, force=False)
    with pytest.raises(ValueError, match="there is no run in"):
        check_folder(tmp_path / "none", resume=True, force=False)
    with pytest.raises(ValueError, match="give one of them"):
        check_folder(a_run(tmp_path / "run"), resume=True, force=True)
    with pytest.raises(
        ValueError, match="already holds a run: add --resume to go on, --force to move it aside"
    ):
        check_folder(tmp_path / "run", resume=False, force=False)
    check_folder(tmp_path / "run", resume=True, force=False)


@pytest.mark.parametrize(
    "out",
    [
        "{recipe.__class__}",
        "{seed!r}",
        "{other}",
        "{",
        "{0}",
        "{}",
        "{recipe[0]}",
        "{recipe:{seed}}",
        "",
        "a\0b",
        "{recipe:d}",
    ],
)
def test_only_name_and_seed_are_filled_in(out: str) -> None:
    with pytest.raises(ValueError, match=r"run\.out"):
        folder_of(out, "x", 3)


def test_a_name_stays_a_name() -> None:
    assert folder_of("runs/{recipe}-s{seed:03d}-{{x}}", "sudoku", 3) == Path("runs/sudoku-s003-{x}")
    with pytest.raises(ValueError, match="no name of a folder"):
        folder_of("runs/{recipe}", "../../x", 3)
    assert folder_of("runs/mine", "../../x", 3) == Path("runs/mine")


def stored_lock(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**lock._self(), **changes}))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = Lock.take(path, "runs/x")
    assert held.is_held()
    with pytest.raises(
        ValueError, match=f"runs/x is in use by process {os.getpid()}: wait until it is done"
    ):
        Lock.take(path, "runs/x")
    code = (
        "from pathlib import Path; from unmaskrl.utils.lock import Lock; "
        f"Lock.take(Path({str(path)!r}), 'runs/x')"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1 and f"in use by process {os.getpid()}" in other.stderr
    held.release()
    assert not path.exists() and not held.is_held()
    subprocess.run([sys.executable, "-c", code + "; import os; os._exit(0)"], check=True)
    assert path.exists()  # it died with the lock
    Lock.take(path, "runs/x").release()


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    held = Lock.take(tmp_path / ".lock", "runs/x")
    child = os.fork()
    if child == 0:
        released = held.is_held()
        held.release()
        os._exit(int(released))
    assert os.waitpid(child, 0)[1] == 0 and held.is_held()
    held.release()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 - 1},
        {"pid": os.getppid(), "started": 1},  # that number belongs to a later process
        {"boot": "another start of the machine", "pid": os.getppid()},
        {"started": 1},  # this process's own number, before it
        {"pid": "x"},
    ],
)
def test_a_dead_holders_lock_is_taken_over(changes: dict[str, object], tmp_path: Path) -> None:
    stored_lock(tmp_path / ".lock", **changes)
    hold_folder(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_lock_that_was_never_finished_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    hold_folder(tmp_path).release()


def test_a_living_holder_and_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    parent = os.getppid()
    stored_lock(path, pid=parent, started=process_start(parent))
    with pytest.raises(ValueError, match=f"in use by process {parent}: wait"):
        hold_folder(tmp_path)
    stored_lock(path, host="elsewhere", pid=7)
    with pytest.raises(
        ValueError, match=r"process 7 of another machine \(elsewhere\).*delete that file"
    ):
        hold_folder(tmp_path)
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_two_evaluations_of_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    refused = pytest.raises(ValueError, match=r"items\.jsonl is in use by process")
    with holding(path), refused, holding(path):
        pass
    with holding(None), holding(path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_dead_processes_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    own = os.getppid()
    host = files.host_name()
    stays = [f".a.json.{own}@{host}.part", ".a.json.4194303@elsewhere.part", "mine.part", "a.json"]
    goes = [
        f".a.json.4194303@{host}.part",
        ".a.json.4194303.part",
        f"model/.model.safetensors.4194303@{host}.part",
    ]
    for name in [*stays, *goes]:
        (tmp_path / name).touch()
    hold_folder(tmp_path).release()
    assert sorted(tree(tmp_path)) == sorted(stays)
    (tmp_path / ".a[1].json.4194303.part").touch()
    write_text(tmp_path / "b.json", "x")  # another file's are not this one's to delete
    assert (tmp_path / ".a[1].json.4194303.part").exists()
    write_text(tmp_path / "a[1].json", "x")
    assert not (tmp_path / ".a[1].json.4194303.part").exists()
    remove_left_parts(tmp_path)


def test_a_process_is_itself_and_not_its_number() -> None:
    started = process_start(os.getpid())
    assert is_alive(os.getpid()) and is_alive(os.getpid(), started)
    if started is not None:
        assert not is_alive(os.getpid(), started + 1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not is_alive(child.pid)


def test_a_zombie_is_dead() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    while process_start(child) is not None:
        pass
    assert not is_alive(child)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("text", "size", "left", "says"),
    [
        ('{"a":1}\n{"a":2}\n', 8, '{"a":1}\n', ""),
        ('{"a":1}\n', 8, '{"a":1}\n', ""),
        ('{"a":1}\n{"a"', 16, '{"a":1}\n', "has 12 bytes, the checkpoint says 16: lines are lost"),
        ('{"a":1}\n', 16, '{"a":1}\n', "has 8 bytes, the checkpoint says 16"),
        ('{"a":1}\n{"a":2}\n', 10, '{"a":1}\n', "does not end a line where the checkpoint says"),
        ("", 8, "", "has 0 bytes"),
        (
            "x" * 200_000 + "\n" + "y" * 100_000,
            300_001,
            "x" * 200_000 + "\n",
            "does not end a line",
        ),
    ],
)
def test_logs_are_only_ever_cut_and_end_in_whole_lines(
    text: str, size: int, left: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    notes = cut_log(path, size)
    assert path.read_text() == left
    assert bool(notes) == bool(says)
    if says:
        assert says in notes[0]


def test_a_log_is_never_cut_to_nothing_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    assert cut_log(path, 0) == ["metrics.jsonl begins anew; what it held is in metrics-old-1.jsonl"]
    assert not path.exists() and (tmp_path / "metrics-old-1.jsonl").read_text() == "{}\n"
    assert cut_log(path, 0) == [] and "is missing" in cut_log(path, 5)[0]
    path.touch()
    assert cut_log(path, 0) == [] and free_name(path).name == "metrics-old-2.jsonl"
    assert sync_logs(tmp_path) == {"metrics.jsonl": 0, "eval.jsonl": 0, "samples.jsonl": 0}


def test_errors_of_files_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"No such file.*gone/metrics\.jsonl"):
        append_jsonl(tmp_path / "gone" / "metrics.jsonl", [{}])
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            append_jsonl(Path("/dev/full"), [{}])

    def full(path: Path, mode: int = 0) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
        write_text(tmp_path / "a.json", "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "eval.jsonl").write_text('{"a": 1}\n{"a": \0\0\n')
    with pytest.raises(
        ValueError, match=r"eval\.jsonl:2 is no JSON object; correct or delete that line"
    ):
        read_jsonl(tmp_path / "eval.jsonl")


FREE = (
    "train.steps=90 train.minutes=3 run.out=x run.threads=2 run.save_every=7 "
    "run.keep_checkpoints=9 eval.every=3 "
)
FREE += (
    "run.log_with=[] eval.size=9 eval.temperature=0.5 eval.batch_size=3 train.max_canvases=7 "
    "run.variance_draws=3 "
)
FREE += "model.activation_checkpointing=true name=other"
BOUND = (
    "optimizer.lr=1 run.seed=4 train.group_size=4 decode.steps=10 prior.keep=0.3 "
    "task.train_size=7 estimator.num_mc=2 "
)
BOUND += (
    "loss.clip_low=0.1 model.path=zero optimizer.schedule=constant train.num_iterations=2 "
    "model.lora.rank=3 train.ema=0.5"
)


def test_what_may_change_on_resume_and_what_may_not(tmp_path: Path) -> None:
    write_config(RECIPE, tmp_path)
    path = tmp_path / "config.yaml"
    stored = read_config(path)
    changed = check_changes(load_recipe("sudoku-mini", FREE.split()), stored, path)
    assert sorted(changed) == sorted(word.partition("=")[0] for word in FREE.split())
    for word in BOUND.split():
        name = word.partition("=")[0].replace(".rank", "")
        with pytest.raises(
            ValueError, match=rf"--resume: {name} .* differs from .*config\.yaml and would change"
        ):
            check_changes(load_recipe("sudoku-mini", [word]), stored, path)


def test_what_follows_from_a_change_is_said(tmp_path: Path) -> None:
    longer = load_recipe("sudoku-mini", ["train.steps=60", "run.threads=2"])
    said = describe_changes(longer, RECIPE, ["train.steps", "run.threads", "run.out"])
    assert said[0] == "changed on resume: train.steps 30 -> 60, run.threads 0 -> 2"
    assert said[1] == "run.threads changed: sums round differently from here on"
    assert "optimizer.schedule=linear, prior.keep_end follow the new one" in said[2]
    assert (
        describe_changes(RECIPE, RECIPE, []) == describe_changes(RECIPE, RECIPE, ["run.out"]) == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n",
        "train: 3\n",
        "task: {name: sudoku}\ntrain: {stepz: 3}\n",
        "a: !!python/name:os.system\n",
    ],
)
def test_a_config_that_holds_no_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^.*/config\.yaml ") as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_a_run_folder_is_a_recipe_too(tmp_path: Path) -> None:
    """A moved run goes on where it is: `unmaskrl train moved --resume`."""
    moved = tmp_path / "mov{ed}"
    moved.mkdir()
    write_config(load_recipe("sudoku-mini", ["optimizer.lr=0.5"]), moved)
    recipe = load_recipe(str(moved), ["train.steps=77"])
    assert (recipe.name, recipe.optimizer.lr, recipe.train.steps) == ("sudoku-mini", 0.5, 77)
    assert folder_of(recipe.run.out, recipe.name, 0) == moved
    with pytest.raises(ValueError, match="not found"):
        load_recipe(str(tmp_path))
