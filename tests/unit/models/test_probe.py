"""The smoke probe: good models pass, shifted ones are refused, models at chance are named, and
nothing else is disturbed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import HashDenoiser, RecordingHead, seeded
from unmaskrl import tasks
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import LLaDA
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.loading import open_checkpoint, random_tiny
from unmaskrl.models.probe import Probe, check_probe, masked_accuracy
from unmaskrl.models.tokenizer import encode_prompt, encode_reference

GOOD = Probe(
    share=0.5, chance=0.1, share_shifted_left=0.05, share_shifted_right=0.05, num_tokens=200
)


class Shifted(RecordingHead):
    """Row l is about position l + by."""

    def __init__(self, denoiser: Denoiser, by: int) -> None:
        super().__init__(denoiser)
        self.by = by

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner.hidden(ids, attention_mask).roll(-self.by, 1)


def texts_of(task_name: str, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    task = tasks.load(task_name)
    known = [(e, task.reference(e)) for e in task.examples("train")[:32]]
    prompts = [encode_prompt(tokenizer, task.prompt(e)) for e, text in known if text is not None]
    return prompts, [
        encode_reference(tokenizer, text, [])[0] for _, text in known if text is not None
    ]


@pytest.fixture(scope="module", params=["sudoku", "countdown"])
def mini(request: pytest.FixtureRequest) -> tuple[ModelDenoiser, list[list[int]], list[list[int]]]:
    denoiser, tokenizer, _ = open_checkpoint("mini")
    return denoiser, *texts_of(request.param, tokenizer)


def test_the_shipped_base_passes(mini: tuple) -> None:
    probe = masked_accuracy(*mini, seeded())
    assert probe.share > probe.chance + 0.2
    assert probe.num_tokens > 100
    assert check_probe(probe) is None


@pytest.mark.parametrize(("by", "place"), [(1, "before"), (-1, "after")])
def test_shifted_logits_are_refused(mini: tuple, by: int, place: str) -> None:
    denoiser, prompts, references = mini
    straight = masked_accuracy(denoiser, prompts, references, seeded())
    probe = masked_accuracy(Shifted(denoiser, by), prompts, references, seeded())
    shifted = probe.share_shifted_left if by == 1 else probe.share_shifted_right
    assert shifted == straight.share
    with pytest.raises(
        ValueError, match=f"logits look shifted by one \\({shifted:.2f} one row {place}\\); check"
    ) as caught:
        check_probe(probe)
    assert "\n" not in str(caught.value)


def test_a_wrong_mask_id_is_named() -> None:
    denoiser, tokenizer, _ = open_checkpoint("mini")
    wrong = replace(denoiser, mask_id=tokenizer.convert_tokens_to_ids("77"))
    note = check_probe(masked_accuracy(wrong, *texts_of("countdown", tokenizer), seeded()))
    assert (
        note is not None
        and "does not know the task's text better than chance; check mask id and tokenizer" in note
    )


def test_a_random_model_is_named_and_not_refused() -> None:
    _, tokenizer, _ = open_checkpoint("mini")
    denoiser = ModelDenoiser.from_model(random_tiny(str(ASSETS / "mini"), seeded(1)))
    assert isinstance(denoiser.model, LLaDA) and denoiser.vocab_size == 120
    for task in ("sudoku", "countdown"):
        note = check_probe(masked_accuracy(denoiser, *texts_of(task, tokenizer), seeded()))
        assert note is not None and note.startswith("masked-token accuracy 0.")


def test_a_row_that_repeats_the_token_it_sees_does_not_look_shifted() -> None:
    class Echo(HashDenoiser):
        def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return torch.nn.functional.one_hot(ids, self.vocab_size).double()

    # a masked row says 0
    texts = [[1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 1, 2, 1, 3, 3, 4, 4, 4]] * 40
    probe = masked_accuracy(Echo(length=4), texts, [[]] * 40, seeded())
    assert probe.share_shifted_left == probe.share_shifted_right == 0.0
    assert probe.num_tokens > 20


def test_shares_by_hand() -> None:
    class Knows(HashDenoiser):
        """Position l of every row holds l % 5; the model is right at even positions."""

        def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            columns = torch.arange(ids.shape[1])
            guess = torch.where(columns % 2 == 0, columns % 5, 6).expand(ids.shape)
            return torch.nn.functional.one_hot(guess, self.vocab_size).double()

    texts = [[i % 5 for i in range(20)]] * 300
    probe = masked_accuracy(
        Knows(length=4), [t[:9] for t in texts], [t[9:] for t in texts], seeded()
    )
    # the ends have one neighbour only
    assert probe.num_tokens == pytest.approx(0.3 * 18 * 300, rel=0.08)
    assert probe.share == pytest.approx(0.5, abs=0.05)
    assert probe.share_shifted_left == probe.share_shifted_right == 0.0
    assert probe.chance == pytest.approx(4 / 18, abs=0.03)  # 1, 2 and 3 stand four times inside


def test_the_mask_token_is_never_an_answer() -> None:
    biased, plain = (HashDenoiser(length=12, mask_bias=bias) for bias in (1e6, 0.0))
    texts = (
        [[(7 * i + j) % 6 for j in range(6)] for i in range(30)],
        [[(i + 5 * j) % 6 for j in range(12)] for i in range(30)],
    )
    assert masked_accuracy(biased, *texts, seeded()) == masked_accuracy(plain, *texts, seeded())
    assert biased.rows == [30]


def test_shorter_texts_are_padded_on_the_left_and_pads_are_not_masked() -> None:
    denoiser, tokenizer, _ = open_checkpoint("mini")
    prompts, references = (
        a + b
        for a, b in zip(*(texts_of(t, tokenizer) for t in ("sudoku", "countdown")), strict=True)
    )
    assert len({len(p) + len(r) for p, r in zip(prompts, references, strict=True)}) > 1
    seen: list[Tensor] = []

    class Watched(RecordingHead):
        def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            assert not ((ids == denoiser.mask_id) & ~attention_mask).any()
            seen.append(attention_mask.sum(-1))
            return self.inner.hidden(ids, attention_mask)

    masked_accuracy(Watched(denoiser), prompts, references, seeded())
    assert seen[0].tolist() == [len(p) + len(r) for p, r in zip(prompts, references, strict=True)]


def test_nothing_to_compare_says_nothing() -> None:
    probe = masked_accuracy(HashDenoiser(length=4), [[1, 2, 1]], [[3]], seeded(4))
    assert check_probe(probe) is None and probe.num_tokens <= 2
    empty = masked_accuracy(HashDenoiser(length=4), [], [], seeded())
    assert empty == Probe(
        share=0.0, chance=0.0, share_shifted_left=0.0, share_shifted_right=0.0, num_tokens=0
    )


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "passes"),
        ({"share_shifted_left": 0.9}, "passes"),  # better than chance at its own row
        ({"share": 0.1}, "warns"),
        # within three standard errors of chance
        ({"share": 0.05, "share_shifted_left": 0.14}, "warns"),
        ({"share": 0.05, "share_shifted_left": 0.2}, "refused"),
        ({"share": 0.05, "share_shifted_right": 0.2}, "refused"),
        ({"share": 0.0, "share_shifted_right": 0.9, "num_tokens": 19}, "passes"),  # too few to say
    ],
)
def test_verdicts(change: dict, verdict: str) -> None:
    probe = replace(GOOD, **change)
    if verdict == "refused":
        with pytest.raises(ValueError, match="shifted by one"):
            check_probe(probe)
    else:
        assert (check_probe(probe) is None) == (verdict == "passes")
