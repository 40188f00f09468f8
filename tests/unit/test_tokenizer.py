"""The small tokenizer, and what is refused."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from unmaskrl.tokenizer import (
    EOS,
    MASK,
    UNK,
    build_mini_tokenizer,
    check_tokenizer,
    copy_tokenizer,
    decode_texts,
    encode_prompt,
    encode_reference,
    load_tokenizer,
    pieces,
)

DATA = Path(__file__).parents[1] / "data" / "llada-tiny"
TEXT = "3 * 7 = 21 ; <answer> ( 3 * 7 ) + 12 </answer>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("mini")
    build_mini_tokenizer(target)
    return target


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def write_config(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    copy_tokenizer(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_one_id_per_word_and_back(tokenizer: Any) -> None:
    ids, _ = encode_reference(tokenizer, TEXT, [])
    assert len(ids) == len(TEXT.split())
    assert pieces(tokenizer, ids) == TEXT.split()
    assert decode_texts(tokenizer, [ids, ids[:3], []]) == [TEXT, "3 * 7", ""]


def test_blanks_do_not_matter(tokenizer: Any) -> None:
    tight = encode_reference(tokenizer, "3*7=21;<answer>(3*7)+12</answer>", [])[0]
    assert tight == encode_reference(tokenizer, f"  {TEXT.replace(' ', '  ')}\n", [])[0]
    assert tight == encode_reference(tokenizer, TEXT, [])[0]


def test_every_word_is_one_token(tokenizer: Any) -> None:
    words = ["sudoku", "numbers", "target", "<answer>", "</answer>", *"+-*/()=;,", *map(str, range(101))]
    ids, _ = encode_reference(tokenizer, " ".join(words), [])
    assert len(set(ids)) == len(words) == len(ids)
    assert decode_texts(tokenizer, [ids]) == [" ".join(words)]
    assert len(tokenizer) == len(words) + 5


def test_special_ids(tokenizer: Any) -> None:
    assert tokenizer.mask_token == MASK and tokenizer.unk_token == UNK
    assert tokenizer.eos_token_id == tokenizer.pad_token_id != tokenizer.mask_token_id


def test_decode_skips_special_tokens_only(tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, user("numbers 3 7 target 21"))
    ids = [
        *prompt,
        *encode_reference(tokenizer, TEXT, [])[0],
        tokenizer.eos_token_id,
        tokenizer.mask_token_id,
    ]
    assert decode_texts(tokenizer, [ids]) == ["numbers 3 7 target 21 " + TEXT]
    assert pieces(tokenizer, ids)[-2:] == [EOS, MASK]


def test_the_chat_template(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, user("numbers 3 7 12 target 33"))
    assert pieces(tokenizer, ids) == ["<|user|>", "numbers", "3", "7", "12", "target", "33", "<|assistant|>"]


def test_protected_flags_follow_the_spans(tokenizer: Any) -> None:
    start, end = TEXT.index("<answer>") + len("<answer>"), TEXT.index("</answer>")
    ids, protected = encode_reference(tokenizer, TEXT, [(start, end)])
    inside = [piece for piece, flag in zip(pieces(tokenizer, ids), protected, strict=True) if flag]
    assert inside == ["(", "3", "*", "7", ")", "+", "12"]
    assert not any(encode_reference(tokenizer, TEXT, [])[1])
    both = encode_reference(tokenizer, TEXT, [(0, 1), (start, end)])[1]
    assert both == [True, *protected[1:]]


def test_a_span_inside_a_word_protects_the_word(tokenizer: Any) -> None:
    _, protected = encode_reference(tokenizer, "7 = 21", [(5, 6)])
    assert protected == [False, False, True]
    assert encode_reference(tokenizer, "7 = 21", [(1, 2)])[1] == [False, False, False]


@pytest.mark.parametrize("word", ["101", "007", "hello", "Target", "<answers>", "3.5"])
def test_unknown_words_are_refused(tokenizer: Any, word: str) -> None:
    with pytest.raises(ValueError, match="does not know") as caught:
        encode_prompt(tokenizer, user(f"numbers {word} target 3"))
    assert "\n" not in str(caught.value)


def test_unknown_words_are_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="does not know '101', 'foo' in"):
        encode_prompt(tokenizer, user("numbers 101 foo 101"))
    with pytest.raises(ValueError, match="does not know '999' in '999 = 9'"):
        encode_reference(tokenizer, "999 = 9", [])


def test_the_mask_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="contains the mask token"):
        encode_prompt(tokenizer, user(f"numbers {MASK} 3"))
    with pytest.raises(ValueError, match="contains the mask token"):
        encode_reference(tokenizer, MASK, [])


def test_no_chat_template(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(load_tokenizer(copy), user("3"))


def test_loading_needs_no_network(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_tokenizer(copy)) == 120


def test_a_saved_and_reloaded_tokenizer_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert encode_prompt(again, user("target 3")) == encode_prompt(tokenizer, user("target 3"))
    assert decode_texts(again, [encode_reference(again, TEXT, [])[0]]) == [TEXT]


def test_copying_onto_itself_keeps_the_files(copy: Path) -> None:
    copy_tokenizer(copy, copy)
    assert len(load_tokenizer(copy)) == 120


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_files(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_broken_tokenizer_file(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_not_a_folder() -> None:
    with pytest.raises(ValueError, match="no-such-folder is not a folder, nor a hub id"):
        load_tokenizer("no-such-folder")


def test_mask_id_must_be_the_models(copy: Path) -> None:
    write_config(copy, mask_token_id=7, vocab_size=120)
    with pytest.raises(ValueError, match="mask token has id 0, the model's is 7"):
        load_tokenizer(copy)


def test_tokenizer_larger_than_the_model(copy: Path) -> None:
    write_config(copy, mask_token_id=0, vocab_size=119)
    with pytest.raises(ValueError, match="has 120 tokens, the model only 119 embeddings"):
        load_tokenizer(copy)
    write_config(copy, mask_token_id=0, vocab_size=119, embedding_size=128)
    assert len(load_tokenizer(copy)) == 120


def drop_mask_role(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_mask_token_without_its_role_is_named(copy: Path) -> None:
    # As published: LLaDA's tokenizer holds <|mdm_mask|>; only the model's config says what it is.
    drop_mask_role(copy)
    write_config(copy, mask_token_id=0, vocab_size=120)
    loaded = load_tokenizer(copy)
    assert loaded.mask_token == MASK and loaded.mask_token_id == 0
    with pytest.raises(ValueError, match="contains the mask token"):
        encode_prompt(loaded, user(MASK))


def test_no_mask_token(copy: Path) -> None:
    drop_mask_role(copy)
    with pytest.raises(ValueError, match="no mask token; set mask_token"):
        load_tokenizer(copy)


def test_an_ordinary_word_does_not_become_the_mask(copy: Path) -> None:
    drop_mask_role(copy)
    write_config(copy, mask_token_id=50, vocab_size=120)
    with pytest.raises(ValueError, match="mask token has id None, the model's is 50"):
        load_tokenizer(copy)


def test_a_model_config_without_mask_id(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="lacks mask_token_id or vocab_size"):
        check_tokenizer(tokenizer, None, 120)


def test_a_larger_model_is_fine(copy: Path) -> None:
    shutil.copyfile(DATA / "config.json", copy / "config.json")
    write_config(copy, **json.loads((copy / "config.json").read_text()) | {"mask_token_id": 0})
    assert len(load_tokenizer(copy)) == 120
