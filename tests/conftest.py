"""Every test: shapes checked (jaxtyping + beartype) in its first cases, one thread, torch's global
generator untouched. And what tests share.

What two numbers may differ by. The processor, its instruction set, the number of threads and the
shape of a batch choose the order of sums. So only three comparisons hold everywhere:

1. The same call on the same tensors twice: bit-equal (``torch.equal``, ``==``). So are copies,
integers and picked entries.
2. The same mathematics by another route (another batch shape, chunk, padding or formula):
   ``same_maths`` and ``rounded``,
   relative to the largest magnitude that was added up, in units of the dtype's eps. A figure that
   another machine computed and wrote down belongs here too.
3. A mean over random draws against its exact value: some standard errors, or a p-value
(``chi_square_p``).

A token that was drawn or chosen from such numbers is equal by luck where two of them are close:
compare laws or scores. ``python -m pytest -p tests.other_processor`` runs tests with another
processor's rounding and finds what breaks these rules.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch
from torch import Tensor

# The rooms whose functions take tensors; the others do not, and would only become slow.
CORE = ["unmaskrl.core", "unmaskrl.models"]

if "unmaskrl" in sys.modules:
    raise RuntimeError(
        "unmaskrl was imported before tests/conftest.py: its shapes would go unchecked"
    )
# `make integration` leaves it out: whole runs repeat the calls that unit and contract tests check
if os.environ.get("UNMASKRL_CHECK_SHAPES", "1") == "1":
    jaxtyping.install_import_hook(CORE, "beartype.beartype")
torch.set_num_threads(1)


# eps; two layers of a small network lose some 20 forward and 100 backward
# (tests/other_processor.py)
ROUNDING = 256


def rounded(
    want: float,
    size: float | None = None,
    dtype: torch.dtype = torch.float64,
    units: float = ROUNDING,
):
    """``want`` up to rounding: |got - want| <= units * eps(dtype) * size.

    ``size`` is the largest magnitude that was added up, by default |want|.
    """
    return pytest.approx(
        want, rel=0, abs=units * torch.finfo(dtype).eps * (abs(want) if size is None else size)
    )


# cases of one parametrised test whose shapes are checked: that doubles a test's time, and what
# follows makes the same calls
CHECKED_CASES = 2
BEGUN: Counter[str] = Counter()  # cases of each test, in this worker


@pytest.fixture(autouse=True)
def shapes_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked in the first cases of every test (in each worker)."""
    name = request.node.nodeid.partition("[")[0]
    BEGUN[name] += 1
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or BEGUN[name] > CHECKED_CASES)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def same_maths(
    got: Tensor, want: Tensor, size: float | None = None, units: float = ROUNDING
) -> bool:
    """Whether ``got`` is ``want`` [same shape] up to rounding: |got - want| <= units * eps * size
    in every entry.

    eps is that of the coarser of the two dtypes; ``size`` the largest magnitude summed, by default
    the largest |want|. Infinite entries must be the same, and nothing may be nan.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps)
    got = got.detach().double()
    want = want.detach().double()
    finite = want.isfinite()
    if not torch.equal(got[~finite], want[~finite]):
        return False
    got = got[finite]
    want = want[finite]
    largest = float(want.abs().max()) if want.numel() else 0.0
    error = float((got - want).abs().max()) if want.numel() else 0.0
    return error <= units * eps * (largest if size is None else size)


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    """Fail a test in which anything read or seeded torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used or seeded"


@pytest.fixture(autouse=True)
def modules_of_a_test_are_forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote and imported is not what the next test's import finds."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(seed)


def chi_square_p(counts: Tensor, probs: Tensor, min_expected: float = 5.0) -> float:
    """p-value of observed counts under ``probs``; cells with few expected counts are pooled,
    impossible ones must be 0.
    """
    counts = counts.double().flatten()
    probs = probs.double().flatten()
    assert float(probs.sum()) == pytest.approx(1.0, abs=1e-6)
    expected = probs * counts.sum()
    if bool((counts[expected < 1e-9] > 0).any()):
        return 0.0
    small = expected < min_expected
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 1e-9
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    assert freedom >= 1, "one cell: nothing is tested"
    return float(
        torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    )


class HashDenoiser:
    """Logits that are a fixed random function of the completion's ids and the position; counts the
    rows it is called on.

    Cheap at any length. ``eos_bias`` and ``mask_bias`` are added to the logits of EOS and of the
    mask token.
    """

    def __init__(
        self, *, num_tokens: int = 7, length: int, eos_bias: float = 0.0, mask_bias: float = 0.0
    ) -> None:
        self.length = length
        self.vocab_size = num_tokens + 3
        self.mask_id = num_tokens
        self.eos_id = num_tokens + 1
        self.pad_id = num_tokens + 2
        self.table = torch.randn(
            997, length, self.vocab_size, generator=seeded(5), dtype=torch.float64
        )
        self.table[..., self.eos_id] += eos_bias
        self.table[..., self.mask_id] += mask_bias
        self.table[..., self.pad_id] = -1e9
        self.key = torch.randint(1, 10**6, (length,), generator=seeded(6))
        self.rows: list[int] = []

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.rows.append(len(ids))
        bucket = ((ids[:, -self.length :] + 1) * self.key).sum(-1) % len(self.table)
        prompt = torch.zeros(
            len(ids), ids.shape[1] - self.length, self.vocab_size, dtype=torch.float64
        )
        return torch.cat([prompt, self.table[bucket]], 1)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids, attention_mask)


class RecordingHead:
    """A Denoiser that passes everything on and remembers the largest block of logits that was
    computed.
    """

    def __init__(self, denoiser) -> None:
        self.inner = denoiser
        self.largest = 0
        self.calls = 0
        self.mask_id = denoiser.mask_id
        self.eos_id = denoiser.eos_id
        self.pad_id = denoiser.pad_id
        self.vocab_size = denoiser.vocab_size

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner.hidden(ids, attention_mask)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.inner.head(hidden)
        self.largest = max(self.largest, logits.numel())
        self.calls = self.calls + 1
        return logits

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        raise AssertionError("nothing in the library may ask for all logits")


# Rules with a quota; the others (eb, threshold, factor) need gamma and have their own tests.
QUOTA_RULES = ["confidence", "entropy", "left_to_right", "margin", "max_prob", "random"]


def tiny_llada(dtype: torch.dtype = torch.float64, seed: int = 3):
    """A random LLaDA of 11 ordinary tokens (mask 11, EOS 12, pad 13); EOS is drawn now and then."""
    from unmaskrl.testing.cases import tiny_model

    return tiny_model(dtype, seed)


def train_batch(
    mask: Tensor, advantages: Tensor, old: Tensor, ref: Tensor | None = None, **counts: Any
):
    """A TrainBatch; counts that are not given are those of the batch itself, every row a group of
    its own.
    """
    from unmaskrl.core.types import TrainBatch

    rows = float(mask.any(-1).sum())
    tokens = float(mask.sum())
    own = {"num_actions": tokens, "num_rows": rows, "num_groups": rows, "num_scored": tokens}
    own["group_actions"] = mask.sum(-1).to(advantages.dtype)
    own |= {"behavior_logps": old, "progress": torch.ones_like(old)}
    return TrainBatch(
        action_mask=mask, advantages=advantages, old_logps=old, ref_logps=ref, **{**own, **counts}
    )


def finished_rollout(
    ids: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int = 0,
    prompt: int = 2,
    left_pad: int = 0,
    exit_step: Sequence[int] | None = None,
    temperature: float = 1.0,
    row_ids: Sequence[int] | None = None,
):
    """A hand-made Rollout: completions and their decoded_step (0 = anchor); prompts are token 0,
    pads ``pad_id``.
    """
    from unmaskrl.core.types import Rollout, first_eos_mask

    completion = torch.tensor(ids)
    step = torch.tensor(steps)
    num_rows, gen_length = completion.shape
    zeros = torch.zeros(num_rows, prompt, dtype=torch.int64)
    pads = torch.full((num_rows, left_pad), pad_id)
    full = torch.cat([pads, zeros, completion], 1)
    prompt_mask = torch.zeros(full.shape, dtype=torch.bool)
    prompt_mask[:, left_pad : left_pad + prompt] = True
    attention = torch.ones_like(prompt_mask)
    attention[:, :left_pad] = False
    given = torch.zeros(num_rows, left_pad + prompt, dtype=torch.int64)
    rows = torch.arange(num_rows) if row_ids is None else torch.tensor(row_ids)
    return Rollout(
        ids=full,
        prompt_mask=prompt_mask,
        completion_mask=first_eos_mask(full, gen_length, eos_id),
        attention_mask=attention,
        decoded_step=torch.cat([given, step], 1),
        behavior_logps=torch.zeros(full.shape),
        nfe=step.amax(-1),
        exit_step=torch.zeros(num_rows, dtype=torch.int64)
        if exit_step is None
        else torch.tensor(exit_step),
        row_ids=rows,
        group_ids=torch.zeros(num_rows, dtype=torch.int64),
        gamma=torch.zeros(num_rows, dtype=torch.float64),
        gen_length=gen_length,
        temperature=temperature,
        exact=True,
    )
