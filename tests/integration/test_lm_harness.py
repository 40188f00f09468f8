"""The harness' own command line on local tasks, offline, in a process of its own (its import is
slow and warns).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmaskrl.evaluation.continuation import continuation_logps
from unmaskrl.evaluation.evaluate import EvalRequest, evaluate
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import encode_pair, load_tokenizer
from unmaskrl.recipes.schema import DecodeConfig
from unmaskrl.tasks import load

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

SIZE = 6
DECODE = {"gen_length": 24, "block_length": 12, "steps": 12, "select": "entropy"}
GENERATE = """
task: mini_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  {until: ["never", "</answer>", "", ">"], do_sample: false, max_gen_toks: 99, top_k: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: mini_choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def harness(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "unmaskrl.evaluation.lm_harness", "--model", "unmaskrl", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, **offline}
    )


def test_generation_and_choices_are_our_decoding_and_our_bound(tmp_path: Path) -> None:
    task = load("countdown")
    denoiser = load_denoiser(ASSETS / "mini")
    tokenizer = load_tokenizer(ASSETS / "mini")
    examples = task.examples("test")[:SIZE]
    prompts = [
        tokenizer.apply_chat_template(task.prompt(e), tokenize=False, add_generation_prompt=True)
        for e in examples
    ]
    ours = evaluate(
        EvalRequest(
            denoiser=denoiser,
            tokenizer=tokenizer,
            task=task,
            examples=examples,
            settings=DecodeConfig(**DECODE),
        )
    ).items
    # the first of several stop strings, wherever it stands in the list
    wanted = [item.text.split(">")[0] for item in ours]
    choices = [[str(task.reference(e)), "5 + 5 = 10"] for e in examples]
    rows = [
        {"prompt": prompt, "answer": text if n % 2 else "wrong", "choices": two, "label": 0}
        for n, (prompt, text, two) in enumerate(zip(prompts, wanted, choices, strict=True))
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, yaml in (("generate", GENERATE), ("choose", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(yaml.replace("DATA", str(tmp_path / "data.jsonl")))
    settings = ",".join(f"{key}={value}" for key, value in DECODE.items())
    done = harness(
        tmp_path,
        *(
            "--model_args",
            f"pretrained=mini,task=countdown,exit_at=None,num_mc=4,seed=3,{settings}",
            "--batch_size",
            "4",
        ),
        *("--tasks", "mini_generate,mini_choose", "--include_path", str(tmp_path)),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = {}
    for name in ("mini_generate", "mini_choose"):
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(
            (json.loads(line) for line in path.read_text().splitlines()),
            key=lambda row: row["doc_id"],
        )
    assert [row["resps"][0][0] for row in samples["mini_generate"]] == wanted
    assert all(text.endswith("<answer") for text in wanted)
    assert (
        "setting top_k is ignored" in done.stderr
        and done.stderr.count("max_gen_toks=99 exceeds gen_length=24") == 1
    )
    assert [row["exact_match"] for row in samples["mini_generate"]] == [0.0, 1.0] * (SIZE // 2)
    pairs = [
        encode_pair(tokenizer, p, f" {c}")
        for p, two in zip(prompts, choices, strict=True)
        for c in two
    ]
    want = continuation_logps(denoiser, pairs, num_mc=4, seed=3, batch_size=5, max_canvases=7)
    got = [float(resp[0][0]) for row in samples["mini_choose"] for resp in row["resps"]]
    assert got == pytest.approx(want, abs=1e-4) and max(got) < 0
    greedy = [
        resp[0][1] in (True, "True") for row in samples["mini_choose"] for resp in row["resps"]
    ]
    assert len(greedy) == 2 * SIZE and not all(greedy)


def test_what_it_cannot_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the harness' own way to the question, which takes a process and 20 seconds."""
    from unmaskrl.evaluation import lm_harness

    model = lm_harness.UnmaskRLModel("mini")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: model.loglikelihood_rolling([]))
    assert lm_harness.main() == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("unmaskrl.evaluation.lm_harness: error: perplexity tasks")
    )
