"""Real tasks from a file to a trained model: a tiny LLaDA with a byte-level tokenizer, and the
example of docs/tasks.md.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import seeded
from tests.integration.test_commands import TINY, refused, run
from tests.offline_tasks import GSM8K_ROWS, MATH_ROWS, write_rows
from unmaskrl.models.checkpoint import save_model
from unmaskrl.models.families.llada import LLaDA, LLaDAConfig
from unmaskrl.utils.files import write_json

ROOT = Path(__file__).parents[2]
SHORT = (
    "decode.gen_length=16 decode.block_length=8 decode.steps=4 decode.exit_at=null eval.size=3 "
    "eval.size_during=2".split()
)
STEP = "train.steps=1 train.prompts_per_step=2 train.group_size=2 train.num_iterations=1".split()


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of two small layers whose tokenizer knows every byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|mdm_mask|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *special])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ "
        "'assistant: ' }}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": special[0],
        "eos_token": special[1],
    }
    write_json(
        folder / "tokenizer_config.json",
        {**settings, "pad_token": special[1], "chat_template": template},
    )
    config = LLaDAConfig(
        d_model=16,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        mlp_hidden_size=24,
        vocab_size=258,
        embedding_size=258,
        mask_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        max_sequence_length=700,
    )
    save_model(LLaDA(config).init_weights(seeded(3), std=0.5), folder)
    return str(folder)


@pytest.mark.parametrize(("name", "protocol"), [("gsm8k", "strict"), ("math", "d1")])
def test_train_and_evaluate(
    name: str, protocol: str, bytes_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", {"gsm8k": GSM8K_ROWS, "math": MATH_ROWS}[name])
    task = f"task={{name: {name}, data: {data}, protocol: {protocol}}}"
    anchors = ["prior.name=anchors", "prior.keep=0.3"]
    out = tmp_path / "run"
    settings = [
        *TINY,
        *SHORT,
        *STEP,
        task,
        *anchors,
        f"model.path={bytes_model}",
        f"run.out={out}",
    ]
    code, said = run(capsys, "train", "sudoku-mini-elbo", *settings)
    assert code == 0, said
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert row["reward/correct"] == 0.0
    assert row["reward/format"] == (0.0 if protocol == "strict" else 0.25)
    overrides = [*SHORT[:4], f"task.protocol={protocol}"]
    code, said = run(
        capsys, "eval", bytes_model, "--task", name, "--data", data, "--size", "2", *overrides
    )
    assert code == 0 and "0.0%" in said


def test_long_prompts_stop_a_run_or_are_dropped(
    bytes_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**row, "question": row["question"] + " Think." * (n % 2)}
        for n, row in enumerate(GSM8K_ROWS)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "run"
    settings = [
        *TINY,
        *SHORT,
        *STEP,
        f"task={{name: gsm8k, data: {data}}}",
        f"model.path={bytes_model}",
        f"run.out={out}",
    ]
    said = refused(capsys, "train", "sudoku-mini-elbo", *settings, "train.max_prompt_length=240")
    assert re.search(
        r"\d+ of \d+ prompts of task gsm8k are longer than train.max_prompt_length 240", said
    )
    assert not out.exists()
    said = refused(
        capsys, "train", "sudoku-mini-elbo", *settings, "decode.gen_length=640", "decode.steps=640"
    )
    assert "exceed the model's 700 positions" in said
    limit = ["train.max_prompt_length=245", "train.long_prompts=drop"]
    code, said = run(capsys, "train", "sudoku-mini-elbo", *settings, *limit)
    assert code == 0, said
    assert re.search(r"of \d+ prompts of task gsm8k .* were dropped", " ".join(said.split()))
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert all(
        row["num_dropped"] + row["num_problems"] == 3 for row in rows if row["split"] == "test"
    )


def test_the_example_of_the_docs_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/tasks.md: a reward in the working directory, rows and a recipe; nothing of the package
    is changed.
    """
    blocks = re.findall(
        r"```(\w+)\n# (\S+)\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.S
    )
    files = {name: body for _, name, body in blocks}
    assert sorted(files) == ["largest.yaml", "largest_reward.py", "make_rows.py"]
    for name, body in files.items():
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    runpy.run_path("make_rows.py")
    assert yaml.safe_load(files["largest.yaml"])["task"]["name"] == "jsonl"
    code, said = run(capsys, "train", "largest.yaml", *TINY, "eval.size=8", "run.out=run")
    assert code == 0, said
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.0 <= row["reward/largest_reward:largest_first"] <= 1.0
    assert str(tmp_path) in sys.path
