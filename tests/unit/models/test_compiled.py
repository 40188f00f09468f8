"""Compiled blocks: no break in a graph, one graph for all blocks and copies, the plain numbers,
a bounded number of graphs, and the plain path where nothing can be compiled.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.conftest import seeded
from unmaskrl.models import compiled
from unmaskrl.models.adapters import adapters_merged, adapters_off, add_lora, lora_layers
from unmaskrl.models.compiled import MOST_GRAPHS, compile_blocks, graph_news, no_compiler
from unmaskrl.models.families import FAMILIES, MaskPredictor
from unmaskrl.models.weights import trainable, whole
from unmaskrl.training.ranks.shard import shard_blocks

# what torch's own tracer warns of, and would end it
pytestmark = pytest.mark.filterwarnings("ignore")

RELATIVE = 1e-5
IDS = torch.arange(48).reshape(4, 12) % 200
PADS = torch.arange(12) >= torch.tensor([0, 3, 1, 0])[:, None]


@pytest.fixture(autouse=True)
def traced_without_checks() -> Iterator[None]:
    """Shapes are not checked in a graph; no test finds another's graphs or limits."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, skip_fsdp_guards=True):
        yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny(family: str = "llada", *, lora: bool = True) -> MaskPredictor:
    """A random model of two blocks, whose adapters are as after some training."""
    one = FAMILIES[family]
    config = one.read(dict(one.released or {})).tiny().with_vocabulary(200, 199, 198, 198)
    model = one.build(config).init_weights(seeded())
    if lora:
        add_lora(model, seeded(1), rank=2, alpha=4.0)
        with torch.no_grad():
            for p in trainable(model).values():
                p.add_(torch.randn(p.shape, generator=seeded(2)) * 0.1)
    return model


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= RELATIVE * want.norm())


def gradients(model: MaskPredictor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model.hidden(ids, mask)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return {name: whole(p.grad) for name, p in trainable(model).items() if p.grad is not None}


def same_gradients(got: MaskPredictor, want: MaskPredictor, mask: Tensor | None) -> bool:
    ours = gradients(got, IDS, mask)
    theirs = gradients(want, IDS, mask)
    return ours.keys() == theirs.keys() and all(close(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_block_is_one_graph(family: str, lora: bool) -> None:
    """dynamo's own account, with pads and gradient, adapters on and off."""
    model = tiny(family, lora=lora)
    seen = []
    block = model.blocks[1]
    handle = block.register_forward_pre_hook(lambda _, given: seen.append(given))
    model.hidden(IDS, PADS)
    handle.remove()
    for _ in range(1 + lora):
        explained = torch._dynamo.explain(type(block).forward)(block, *seen[0])
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)
        for _, layer in lora_layers(model):
            layer.enabled = False


@pytest.mark.parametrize(
    ("mask", "recompute", "backend"), [(None, False, "aot_eager"), (PADS, True, "eager")]
)
def test_training_is_that_of_the_plain_blocks(
    mask: Tensor | None, recompute: bool, backend: str
) -> None:
    """Values and gradients of adapters; values without them, and of a changed copy."""
    plain = tiny()
    model = tiny()
    graphs = compile_blocks(model, backend)
    plain.recompute = model.recompute = recompute
    assert same_gradients(model, plain, mask)
    assert graphs.count == 2, "of all blocks one: the first one's input needs no gradient"
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad(), adapters_off(model), adapters_off(plain):
        assert close(model.hidden(IDS, mask), plain.hidden(IDS, mask))
    count = graphs.count
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for one in (twin, plain):
            for p in trainable(one).values():
                p.mul_(0.5)
        assert not close(model.hidden(IDS, mask), plain.hidden(IDS, mask))
        assert close(twin.hidden(IDS, mask), plain.hidden(IDS, mask))
    assert graphs.count == count + 1, "a copy shares the graphs"


def test_full_weights_train_as_plain_ones() -> None:
    plain = tiny("Dream", lora=False)
    model = tiny("Dream", lora=False)
    graphs = compile_blocks(model, "aot_eager")
    assert same_gradients(model, plain, PADS)
    assert graphs.count == 1


def test_changing_batches_need_few_graphs_and_the_log_says_how_many() -> None:
    """Rows that finish and prompts of every length: three graphs and one for a single row."""
    model = tiny()
    compile_blocks(model, "eager")
    assert graph_news(model) is None
    with torch.no_grad():
        for rows in (4, 3, 2):
            for length in (12, 11, 9, 7, 5):
                model.hidden(IDS[:rows, :length])
        assert graph_news(model) == "model.compile=blocks: graphs compiled so far: 3"
        model.hidden(IDS[:1, :9])
        model.hidden(IDS[:1, :8])
    assert graph_news(model) == "model.compile=blocks: graphs compiled so far: 4"
    assert graph_news(model) is None


def test_merged_adapters_are_one_graph_however_often_they_are_merged() -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    graphs = compile_blocks(model, "eager")
    with torch.no_grad():
        for _ in range(3):
            with adapters_merged(model), adapters_merged(plain):
                assert close(model.hidden(IDS), plain.hidden(IDS))
        assert graphs.count == 1
        assert close(model.hidden(IDS), plain.hidden(IDS)) and graphs.count == 2


def test_too_many_graphs_end_in_plain_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    model = tiny()
    graphs = compile_blocks(model, "eager")
    twin = copy.deepcopy(model)
    want = tiny().hidden(IDS)
    with torch.no_grad():
        model.hidden(IDS)
    assert graph_news(model) == "model.compile=blocks: graphs compiled so far: 1"
    assert close(model.hidden(IDS), want)
    said = graph_news(model)
    assert said is not None and said.endswith("more than 1, so blocks run as written from here on")
    assert close(model.hidden(IDS, torch.ones_like(IDS, dtype=torch.bool)), want)
    assert close(twin.hidden(IDS[:2]), want[:2])
    assert graphs.count == 3 and graph_news(model) is None
    assert MOST_GRAPHS > 20


def test_a_compiler_that_fails_leaves_the_plain_path() -> None:
    plain = tiny()
    model = tiny()
    graphs = compile_blocks(model, "eager")

    def broken(*given: object) -> object:
        raise RuntimeError("no compiler here\nand a long explanation")

    graphs.compiler = broken  # type: ignore[assignment]
    assert same_gradients(model, plain, PADS)
    assert graph_news(model) == (
        "model.compile=blocks: graphs compiled so far: 2; 2 could not be compiled and run as "
        "written (no compiler here)"
    )


def test_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_compiler(torch.device("cpu")) is None
    assert no_compiler(torch.device("mps")) == "torch does not compile for mps"
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    said = no_compiler(torch.device("cuda"))
    assert said == "Triton is not installed, or the card is too old for it"


def test_sharded_blocks_compute_the_same(tmp_path: Path) -> None:
    """FSDP2 on one rank, with recompute; adapters that are switched off are off."""
    plain = tiny()
    model = tiny()
    plain.recompute = model.recompute = True
    graphs = compile_blocks(model, "aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/at", rank=0, world_size=1)
    try:
        shard_blocks(model, "fsdp")
        plain.cpu_chunk = None
        for off in (False, True):
            with torch.no_grad():
                if off:
                    with adapters_off(model), adapters_off(plain):
                        assert close(model.hidden(IDS, PADS), plain.hidden(IDS, PADS))
                else:
                    assert close(model.hidden(IDS, PADS), plain.hidden(IDS, PADS))
        assert same_gradients(model, plain, PADS)
        assert graphs.count and not graphs.failed
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor_computes_the_same() -> None:
    """The compiler that runs use, once, forward and backward, in float32."""
    plain = tiny(lora=False)
    model = tiny(lora=False)
    from torch._inductor import config as inductor

    graphs = compile_blocks(model)
    with inductor.patch({"cpp.simdlen": 1}):  # short code, which compiles sooner
        assert same_gradients(model, plain, PADS)
    assert graphs.count and not graphs.failed, replace(graphs).reason
