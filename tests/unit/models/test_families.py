"""The families: the shipped ones and one from outside pass the checker, and mistakes fail it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import own_family
from tests.conftest import seeded, tiny_llada
from tests.unit.models.block_models import small
from unmaskrl.core.block_causal import block_positions
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import FAMILIES, named_family, parse_config
from unmaskrl.testing import check_denoiser, check_family

bag_family = own_family.family
OUTSIDE = f"{Path(own_family.__file__)}:family"


@pytest.mark.parametrize("name", [*FAMILIES, OUTSIDE], ids=[*FAMILIES, "outside"])
def test_families_pass_the_checker(name: str) -> None:
    family = named_family(name)
    assert family is not None
    check_family(family)


def test_denoisers_pass_the_checker() -> None:
    check_denoiser(tiny_llada())
    check_denoiser(tiny_llada(torch.bfloat16))
    check_denoiser(ToyDenoiser.random(seeded(), num_tokens=3, length=4))


def causal(ids: Tensor, mask: Tensor | None) -> Tensor:
    seen = torch.ones_like(ids) if mask is None else mask
    return (torch.nn.functional.one_hot(ids, 16) * seen[..., None]).double().cumsum(1)


def edited(edit: Callable[[Any, Tensor, Tensor | None], Tensor]) -> ModelDenoiser:
    """A LLaDA whose ``hidden`` is edited."""

    class Edited(ModelDenoiser):
        def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return edit(super().hidden, ids, attention_mask)

    return Edited.of(tiny_llada())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda hidden, ids, mask: hidden(ids, None), "3 left pads .* change what stands behind"),
        (lambda hidden, ids, mask: hidden(ids, mask).mean(0, keepdim=True).expand(len(ids), -1, -1),
         "row 0 alone is not what it is in a batch"),
        (lambda hidden, ids, mask: hidden(ids, mask) + torch.rand(()), "other hidden states"),
        (lambda hidden, ids, mask: hidden(ids, mask)[:, :-1], r"expected \(B, L, D\)"),
        (lambda hidden, ids, mask: hidden(ids.zero_(), mask), "wrote to the ids"),
        (lambda hidden, ids, mask: causal(ids, mask),
         "the attention is causal"),
    ],
)  # fmt: skip
def test_the_denoiser_checker_finds_mistakes(edit: Any, said: str) -> None:
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=said):
        check_denoiser(edited(edit))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"eos_id": 16}, "eos_id 16 is not in 0..15"),
        ({"pad_id": 11}, "pad_id is the mask token 11"),
    ],
)
def test_the_denoiser_checker_finds_wrong_ids(ids: dict[str, int], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_denoiser(replace(tiny_llada(), **ids))


class EditedBlocks(ModelDenoiser):
    """An SDAR that goes wrong in one way."""

    def __init__(self, edit: str) -> None:
        den = small("sdar")
        super().__init__(**{f.name: getattr(den, f.name) for f in fields(ModelDenoiser)})
        object.__setattr__(self, "edit", edit)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.edit != "full":
            return super().hidden(ids, attention_mask)
        seen = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
        visible = seen[:, None].expand(-1, ids.shape[1], -1)
        return super().hidden_under(ids, block_positions(seen), visible)

    def hidden_under(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: Any = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        if self.edit == "columns" and cache is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        if self.edit != "first" or cache is None or columns is None:
            return super().hidden_under(ids, positions, visible, cache, columns)
        tensors = (*cache.keys, *cache.values)
        kept = [t.clone() for t in tensors]
        hidden = super().hidden_under(ids, positions, visible, cache, columns)
        if kept[0][0, 0, int(columns[0, 0])].any():  # what the first call wrote stays
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)
        return hidden


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("full", "the token at position 4 changes what is said about a block before"),
        ("columns", "hidden_under goes by columns"),
        ("first", "block 1 behind a cache is not what it is without one"),
    ],
)
def test_the_denoiser_checker_finds_mistakes_of_blocks(edit: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_denoiser(EditedBlocks(edit))


@pytest.mark.parametrize("block", [1, 3, 40])
def test_denoisers_with_blocks_pass_the_checker(block: int) -> None:
    check_denoiser(small("sdar", block, max_sequence_length=200))
    check_denoiser(small("sdar", block, dtype=torch.bfloat16, max_sequence_length=200))


def test_the_family_checker_finds_mistakes() -> None:
    bag = bag_family()
    with pytest.raises(AssertionError, match="there is no config to check"):
        check_family(replace(bag, released=None))
    with pytest.raises(AssertionError, match="to_dict writes model_type 'bag', the family is 'x'"):
        check_family(replace(bag, model_type="x"))
    with pytest.raises(AssertionError, match=r"\['w'\] are no roles"):
        check_family(replace(bag, linears={"q": "w"}))
    with pytest.raises(AssertionError, match=r"linears names .'q_proj'., the blocks have"):
        check_family(replace(FAMILIES["llada"], linears={"q_proj": "q"}))


def test_blocks_are_stated_or_the_longest_list() -> None:
    for family, count in ((FAMILIES["llada"], 32), (FAMILIES["Dream"], 28), (bag_family(), 1)):
        assert len(family.build(family.read(dict(family.released or {}))).blocks) == count


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lada", "model.family: unknown 'lada'; did you mean 'llada'"),
        ("nowhere:family", "model.family: cannot import 'nowhere:family'"),
        (f"{Path(own_family.__file__)}:not_a_family", "returns a str; expected an unmaskrl.Family"),
    ],
)  # fmt: skip
def test_what_is_no_family_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        named_family(name)
    assert "\n" not in str(caught.value)


def test_a_family_reads_its_own_model_type_only() -> None:
    bag = bag_family()
    with pytest.raises(
        ValueError, match=r"here has model_type 'llada', and this family reads 'bag'"
    ):
        parse_config({"model_type": "llada"}, "here", bag)
    with pytest.raises(ValueError, match=r"'bag'; shipped families: llada, Dream, sdar, "):
        parse_config(dict(bag.released or {}), "here")
