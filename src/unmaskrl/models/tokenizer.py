"""Text <-> ids: a transformers fast tokenizer from a folder or the hub, or one of our small
ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.files import json_text, read_json
from .families import FAMILIES, Family, FamilyConfig
from .hub import CONFIG, TOKENIZER_PATTERNS, checkpoint_folder

if TYPE_CHECKING:
    from ..core.types import Rollout

MASK = "<|mdm_mask|>"
EOS = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
UNK = "<|unk|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
END_OF_TURN = "<|eot|>"
SPECIAL = (MASK, EOS, USER, ASSISTANT, UNK)
WORDS = (
    "sudoku",
    "numbers",
    "target",
    "<answer>",
    "</answer>",
    *"+-*/()=;,",
    *map(str, range(101)),
)
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_WORD_REGEX = r"</?answer>|[A-Za-z]+|[0-9]+|\S"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ANSWER = "an answer that no template holds"
_TURNS_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_mini_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Write the small word-level tokenizer (120 tokens): tokenizer.json, tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(_WORD_REGEX), behavior="removed", invert=True
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    _write_tokenizer(backend, folder, _CHAT_TEMPLATE, {"unk_token": UNK})


def build_byte_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Write a byte-level tokenizer that can write any text (262 tokens, turns end with
    ``<|eot|>``), for dry runs.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = (MASK, EOS, END_OF_TURN, "<|system|>", USER, ASSISTANT)
    names = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    _write_tokenizer(backend, folder, _TURNS_TEMPLATE, {})


def byte_tokenizer() -> Any:
    """``build_byte_tokenizer``'s, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        build_byte_tokenizer(folder)
        return load_tokenizer(folder)


def _write_tokenizer(
    backend: Any, folder: str | os.PathLike[str], chat_template: str, unknown: dict[str, str]
) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "eos_token": EOS,
        "pad_token": EOS,
        **unknown,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 4096,
        "chat_template": chat_template,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(
        json_text(settings, indent=1) + "\n", encoding="utf-8"
    )


def load_tokenizer(
    path: str | os.PathLike[str],
    revision: str | None = None,
    family: Family | None = None,
    config: FamilyConfig | None = None,
) -> Any:
    """The transformers fast tokenizer of a folder, or of a hub id at ``revision``; no remote code.

    Without a tokenizer.json, vocab.json and merges.txt are read by the class that the model's
    family names (``family``, or by the model_type of the folder's config.json), Qwen2's if there is
    no model. If the folder holds a model's config.json, the two must agree (``check_tokenizer``);
    ``config`` is what was made of that, if something was given in its place. ValueError otherwise.
    """
    folder = checkpoint_folder(path, revision, TOKENIZER_PATTERNS)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer.json: copy the tokenizer's files from the model that it "
            "came from"
        )
    main = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.json"
    for name in (main, "tokenizer_config.json"):
        read_json(folder / name)
    model = _model_of(folder, family, config)
    try:
        tokenizer = _reader(main, folder, model).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder / main} is no tokenizer ({reason}); download it again") from None
    _check_added(tokenizer, folder)
    if model is not None:
        check_tokenizer(tokenizer, model.mask_id, model.vocab_size)
    elif tokenizer.mask_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer has no mask token; set mask_token in tokenizer_config.json"
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Model:
    """What a tokenizer must know of the model beside it."""

    mask_id: int | None
    vocab_size: int | None
    slow_tokenizer: str | None


def _model_of(folder: Path, family: Family | None, config: FamilyConfig | None) -> _Model | None:
    """From config.json as its family reads it; of a family that is not known, by the usual keys."""
    if not (folder / CONFIG).is_file():
        return None
    raw = read_json(folder / CONFIG)
    own = family or FAMILIES.get(str(raw.get("model_type")))
    if own is None:
        size = raw.get("embedding_size") or raw.get("vocab_size")
        return _Model(raw.get("mask_token_id"), size, None)
    config = config or own.config(raw, folder / CONFIG)
    return _Model(config.mask_token_id, config.embedding_size, own.slow_tokenizer)


def _reader(main: str, folder: Path, model: _Model | None) -> Any:
    # Not AutoTokenizer: its import costs half a second more, and would look for the class that
    # tokenizer_config.json names.
    import transformers

    if main == "tokenizer.json":
        return transformers.PreTrainedTokenizerFast
    name = "Qwen2TokenizerFast" if model is None else model.slow_tokenizer
    if name is None:
        raise ValueError(
            f"{folder} holds vocab.json and no tokenizer.json, and its model's family does not say "
            "how to read that; put a tokenizer.json there"
        )
    return getattr(transformers, name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the layouts that can be read."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / n).is_file() for n in ("vocab.json", "merges.txt")
    )


def _check_added(tokenizer: Any, folder: Path) -> None:
    """The special tokens have the ids that tokenizer_config.json gives them: a vocabulary cut short
    would move them.
    """
    given = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for index, entry in given.items():
        found = tokenizer.convert_tokens_to_ids(entry["content"])
        if found != int(index):
            raise ValueError(
                f"{folder}: the token {entry['content']} has id {found}, tokenizer_config.json "
                f"says {index}; "
                "download the tokenizer again"
            )


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special token that the chat template writes after an answer, if it writes one and it is
    not EOS.
    """
    if not tokenizer.chat_template:
        return ()
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": _ANSWER}]
    _, answer, rest = _apply_template(tokenizer, turns).rpartition(_ANSWER)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"][:1] if answer else []
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(i for i in ids if i in special and i != tokenizer.eos_token_id)


def check_tokenizer(tokenizer: Any, mask_id: int | None, vocab_size: int | None) -> None:
    """Refuse a tokenizer that does not fit the model; if it knows the mask id, but not its role,
    name it.

    The published LLaDA tokenizers hold ``<|mdm_mask|>`` without calling it their mask token.
    """
    if mask_id is None or vocab_size is None:
        raise ValueError("the model's config.json lacks mask_token_id or vocab_size; add it")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size} embeddings"
        )
    if tokenizer.mask_token_id is None and mask_id in tokenizer.added_tokens_decoder:
        tokenizer.mask_token = tokenizer.added_tokens_decoder[mask_id].content
    if tokenizer.mask_token_id != mask_id:
        raise ValueError(
            f"the tokenizer's mask token has id {tokenizer.mask_token_id}, the model's is "
            f"{mask_id}; "
            "set mask_token in tokenizer_config.json"
        )


def copy_tokenizer(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy the tokenizer files of ``source`` (as they are), so that ``folder`` can be loaded by
    itself.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        file = Path(source) / name
        if file.is_file() and file.resolve() != (target / name).resolve():
            shutil.copyfile(file, target / name)


def encode_prompt(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """Ids of a chat up to where the answer starts; ValueError on unknown words and on the mask
    token. ``messages`` have a role and a content each; a task of the user's own may give others.

    A last message of the assistant is the beginning of the answer: a prefill, in the prompt.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; add chat_template to tokenizer_config.json"
        )
    chat = [isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages]
    if not chat or not all(chat):
        raise ValueError(
            f"a prompt is {str(messages)[:60]!r}; expected chat messages, a list of "
            '{"role": ..., "content": ...}'
        )
    prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    asked = list(messages[:-1] if prefill else messages)
    text = _apply_template(tokenizer, asked, add_generation_prompt=True) + prefill
    ids, _ = _encode(tokenizer, text)
    return ids


def _apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    """The chat as the template writes it; ValueError if it cannot be read or refuses these
    roles.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # jinja2's own, and whatever the template raises
        roles = ", ".join(m["role"] for m in messages)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the tokenizer's chat template fails on messages of {roles} ({reason}); correct "
            "chat_template in "
            "tokenizer_config.json (or chat_template.jinja), or leave out messages that it does "
            "not take"
        ) from None


def encode_reference(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Ids of a completion, and which of them overlap one of the character ``spans`` (start,
    end).
    """
    ids, offsets = _encode(tokenizer, text)
    return ids, [any(a < end and start < b for start, end in spans) for a, b in offsets]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows, encoded as one text; blanks at the seam, and an id
    across it, go to the second.
    """
    ids, offsets = _encode(tokenizer, context + continuation)
    seam = sum(end <= len(context.rstrip()) for _, end in offsets)
    return ids[:seam], ids[seam:]


def protected_tokens(
    tokenizer: Any, ids: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """Which of the ids overlap one of the character ``spans`` (start, end) of their text,
    ``decode_texts``' own.
    """
    return [
        any(a < end and start < b for start, end in spans) for a, b in token_spans(tokenizer, ids)
    ]


def token_spans(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Characters (start, end) of the ids' text that each id has a part in; found by decoding, never
    by encoding again.

    The text of the first i ids tells what they settle; an id whose bytes begin or continue a
    character that a later id completes has a part in that character. In doubt a span is too large.
    """
    prefixes = decode_texts(tokenizer, [list(ids[:i]) for i in range(len(ids) + 1)])
    text = prefixes[-1]
    settled = [_common_prefix(prefix, text) for prefix in prefixes]
    for i in range(len(ids) - 1, -1, -1):  # a later id may still change what seemed settled
        settled[i] = min(settled[i], settled[i + 1])
    spans = []
    for i, alone in enumerate(pieces(tokenizer, ids)):
        start = settled[i]
        end = settled[i + 1]
        if end < len(text) and len(prefixes[i + 1]) > end:
            end += 1  # a character begun, not complete
        if text[start:end] == f" {alone}":
            start += 1  # the blank that joins words is no id's
        elif text[start - 1 : start] == _BROKEN:
            start -= 1  # bytes that are no character: which ids they came from is not known
        spans.append((start, end))
    return spans


def _common_prefix(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def decode_texts(
    tokenizer: Any, ids: Sequence[Sequence[int]], *, special: bool = False
) -> list[str]:
    """Texts without special tokens, or with them."""
    if not ids:
        return []  # transformers says [""]
    return tokenizer.batch_decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id reads like, special tokens included (for display)."""
    return (
        tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        if ids
        else []
    )


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"]
    unknown_id = tokenizer.unk_token_id  # looked up by name each time it is asked for
    unknown = {text[a:b] for i, (a, b) in zip(ids, offsets, strict=True) if i == unknown_id}
    # some tokenizers call their end-of-text token the unknown token
    unknown -= {tokenizer.unk_token}
    if unknown:
        words = ", ".join(map(repr, sorted(unknown)))
        raise ValueError(
            f"the tokenizer does not know {words} in {text[:80]!r}; use words of its vocabulary"
        )
    if tokenizer.mask_token_id in ids:
        raise ValueError(
            f"the text contains the mask token {tokenizer.mask_token}: {text[:80]!r}; remove it"
        )
    return ids, offsets


def sample_row(
    rollout: Rollout,
    index: int,
    tokenizer: Any,
    *,
    step: int,
    split: str,
    example_id: str,
    prompt_text: str,
    completion_text: str,
    reward: float,
    correct: bool,
    parts: dict[str, float | None] | None = None,
    gold: str | None = None,
) -> dict[str, Any]:
    """The ``samples.jsonl`` row of ``rollout``'s row ``index``: its completion tokens, log-probs in
    nats; the ``parts`` of its reward and the ``gold`` answer, where they are known.
    """
    columns = rollout.asked
    decoded_step = rollout.decoded_step[index, columns]
    anchor = rollout.anchor_mask[index, columns].tolist()
    return {
        "step": step,
        "split": split,
        "id": example_id,
        "prompt": prompt_text,
        "completion": completion_text,
        "reward": float(reward),
        "correct": bool(correct),
        "parts": parts or {},
        "gold": gold,
        "anchored": any(anchor),
        "nfe": int(rollout.nfe[index]),
        "temperature": float(rollout.temperature),
        "pieces": pieces(tokenizer, rollout.ids[index, columns].tolist()),
        "decoded_step": decoded_step.tolist(),
        "anchor": anchor,
        "exit": rollout.exited[index, columns].tolist(),
        "logps": [round(value, 5) for value in rollout.behavior_logps[index, columns].tolist()],
    }
