"""Loading and saving checkpoint folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import LLaDA, LLaDAConfig
from unmaskrl.utils.files import write_whole

DATA = Path(__file__).parents[2] / "data" / "llada-tiny"
DREAM = Path(__file__).parents[2] / "data" / "dream-tiny"
HEAD = "model.transformer.ff_out.weight"
EMBEDDING = "model.transformer.wte.weight"


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, target / name)
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private copy of the checkpoint."""
    return copy_of(DATA, tmp_path / "model")


@pytest.fixture(params=[DATA, DREAM], ids=["llada", "dream"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A private copy of a checkpoint of each family."""
    return copy_of(request.param, tmp_path / "model")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        part = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / part)
        weight_map |= dict.fromkeys(names[i::3], part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_state(first: ModelDenoiser, second: ModelDenoiser) -> None:
    a = first.model.state_dict()
    b = second.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ids_and_mode() -> None:
    denoiser = load_denoiser(DATA)
    assert (denoiser.mask_id, denoiser.eos_id, denoiser.pad_id, denoiser.vocab_size) == (
        511,
        501,
        501,
        512,
    )
    assert not denoiser.model.training
    assert all(p.requires_grad for p in denoiser.model.parameters())


def test_logits_are_head_of_hidden() -> None:
    denoiser = load_denoiser(DATA)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hidden = denoiser.hidden(ids)
        assert torch.equal(denoiser.logits(ids), denoiser.head(hidden))
        chosen = denoiser.head(hidden[:, 2])  # fewer rows round differently, so not bit-equal
        assert torch.allclose(chosen, denoiser.logits(ids)[:, 2], rtol=0, atol=1e-5)


def test_dtype() -> None:
    denoiser = load_denoiser(DATA, dtype=torch.float64)
    stored = load_file(DATA / "model.safetensors")
    state = denoiser.model.state_dict()
    assert all(torch.equal(state[name], stored[name].double()) for name in stored)


def test_loading_and_saving_leave_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    save_model(load_denoiser(DATA).model, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_importing_leaves_the_global_generator_alone() -> None:
    code = (
        "import torch; s = torch.get_rng_state(); import unmaskrl.models.checkpoint, "
        "unmaskrl.models.tokenizer, sys; "
        "assert torch.equal(s, torch.get_rng_state()); assert 'transformers' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_weights_do_not_follow_the_file(folder: Path) -> None:
    denoiser = load_denoiser(folder)
    before = denoiser.model.state_dict()[HEAD].clone()
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.seek(-4096, os.SEEK_END)
        handle.write(b"\0" * 4096)
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.truncate(1000)
    assert torch.equal(before, denoiser.model.state_dict()[HEAD])


def test_shards_load_as_one_file(either: Path) -> None:
    single = load_denoiser(either)
    shard(either)
    assert_same_state(single, load_denoiser(either))


def test_a_large_model_is_saved_in_shards(either: Path, tmp_path: Path) -> None:
    denoiser = load_denoiser(either)
    target = tmp_path / "saved"
    save_model(denoiser.model, target, max_shard_bytes=150_000)
    files = sorted(p.name for p in target.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        4 * p.numel() for p in denoiser.model.state_dict().values()
    )
    held = {name: file for file in files for name in load_file(target / file)}
    assert index["weight_map"] == held and held.keys() == denoiser.model.state_dict().keys()
    tensors = [t.numel() * 4 for t in denoiser.model.state_dict().values()]
    for file in files:
        stored = load_file(target / file)
        assert len(stored) == 1 or sum(t.numel() * 4 for t in stored.values()) <= 150_000
    assert max(tensors) <= 150_000
    assert_same_state(denoiser, load_denoiser(target))


def test_saving_again_in_another_layout_leaves_no_old_weights(folder: Path) -> None:
    other = LLaDA(load_denoiser(folder).model.config).init_weights(torch.Generator().manual_seed(1))
    save_model(other, folder, max_shard_bytes=150_000)
    assert not (folder / "model.safetensors").exists()
    assert_same_state(ModelDenoiser.from_model(other), load_denoiser(folder))
    save_model(other, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_state(ModelDenoiser.from_model(other), load_denoiser(folder))


def test_a_stored_table_of_angles_is_passed_over(tmp_path: Path) -> None:
    folder = copy_of(DREAM, tmp_path / "model")
    expected = load_denoiser(folder)
    edit_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    )
    assert_same_state(expected, load_denoiser(folder))


def test_weights_are_read_straight_into_the_wanted_dtype(
    either: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # float64 would need twice the memory: nothing may be loaded whole and converted afterwards
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda *a, **k: pytest.fail("the model was converted as a whole")
    )
    assert {p.dtype for p in load_denoiser(either, dtype=torch.bfloat16).model.parameters()} == {
        torch.bfloat16
    }


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    first = load_denoiser(DATA)
    save_model(first.model, tmp_path / "a" / "b")
    saved = tmp_path / "a" / "b"
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_state(first, load_denoiser(saved))
    original = load_file(DATA / "model.safetensors")
    written = load_file(saved / "model.safetensors")
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    keys = [json.loads((place / "config.json").read_text()) for place in (DATA, saved)]
    assert list(keys[0].items()) == list(keys[1].items())
    with safe_open(saved / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 8}
    ids = {
        "vocab_size": 6,
        "embedding_size": 6,
        "mask_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    model = LLaDA(LLaDAConfig(**sizes, **ids, weight_tying=True)).init_weights(
        torch.Generator().manual_seed(0)
    )
    save_model(model, tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    assert_same_state(ModelDenoiser.from_model(model), load_denoiser(tmp_path))


def test_saved_files_have_usual_permissions(tmp_path: Path) -> None:
    save_model(load_denoiser(DATA).model, tmp_path / "model")
    (tmp_path / "usual").touch()
    modes = {p.stat().st_mode for p in ((tmp_path / "usual"), *(tmp_path / "model").iterdir())}
    assert len(modes) == 1


def test_save_in_another_dtype(tmp_path: Path) -> None:
    denoiser = load_denoiser(DATA)
    save_model(denoiser.model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    state = denoiser.model.state_dict()
    assert all(torch.equal(stored[name], state[name].to(torch.bfloat16)) for name in state)
    assert denoiser.model.state_dict()[HEAD].dtype == torch.float32


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_missing_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(HEAD))
    with pytest.raises(
        ValueError, match=f"lacks tensors {HEAD}; the weights do not fit config.json"
    ):
        load_denoiser(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, n_layers=5)
    with pytest.raises(ValueError, match=r"lacks tensors .*blocks\.3\..*, .*, .* and 15 more;"):
        load_denoiser(folder)


def test_unexpected_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"unexpected tensors lm_head\.weight"):
        load_denoiser(folder)


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({EMBEDDING: torch.zeros(500, 64)}))
    with pytest.raises(ValueError, match=rf"{EMBEDDING} \(500, 64\) \(expected \(512, 64\)\)"):
        load_denoiser(folder)


@pytest.mark.parametrize("keep", [0, 5, 3000, 400_000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.truncate(keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as caught:
        load_denoiser(folder)
    assert "\n" not in str(caught.value)


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors does not exist"):
        load_denoiser(folder)


def test_an_index_stays_in_its_folder(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {HEAD: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="points outside the folder"):
        load_denoiser(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {HEAD: 3}}])
def test_an_index_without_a_map(folder: Path, index: dict) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of tensor names to files"):
        load_denoiser(folder)


def test_not_a_folder() -> None:
    with pytest.raises(
        ValueError, match=r"no-such-folder is not a folder, nor a hub id \(owner/name\)"
    ):
        load_denoiser("no-such-folder")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_denoiser(folder)


def test_other_families_are_refused(folder: Path) -> None:
    edit_config(folder, model_type="qwen2")
    with pytest.raises(ValueError, match="model_type 'qwen2'; shipped families: llada, Dream"):
        load_denoiser(folder)


def test_config_errors_name_the_file(folder: Path) -> None:
    edit_config(folder, mask_token_id=None)
    with pytest.raises(ValueError, match=r"config\.json: LLaDA config lacks mask_token_id"):
        load_denoiser(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "a JSON list; expected an object")]
)
def test_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_denoiser(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_denoiser(folder)
