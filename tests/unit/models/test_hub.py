"""Where a checkpoint is: folders, hub ids (the download is replaced: no network), and one-line
errors.
"""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch

from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS, checkpoint_folder
from unmaskrl.models.tokenizer import load_tokenizer
from unmaskrl.recipes.cost import model_size
from unmaskrl.recipes.schema import ModelConfig

DREAM = Path(__file__).parents[2] / "data" / "dream-tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """A hub with one repository, ``someone/mini`` (the shipped base and two Python files); returns
    the calls.
    """
    calls: list[dict] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append({"repo_id": repo_id, "revision": revision})
        if repo_id != "someone/mini":
            raise FileNotFoundError(f"404 for {repo_id}\nand a second line")
        names = {p.name: p for p in (ASSETS / "mini").iterdir()} | {
            "modeling_mini.py": Path(__file__)
        }
        target = tmp_path / "cache"
        target.mkdir(exist_ok=True)
        for name, source in names.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copyfile(source, target / name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_without_its_code(hub: list[dict], tmp_path: Path) -> None:
    denoiser = load_denoiser("someone/mini", revision="v2")
    assert hub == [{"repo_id": "someone/mini", "revision": "v2"}]
    shipped = load_denoiser(ASSETS / "mini")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(denoiser.logits(ids), shipped.logits(ids))
    names = {p.name for p in (tmp_path / "cache").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".py", ".png", ".md")) for name in names)


def test_a_tokenizer_alone_needs_no_weights(hub: list[dict], tmp_path: Path) -> None:
    assert len(load_tokenizer("someone/mini")) == 120
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_size_needs_config_json_alone(hub: list[dict], tmp_path: Path) -> None:
    assert model_size(ModelConfig(path="someone/mini")) == model_size(ModelConfig(path="mini"))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["config.json"]


def test_what_cannot_be_downloaded_is_one_line(hub: list[dict]) -> None:
    with pytest.raises(
        ValueError,
        match=r"a/b is not a folder and could not be downloaded at main \(FileNotFoundError: 404",
    ) as e:
        load_denoiser("a/b", revision="main")
    assert "\n" not in str(e.value) and "run `hf download a/b`" in str(e.value)
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_tokenizer("a/b")
    with pytest.raises(ValueError, match="could not be downloaded"):
        model_size(ModelConfig(path="a/b"))


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "/no/folder", "../x/y", "~/model", "a//b"])
def test_other_paths_never_reach_the_hub(hub: list[dict], path: str) -> None:
    with pytest.raises(ValueError, match="is not a folder, nor a hub id"):
        checkpoint_folder(path)
    assert hub == []


def test_a_misspelt_local_folder_is_no_hub_id(
    hub: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/missing is not a folder, nor a hub id"):
        load_denoiser("runs/missing")
    assert hub == []


def test_a_revision_belongs_to_a_hub_id() -> None:
    assert checkpoint_folder(DREAM) == DREAM
    with pytest.raises(ValueError, match="revision v1 belongs to a hub id"):
        load_denoiser(DREAM, revision="v1")


def test_released_models_are_known_by_name(hub: list[dict]) -> None:
    # 8.02B: LLaDA's paper; 7.62B: Qwen2.5-7B's model card
    assert model_size(ModelConfig(path="GSAI-ML/LLaDA-8B-Instruct")) == (126464, 8_015_581_184)
    assert (
        model_size(ModelConfig(path="apple/DiffuCoder-7B-cpGRPO"))
        == model_size(ModelConfig(path="Dream-org/Dream-v0-Base-7B"))
        == (152064, 7_615_616_512)
    )
    assert hub == []


def test_sizes_are_the_modules(hub: list[dict]) -> None:
    for path in (DREAM, ASSETS / "mini"):
        parameters = sum(p.numel() for p in load_denoiser(path).model.parameters())
        assert model_size(ModelConfig(path=str(path))) == (
            load_denoiser(path).vocab_size,
            parameters,
        )
