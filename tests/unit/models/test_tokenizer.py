"""The small tokenizer, and what is refused."""

import json
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from unmaskrl.models.tokenizer import (
    EOS,
    MASK,
    UNK,
    build_mini_tokenizer,
    check_tokenizer,
    copy_tokenizer,
    decode_texts,
    encode_pair,
    encode_prompt,
    encode_reference,
    load_tokenizer,
    pieces,
    protected_tokens,
    token_spans,
)

DATA = Path(__file__).parents[2] / "data" / "llada-tiny"
# GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256
# on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ODD = [b for b in range(256) if b not in _PLAIN]
BYTES = {chr(b): bytes([b]) for b in _PLAIN} | {
    chr(256 + n): bytes([b]) for n, b in enumerate(_ODD)
}
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
    words = [
        "sudoku",
        "numbers",
        "target",
        "<answer>",
        "</answer>",
        *"+-*/()=;,",
        *map(str, range(101)),
    ]
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
    assert pieces(tokenizer, ids) == [
        "<|user|>",
        "numbers",
        "3",
        "7",
        "12",
        "target",
        "33",
        "<|assistant|>",
    ]


def test_protected_flags_follow_the_spans(tokenizer: Any) -> None:
    start = TEXT.index("<answer>") + len("<answer>")
    end = TEXT.index("</answer>")
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", "holds no tokenizer.json: copy the tokenizer's files"),
        ("tokenizer_config.json", "does not exist"),
    ],
)
def test_missing_files(copy: Path, name: str, said: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ValueError, match=said) as caught:
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


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A byte-level BPE with few merges: a character that is not ASCII takes a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["<answer> 12 </answer> and more"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def characters(data: bytes) -> list[tuple[int, int]]:
    """The bytes (start, end) of every character of data.decode(errors="replace")."""
    spans = []
    at = 0
    while at < len(data):
        for size in (1, 2, 3, 4):
            try:
                data[at : at + size].decode()
            except UnicodeDecodeError as error:
                end = error.end
                continue
            end = size
            break
        spans.append((at, at + end))
        at += end
    return spans


@pytest.mark.parametrize(
    "text", [TEXT, "x <answer> 12 </answer>\n", "\u6f22 <answer>\u00e9\u5b57</answer> \U0001f600!"]
)
def test_spans_of_kept_ids_are_those_of_encoding_where_both_exist(
    text: str, byte_level: Any
) -> None:
    encoded = byte_level(text, return_offsets_mapping=True)
    assert token_spans(byte_level, encoded["input_ids"]) == encoded["offset_mapping"]


def test_every_token_with_a_byte_in_the_span_is_protected(byte_level: Any) -> None:
    """Random tokens, broken characters included, against bytes counted by hand."""
    pieces_of = {i: byte_level.backend_tokenizer.id_to_token(i) for i in range(len(byte_level))}
    # one letter of the piece stands for one byte
    size_of = {i: len(piece) for i, piece in pieces_of.items()}
    some = byte_level("\u6f22\u00e9\U0001f600 <answer> 12</answer>")["input_ids"]
    generator = random.Random(3)
    broken = 0
    for _ in range(300):
        ids = [generator.choice(some) for _ in range(12)]
        text = decode_texts(byte_level, [ids])[0]
        data = b"".join(BYTES[letter] for i in ids for letter in pieces_of[i])
        assert data.decode(errors="replace") == text
        starts = [sum(size_of[i] for i in ids[:n]) for n in range(len(ids) + 1)]
        where = characters(data)
        assert len(where) == len(text)
        broken += "\ufffd" in text
        for n, (a, b) in enumerate(token_spans(byte_level, ids)):
            own = [c for c, (x, y) in enumerate(where) if x < starts[n + 1] and starts[n] < y]
            assert a <= own[0] and own[-1] < b, (ids, n)
    assert broken > 200


def test_kept_ids_are_not_encoded_again(byte_level: Any) -> None:
    """Ids that encoding would never give: the answer in single bytes."""
    ids = [i for letter in "<answer>12</answer>!" for i in byte_level(letter)["input_ids"]]
    text = decode_texts(byte_level, [ids])[0]
    assert len(ids) == len(text) > len(byte_level(text)["input_ids"])
    assert protected_tokens(byte_level, ids, [(8, 10)]) == [8 <= i < 10 for i in range(len(ids))]


def test_protected_words_are_those_of_encoding(tokenizer: Any) -> None:
    """The blank that joins two words belongs to neither."""
    span = [(TEXT.index("<answer>") + 8, TEXT.index("</answer>"))]
    ids, wanted = encode_reference(tokenizer, TEXT, span)
    assert protected_tokens(tokenizer, ids, span) == wanted and 0 < sum(wanted) < len(ids)
    assert (
        protected_tokens(tokenizer, [], [])
        == pieces(tokenizer, [])
        == decode_texts(tokenizer, [])
        == []
    )


def test_a_pair_is_encoded_as_one_text(tokenizer: Any, byte_level: Any) -> None:
    context, answer = encode_pair(tokenizer, "3 * 7 =", " 21 ; 5")
    assert (pieces(tokenizer, context), pieces(tokenizer, answer)) == (
        ["3", "*", "7", "="],
        ["21", ";", "5"],
    )
    assert encode_pair(tokenizer, "3 * 7 = ", "21 ; 5") == (context, answer)
    assert encode_pair(tokenizer, "", "3") == ([], encode_reference(tokenizer, "3", [])[0])
    # a token across the seam is scored
    for before, after in (("a", " 12"), ("a ", "12"), ("<an", "swer> 12")):
        first, second = encode_pair(byte_level, before, after)
        assert first + second == byte_level(before + after)["input_ids"]
        assert "".join(pieces(byte_level, first)) == before[0]


@pytest.mark.parametrize("prompt", ["3 + 4", [], ["3 + 4"], [{"content": "3 + 4"}]])
def test_a_prompt_that_is_no_chat_is_one_line(prompt: Any, tmp_path: Path) -> None:
    build_mini_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected chat messages"):
        encode_prompt(load_tokenizer(tmp_path), prompt)
