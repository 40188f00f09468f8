"""Large runs, composed of model, task and method: each resolves and is priced; a few train on tiny
models of the family.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.offline_tasks import GSM8K_ROWS, MATH_ROWS, write_rows
from unmaskrl import load_denoiser
from unmaskrl.cli.main import main
from unmaskrl.models.families import Dream, LLaDA
from unmaskrl.models.families.llada2 import LLaDA2
from unmaskrl.models.families.sdar import SDAR
from unmaskrl.models.loading import open_checkpoint
from unmaskrl.models.tokenizer import EOS, MASK, build_byte_tokenizer
from unmaskrl.recipes.checks import check_blocks
from unmaskrl.recipes.cost import model_grid, step_cost
from unmaskrl.recipes.files import composed_names
from unmaskrl.recipes.load import load_method, load_recipe
from unmaskrl.recipes.memory import Setup, memory_plan, model_shape, on_device
from unmaskrl.recipes.schema import Recipe
from unmaskrl.tasks import completion_text
from unmaskrl.training.loop import train

LINEAR = "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out o_proj gate_proj down_proj".split()
DATA = Path(__file__).parents[1] / "data"

TINY = (
    "model.random_init=tiny model.lora.rank=2 train.steps=1 train.prompts_per_step=2 "
    "train.group_size=2 train.num_iterations=2 "
    "run.threads=1 run.log_with=[] decode.gen_length=16 decode.block_length=16 decode.steps=4 "
    "eval.size=1 eval.size_during=1"
).split()


def test_names_are_all_combinations() -> None:
    names = composed_names()
    assert len(names) == len(set(names)) == 2 * 4 * 4 + 4 * 4 * 7
    assert {
        "llada-8b-gsm8k-diffu_grpo",
        "llada-8b-countdown-stp",
        "dream-7b-sudoku-diffpo",
        "dream-7b-math-elbo_grpo",
    } <= set(names)
    with pytest.raises(ValueError, match="the nearest are llada-8b-gsm8k-stp, "):
        load_recipe("llada-8b-gsm8k-spt")


FULL_ATTENTION = [n for n in composed_names() if n.startswith(("llada-8b-", "dream-7b-"))]
BLOCKS = {"sdar-1.7b": 4, "sdar-4b": 4, "sdar-8b": 4, "llada2-mini": 32}


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_every_large_run_resolves_and_fits_80_gb(name: str) -> None:
    recipe = load_recipe(name)
    family, task, method = name.rsplit("-", 2)
    assert recipe.name == name and recipe.task == {**recipe.task, "name": task, "protocol": "d1"}
    assert ("LLaDA" in recipe.model.path) == (family == "llada-8b")
    assert (
        recipe.decode.gen_length == 256
        and recipe.train.group_size == 6
        and recipe.optimizer.lr == 3e-6
    )
    assert recipe.train.num_iterations == {
        "diffu_grpo": 8 if task in ("countdown", "sudoku") else 12,
        "diffpo": 8,
    }.get(method, 4)
    assert recipe.decode.temperature == (0.3 if task == "sudoku" else 0.9)
    assert step_cost(recipe).parameters > 7e9
    assert fits(recipe, 80)


@pytest.mark.parametrize("name", [n for n in composed_names() if n not in FULL_ATTENTION])
def test_every_block_causal_run_resolves_and_fits_80_gb(name: str) -> None:
    recipe, method = load_method(name, [])
    family, task, _ = name.rsplit("-", 2)
    assert recipe.decode.block_length == BLOCKS[family] == model_grid(recipe.model)
    check_blocks(recipe, method, BLOCKS[family])
    assert recipe.task["name"] == task and recipe.decode.exit_at is None
    # an exact likelihood takes as many canvases a row as a block has calls, at most
    rows = recipe.train.prompts_per_step * recipe.train.group_size
    views = step_cost(recipe).new / recipe.train.num_iterations / rows
    assert views <= BLOCKS[family]
    assert fits(recipe, 80)


def fits(recipe: Recipe, gigabytes: int) -> bool:
    shape = model_shape(recipe.model)
    assert shape is not None
    setup = on_device(shape, Setup.of(recipe, shape), gigabytes)
    return memory_plan(shape, setup).total < 0.9 * gigabytes * 2**30


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train", "sdar-8b-countdown-dipo decode.block_length=8", "blocks of 4; set block_length"),
        ("train", "sdar-8b-countdown-stp estimator.name=coupled", "estimator coupled: its views"),
        ("check", "sdar-4b-math-dipo estimator.name=gauss", "estimator gauss: its views mean"),
        ("check", "sudoku-mini model.block_length=4", "llada has none (its attention is full)"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_it_is_fetched(
    command: str,
    words: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("a download was started")
    )
    out = [f"run.out={tmp_path / 'run'}"]
    assert main([command, *words.split(), *out]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llada-8b-gsm8k-stp", "bfloat16"),
        ("llada-8b-math-diffpo", "float32"),
        ("llada-8b-countdown-elbo_grpo", "float32"),
        ("llada-8b-sudoku-diffu_grpo", "float32"),
        ("dream-7b-gsm8k-diffpo", "bfloat16"),
        ("dream-7b-countdown-stp", "float32"),
        ("sdar-8b-gsm8k-dipo", "bfloat16"),
        ("llada2-mini-countdown-stp", "float32"),
    ],
)
def test_a_rehearsal_without_a_download(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of two updates, evaluation, saved weights: everything but the size is the large
    run's, and for most the dtype: products in bfloat16 are slow on a CPU without them.
    """
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("a download was started")
    )
    task = name.rsplit("-", 2)[1]
    rows = {"gsm8k": GSM8K_ROWS, "math": MATH_ROWS}.get(task)
    data = (
        [f"task.data={write_rows(tmp_path / 'rows.jsonl', rows)}"]
        if rows
        else ["task.train_size=8", "task.eval_size=4"]
    )
    grid = BLOCKS.get(name.rsplit("-", 2)[0])
    blocks = [f"decode.block_length={grid}", "decode.gen_length=32"] if grid else []
    settings = [*TINY, *data, *blocks, f"model.dtype={dtype}"]
    train(load_recipe(name, [*settings, f"run.out={tmp_path / 'run'}"]))
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(steps) == 1 and all(step["health/behavior_gap"] < 0.2 for step in steps)
    model = load_denoiser(tmp_path / "run" / "model").model
    kinds = {"llada-8b": LLaDA, "dream-7b": Dream, "sdar-8b": SDAR, "llada2-mini": LLaDA2}
    assert isinstance(model, kinds[name.rsplit("-", 2)[0]])
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").is_file()


def fixture_with_tokenizer(name: str, folder: Path) -> Path:
    """A copy of a parity checkpoint, and a byte-level tokenizer with its special ids (mask 511, EOS
    501).
    """
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / name / file, folder / file)
    build_byte_tokenizer(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    ids = {MASK: 511, EOS: 501}
    for token in data["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    data["model"]["vocab"] |= ids
    path.write_text(json.dumps(data))
    return folder


def distinct(prompts: list, completions: list, **columns: list) -> list[float]:
    """A reward that differs between random completions."""
    return [float(len(set(completion_text(completion)))) for completion in completions]


@pytest.mark.parametrize(
    ("family", "name"), [("llada-8b", "llada-tiny"), ("dream-7b", "dream-tiny")]
)
def test_a_checkpoint_of_the_layout_trains_by_its_path_alone(
    family: str, name: str, tmp_path: Path
) -> None:
    """The published layout with random weights: adapters are trained, and put on it no other tensor
    has changed.
    """
    folder = fixture_with_tokenizer(name, tmp_path / "model")
    out = tmp_path / "run"
    settings = (
        "model.dtype=float32 train.steps=1 train.prompts_per_step=1 train.group_size=4 "
        "train.num_iterations=1 optimizer.lr=0.01 "
        "run.threads=1 run.log_with=[] eval.size=2 eval.size_during=2 decode.gen_length=16 "
        "decode.block_length=16 "
        "decode.steps=8 task.train_size=4 task.eval_size=4 task.protocol=strict "
        "task.prompt_style=short "
        f"train.reward_functions=[{__name__}:distinct] model.path={folder} run.out={out}"
    ).split()
    train(load_recipe(f"{family}-countdown-stp", settings))
    before = load_denoiser(folder).model.state_dict()
    after = open_checkpoint(out)[0].model.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) > 10
    for key in changed:
        assert (
            key.endswith(".weight")
            and key.split(".")[-2] in LINEAR
            and (".blocks." in key or ".layers." in key)
        ), key
