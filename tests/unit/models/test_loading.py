"""Model and tokenizer together: checkpoints, tiny random stand-ins, and where completions end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import HashDenoiser, seeded
from unmaskrl import blank_canvas, decode
from unmaskrl.core.denoiser import end_ids
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import Dream, LLaDA
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.loading import open_checkpoint, random_tiny, write_tokenizer
from unmaskrl.models.tokenizer import (
    END_OF_TURN,
    EOS,
    MASK,
    build_byte_tokenizer,
    byte_tokenizer,
    copy_tokenizer,
    decode_texts,
    encode_prompt,
    encode_reference,
    end_of_turn_ids,
    load_tokenizer,
    pieces,
)
from unmaskrl.recipes.schema import ModelConfig
from unmaskrl.training.setup import open_model

DATA = Path(__file__).parents[2] / "data"
SAYINGS = ["2 + 3 = 5", "Weiß ich nicht: naïve 你好 🚀", "tabs\tand\nlines  ", "<answer>x</answer>"]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("a download was started")
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in the layout of Dream's repository: vocab.json and merges.txt, a class that is
    remote code.
    """
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen")
    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = ["h e", "l l", "he ll", "hell o"]
    for merge in merges:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    settings = {
        "added_tokens_decoder": {
            str(len(vocabulary) + i): {"content": name, **flags} for i, name in enumerate(names)
        },
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] "
        "}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder


def dream_folder(target: Path, tokenizer: Path | None, **changes: Any) -> Path:
    """Dream's config.json and, perhaps, a tokenizer; no weights."""
    target.mkdir()
    raw = json.loads((DATA / "dream-tiny" / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | changes))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
    return target


def test_vocab_and_merges_load_without_remote_code(qwen: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    assert pieces(tokenizer, encode_reference(tokenizer, "hello 12", [])[0]) == [
        "hello",
        " ",
        "1",
        "2",
    ]
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        264,
        260,
        260,
    )
    ids = encode_prompt(tokenizer, user("hello"))
    assert [ids[0], ids[-1]] == [261, tokenizer.convert_tokens_to_ids("Ċ")]
    for text in SAYINGS:
        encoded, protected = encode_reference(tokenizer, text, [(0, 1)])
        assert decode_texts(tokenizer, [encoded]) == [text] and protected[0] and not protected[-1]
    with pytest.raises(ValueError, match="contains the mask token"):
        encode_reference(tokenizer, "<|mask|>", [])


def test_special_tokens_keep_their_ids(qwen: Path, tmp_path: Path) -> None:
    copy_tokenizer(qwen, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    del vocabulary["hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    with pytest.raises(
        ValueError, match=r"<\|endoftext\|> has id 259, tokenizer_config.json says 260; download"
    ):
        load_tokenizer(tmp_path)


def test_a_broken_vocabulary_is_one_line(qwen: Path, tmp_path: Path) -> None:
    copy_tokenizer(qwen, tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq q\n")
    with pytest.raises(ValueError, match=r"vocab\.json is no tokenizer \(") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_vocabulary_and_mask_must_be_the_models(qwen: Path, tmp_path: Path) -> None:
    fits = dream_folder(tmp_path / "fits", qwen, mask_token_id=264)
    assert load_tokenizer(fits).mask_token_id == 264
    with pytest.raises(ValueError, match="mask token has id 264, the model's is 511"):
        load_tokenizer(dream_folder(tmp_path / "mask", qwen))
    with pytest.raises(ValueError, match="has 265 tokens, the model only 250 embeddings"):
        load_tokenizer(
            dream_folder(
                tmp_path / "small",
                qwen,
                vocab_size=250,
                mask_token_id=249,
                eos_token_id=1,
                pad_token_id=1,
            )
        )


def test_the_byte_tokenizer_writes_any_text() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 262 == len(set(tokenizer.get_vocab().values()))
    for text in SAYINGS:
        encoded, protected = encode_reference(tokenizer, text, [(0, 1)])
        assert decode_texts(tokenizer, [encoded]) == [text] and len(encoded) == len(text.encode())
        assert protected[0] and not protected[-1]
    special = (MASK, EOS, END_OF_TURN)
    assert len({tokenizer.convert_tokens_to_ids(name) for name in special}) == 3
    assert pieces(tokenizer, encode_prompt(tokenizer, user("hi"))) == [
        "<|user|>",
        "h",
        "i",
        END_OF_TURN,
        "<|assistant|>",
    ]


def test_end_of_turn_is_what_the_template_writes_after_an_answer(qwen: Path) -> None:
    assert pieces(load_tokenizer(qwen), end_of_turn_ids(load_tokenizer(qwen))) == ["<|im_end|>"]
    assert pieces(byte_tokenizer(), end_of_turn_ids(byte_tokenizer())) == [END_OF_TURN]
    mini = load_tokenizer(ASSETS / "mini")
    assert end_of_turn_ids(mini) == ()
    mini.chat_template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
    assert end_of_turn_ids(mini) == ()  # EOS itself
    mini.chat_template = "{% for m in messages %}{{ m['content'] }} = {% endfor %}"
    assert end_of_turn_ids(mini) == ()  # an ordinary word
    mini.chat_template = None
    assert end_of_turn_ids(mini) == ()


def test_end_of_turn_of_a_template_that_always_opens_a_turn(qwen: Path) -> None:
    # as LLaDA's: it trims, and the last header does not depend on the flag
    tokenizer = load_tokenizer(qwen)
    tokenizer.chat_template = (
        "{% for m in messages %}{% set text = '<|im_start|>' + m['role'] + '\n\n' + m['content'] | "
        "trim + '<|im_end|>' %}"
        "{{ text }}{% endfor %}{{ '<|im_start|>assistant\n\n' }}"
    )
    assert pieces(tokenizer, end_of_turn_ids(tokenizer)) == ["<|im_end|>"]
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"
    assert end_of_turn_ids(tokenizer) == ()  # answers are not written at all


class Chatty(HashDenoiser):
    """Ends its turns with token 3 or with EOS."""

    def __init__(self) -> None:
        super().__init__(length=12, eos_bias=1.5)
        self.end_ids = (self.eos_id, 3)
        self.table[..., 3] += 1.5


@pytest.mark.parametrize("select", ["left_to_right", "max_prob"])
def test_a_completion_ends_at_the_first_end_token(select: str) -> None:
    denoiser = Chatty()
    canvas = blank_canvas([[0, 1]] * 200, gen_length=12, denoiser=denoiser)
    settings: dict[str, Any] = {
        "block_length": 4,
        "steps": 12,
        "select": select,
        "temperature": 1.0,
    }
    rollout = decode(denoiser, canvas, generator=seeded(), **settings)
    ends = {3: 0, denoiser.eos_id: 0}
    for ids, mask, steps, nfe in zip(
        rollout.ids, rollout.completion_mask, rollout.decoded_step, rollout.nfe, strict=True
    ):
        answer = ids[2:].tolist()
        kept = mask[2:].tolist()
        first = next((i for i, token in enumerate(answer) if token in ends), 11)
        assert kept == [i <= first for i in range(12)]
        never = steps[2:] > nfe
        assert (
            all(token == denoiser.eos_id for token in ids[2:][never].tolist())
            and not never[: first + 1].any()
        )
        if answer[first] in ends:
            ends[answer[first]] += 1
    assert min(ends.values()) > 20
    denoiser.end_ids = ()
    plain = decode(denoiser, canvas, generator=seeded(), **settings)
    assert any(3 in row[:-1] for row in plain.completions())
    assert not any(3 in row[:-1] for row in rollout.completions())


def test_end_ids_without_a_tokenizer_are_eos() -> None:
    denoiser = load_denoiser(DATA / "dream-tiny")
    assert end_ids(denoiser) == (denoiser.eos_id,)
    assert end_ids(HashDenoiser(length=4)) == (8,)


def test_open_checkpoint_is_the_shipped_base() -> None:
    denoiser, tokenizer, folder = open_checkpoint("mini")
    assert folder == ASSETS / "mini" and len(tokenizer) == denoiser.vocab_size == 120
    assert end_ids(denoiser) == (denoiser.eos_id,)


@pytest.mark.parametrize(
    ("hub_id", "kind", "kv_heads"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", LLaDA, 4),
        ("GSAI-ML/LLaDA-1.5", LLaDA, 4),
        ("Dream-org/Dream-v0-Instruct-7B", Dream, 1),
        ("apple/DiffuCoder-7B-cpGRPO", Dream, 1),
        ("Dream", Dream, 1),
    ],
)
def test_a_stand_in_for_a_released_model_needs_no_network(
    hub_id: str, kind: type, kv_heads: int, no_network: None
) -> None:
    denoiser, tokenizer, folder = open_model(ModelConfig(path=hub_id, random_init="tiny"), "cpu")
    assert isinstance(denoiser.model, kind) and folder is None
    assert denoiser.vocab_size == len(tokenizer) == 262
    assert (denoiser.mask_id, denoiser.eos_id, denoiser.pad_id) == (
        tokenizer.mask_token_id,
        *[tokenizer.eos_token_id] * 2,
    )
    assert end_ids(denoiser) == (denoiser.eos_id, tokenizer.convert_tokens_to_ids(END_OF_TURN))
    config: Any = denoiser.model.config
    assert (config.d_model, config.head_dim) == (64, 16)
    assert sum(p.numel() for p in denoiser.model.parameters()) < 200_000
    names = dict(denoiser.model.named_parameters())
    keys = next(p for name, p in names.items() if name.endswith("k_proj.weight"))
    assert keys.shape[0] == 16 * kv_heads
    again = open_model(ModelConfig(path=hub_id, random_init="tiny"), "cpu")[0]
    assert all(
        torch.equal(p, q) for p, q in zip(names.values(), again.model.parameters(), strict=True)
    )


def test_a_stand_in_keeps_the_settings_and_vocabulary_of_a_folder(
    qwen: Path, tmp_path: Path, no_network: None
) -> None:
    folder = dream_folder(
        tmp_path / "dream", qwen, mask_token_id=264, rope_theta=5000.0, tie_word_embeddings=True
    )
    denoiser, tokenizer, source = open_model(
        ModelConfig(path=str(folder), random_init="tiny", dtype="bfloat16"), "cpu"
    )
    config: Any = denoiser.model.config
    assert source == folder and len(tokenizer) == 265 and denoiser.vocab_size == 512
    assert (denoiser.mask_id, config.rope_theta, config.weight_tying) == (264, 5000.0, True)
    assert {p.dtype for p in denoiser.model.parameters()} == {torch.bfloat16}
    assert end_ids(denoiser) == (501, 262)


def test_a_stand_in_of_a_folder_without_a_tokenizer_has_a_small_vocabulary(tmp_path: Path) -> None:
    model = random_tiny(str(dream_folder(tmp_path / "dream", None)), seeded())
    assert ModelDenoiser.from_model(model).vocab_size == 262
    shutil.copyfile(DATA / "llada-tiny" / "config.json", tmp_path / "config.json")
    assert isinstance(random_tiny(str(tmp_path), seeded()), LLaDA)


def test_a_saved_stand_in_loads_by_itself(tmp_path: Path, no_network: None) -> None:
    from unmaskrl import save_model

    denoiser, _, folder = open_model(
        ModelConfig(path="Dream-org/Dream-v0-Base-7B", random_init="tiny"), "cpu"
    )
    write_tokenizer(folder, tmp_path)
    save_model(denoiser.model, tmp_path)
    again, tokenizer, _ = open_checkpoint(tmp_path)
    assert end_ids(again) == end_ids(denoiser) and len(tokenizer) == 262
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again.logits(ids), denoiser.logits(ids))


@pytest.mark.parametrize("path", ["someone/else", "mistral", "GSAI-ML/LLaDA-MoE-7B-A1B-Base"])
def test_an_unknown_model_has_no_stand_in(path: str, no_network: None) -> None:
    with pytest.raises(
        ValueError, match=f"{path} is neither a folder with a config.json nor a model known by name"
    ):
        random_tiny(path, seeded())


def test_building_the_byte_tokenizer_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in "ab":
        build_byte_tokenizer(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
