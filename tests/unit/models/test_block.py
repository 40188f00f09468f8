"""Block-causal families: what a token sees, left pads, the cache, and the fixtures of the reference
code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import same_maths, seeded
from tests.unit.models.block_models import (
    FAMILIES,
    decode_greedily,
    left_mask,
    random_ids,
    small,
    small_model,
)
from unmaskrl.core.block_causal import block_positions, block_visible
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.families import MaskPredictor
from unmaskrl.models.families.block import added_to_scores

ROOT = Path(__file__).parents[3]
FIXTURES = [
    pytest.param(
        folder,
        marks=pytest.mark.skipif(not folder.is_dir(), reason=f"{folder} is not here"),
        id=f"{folder.parent.name}-{folder.name}",
    )
    for folder in (
        ROOT / "tests" / "data" / "sdar-tiny",
        *(ROOT.parent / "shared" / "parity" / n for n in ("sdar-moe-tiny", "llada2-tiny")),
    )
]


def fixture(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The denoiser; LLaDA2's config.json lacks mask, EOS and block."""
    lacks = "llada2" in folder.name
    given = {"mask_id": 509, "eos_id": 503, "block_length": 8} if lacks else {}
    return load_denoiser(folder, dtype=dtype, **given)


@pytest.mark.parametrize("folder", FIXTURES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 2e-5), (torch.float32, 5e-5)])
def test_logits_are_the_references(folder: Path, dtype: torch.dtype, limit: float) -> None:
    """The references are float32: in float64 their own rounding is what is left."""
    expected = load_file(folder / "expected.safetensors")
    den = fixture(folder, dtype)
    mask = expected["attention_mask"]
    assert mask.sum(-1).tolist() == [24, 19, 13] and bool(mask[:, -1].all())
    with torch.no_grad():
        logits = den.logits(expected["input_ids"], mask).float()
    if "columns" in expected:
        sums = expected["logits_logsumexp"]
        assert same_maths(logits.logsumexp(-1)[mask], sums[mask])
        logits = logits[..., expected["columns"]]
    assert (logits - expected["logits"])[mask].abs().max() <= limit
    assert expected["logits"][mask].abs().max() > 3


@pytest.mark.parametrize("folder", FIXTURES)
def test_greedy_decodings_are_the_references(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    if "prompt0" not in expected:
        pytest.skip("this fixture holds no decodings")
    den = fixture(folder)
    for i in range(4):
        want = expected[f"completion{i}"]
        got, logps = decode_greedily(den, expected[f"prompt{i}"], len(want), cached=True)
        assert got.tolist() == want.tolist()
        assert (logps - expected[f"logps{i}"]).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_wherever_the_prompt_ends(family: str) -> None:
    den = small(family)
    for prompt_length in (1, 4, 5, 6, 7):
        prompt = random_ids(1, prompt_length, prompt_length)[0]
        a, logps = decode_greedily(den, prompt, 9, cached=False)
        b, kept = decode_greedily(den, prompt, 9, cached=True)
        assert a.tolist() == b.tolist()
        assert same_maths(kept, logps, size=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_clean_pass_other_log_probs_come_out(family: str) -> None:
    den = small(family)
    prompt = random_ids(1, 6)[0]
    _, logps = decode_greedily(den, prompt, 10, cached=False)
    _, stale = decode_greedily(den, prompt, 10, cached=True, clean=False)
    assert same_maths(stale[:2], logps[:2], size=10)  # the prompt's last block
    assert (stale - logps).abs().max() > 1e-2


def test_positions_and_sight_by_counting() -> None:
    mask = left_mask([0, 3, 7, 8], 8)
    positions = block_positions(mask)
    visible = block_visible(positions // 3, positions // 3, mask)
    for row, pads in enumerate((0, 3, 7, 8)):
        for t in range(8):
            assert positions[row, t] == max(0, t - pads)
            for s in range(8):
                sees = s >= pads and (s - pads) // 3 <= max(0, t - pads) // 3
                assert bool(visible[row, t, s]) == sees


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_is_the_row_behind_pads_in_a_batch(family: str) -> None:
    den = small(family)
    ids = random_ids(4, 13)
    pads = [0, 5, 2, 12]
    with torch.no_grad():
        together = den.hidden(ids, left_mask(pads, 13))
        for row, skipped in enumerate(pads):
            alone = den.hidden(ids[row : row + 1, skipped:])
            assert same_maths(together[row : row + 1, skipped:], alone)
        other = ids.where(left_mask(pads, 13), 7)
        behind = den.hidden(other, left_mask(pads, 13))
    seen = left_mask(pads, 13)
    assert same_maths(behind[seen], together[seen])


@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_are_not_seen_and_the_own_block_is(family: str) -> None:
    den = small(family)
    ids = random_ids(1, 12)
    with torch.no_grad():
        before = den.hidden(ids)
        for changed in (3, 7, 9):
            edited = ids.clone()
            edited[0, changed] = (ids[0, changed] + 1) % 28
            after = den.hidden(edited)
            edge = changed // 4 * 4
            assert same_maths(after[:, :edge], before[:, :edge])
            moved = (after - before).abs().amax(-1)[0, edge:]
            assert bool((moved > 1e-6).all())


def doubled(ids: Tensor, noisy: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """[noisy ; clean], positions twice, and what sees what in scoring."""
    n = ids.shape[1]
    positions = torch.arange(n).repeat(2).expand(len(ids), -1)
    blocks = positions[0] // block
    clean = torch.arange(2 * n) >= n
    same_half = clean[:, None] == clean[None]
    own = same_half & (blocks[:, None] == blocks[None])
    earlier = clean[None] & (blocks[:, None] > blocks[None])
    return torch.cat([noisy, ids], 1), positions, (own | earlier).expand(len(ids), -1, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_doubled_input_scores_each_block_behind_clean_ones(family: str) -> None:
    den = small(family)
    ids = random_ids(2, 12)
    noisy = ids.masked_fill(torch.rand(ids.shape, generator=seeded(2)) < 0.6, den.mask_id)
    with torch.no_grad():
        hidden = den.hidden_under(*doubled(ids, noisy, 4))
        for block in range(3):
            part = slice(4 * block, 4 * block + 4)
            canvas = torch.cat([ids[:, : part.start], noisy[:, part]], 1)
            assert same_maths(hidden[:, part], den.hidden(canvas)[:, part])
        assert same_maths(hidden[:, 12:], den.hidden(ids))
        answer = ids.clone()
        answer[:, 6] = (ids[:, 6] + 1) % 28
        other = den.hidden_under(*doubled(answer, noisy, 4))
    assert same_maths(other[:, :8], hidden[:, :8])
    assert (other - hidden)[:, 8:12].abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_that_see_nothing_are_finite(family: str, dtype: torch.dtype) -> None:
    model = small_model(family, dtype=dtype)
    ids = random_ids(3, 7)
    hidden = model.hidden(ids, left_mask([7, 0, 3], 7))
    (hidden[1].sum() + hidden[2, 3:].sum()).backward()
    assert hidden.isfinite().all()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_no_softmax_is_over_nothing() -> None:
    """Kernels differ in what that gives: torch's own on a CPU gives 0, others NaN."""
    visible = torch.rand(2, 5, 7, generator=seeded()) < 0.3
    visible[:, :, 4] = True
    visible[0, 2] = False
    mask = added_to_scores(visible, torch.bfloat16)
    assert mask.shape == (2, 1, 5, 7) and mask.dtype == torch.bfloat16
    assert mask.stride(-2) == 16
    want = torch.zeros(2, 5, 7).masked_fill(~visible, -torch.inf)
    want[0, 2] = 0
    assert torch.equal(mask[:, 0].float(), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_several_rows_at_places_of_their_own(family: str) -> None:
    den = small(family)
    ids = random_ids(3, 8)
    columns = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]])
    cache = den.new_cache(3, 12)
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 12 * 8 * 8 and (cache.rows, cache.columns) == (3, 12)
    with torch.no_grad():
        want = den.hidden(ids)
        first = torch.arange(4).expand(3, -1)
        seen = torch.zeros(3, 4, 12, dtype=torch.bool)
        at = torch.tensor([0, 1, 2])[:, None]
        own = seen.clone()
        own[at, :, columns] = True
        den.hidden_under(ids[:, :4], first, own, cache, columns)
        later = (columns + 4) % 12
        both = own.clone()
        both[at, :, later] = True
        cache.keep(torch.tensor([2, 0]))
        rows = torch.tensor([2, 0])
        got = den.hidden_under(ids[rows, 4:], first[rows] + 4, both[rows], cache, later[rows])
    assert cache.rows == 2
    assert same_maths(got, want[rows, 4:])


def test_what_cannot_be_computed_is_refused() -> None:
    model = small_model("sdar")
    ids = random_ids(1, 4)
    positions = torch.arange(4)[None]
    visible = torch.ones(1, 4, 4, dtype=torch.bool)
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="a cache needs columns"), torch.no_grad():
        model.hidden_under(ids, positions, visible, cache)
    with pytest.raises(ValueError, match="a cache holds no gradients"):
        model.hidden_under(ids, positions, visible, cache, positions)
    with pytest.raises(ValueError, match="got 65 positions, the model has max_position_emb"):
        model.hidden(random_ids(1, 65))


def test_columns_without_a_token_need_no_position() -> None:
    """A canvas has more columns than its longest row has tokens: pads, the last block's rest."""
    model = small_model("sdar")
    ids = random_ids(2, 68)
    real = torch.arange(68) >= torch.tensor([[4], [60]])
    assert model.hidden(ids, real).isfinite().all()
    positions = torch.arange(66)[None]
    visible = torch.ones(1, 66, 66, dtype=torch.bool)
    with pytest.raises(ValueError, match="got 66 positions, the model has max_position_emb"):
        model.hidden_under(random_ids(1, 66), positions, visible)
    model.new_cache(1, 67)
    with pytest.raises(ValueError, match=r"got 68 columns.* max_position_embeddings 64"):
        model.new_cache(1, 68)


def test_a_mask_of_numbers_is_refused() -> None:
    model = small_model("sdar")
    unchecked = type(model).hidden_under
    unchecked = getattr(unchecked, "__wrapped__", unchecked)
    ids = random_ids(1, 4)
    with pytest.raises(Exception, match=r"torch.float32; expected bool|type"):
        unchecked(model, ids, torch.arange(4)[None], torch.ones(1, 4, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_recomputation_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(family)
    ids = random_ids(5, 10)
    mask = left_mask([0, 1, 2, 3, 4], 10)
    plain = model(ids, mask)
    plain.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.recompute = True
    monkeypatch.setattr(MaskPredictor, "cpu_chunk", 20)
    again = model(ids, mask)
    again.sum().backward()
    assert same_maths(again, plain)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert same_maths(parameter.grad, grads[name], size=float(grads[name].abs().max()) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family: str) -> None:
    exact = small(family)
    rough = small(family, dtype=torch.bfloat16)
    ids = random_ids(4, 12)
    with torch.no_grad():
        a = exact.logits(ids)
        b = rough.logits(ids)
    assert b.dtype == torch.bfloat16
    error = (b.double() - a).norm(dim=-1) / a.norm(dim=-1)
    assert error.median() < 0.05  # a token that goes to another expert may be further off
