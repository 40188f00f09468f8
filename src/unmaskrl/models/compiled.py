"""A model's blocks compiled by torch: the small kernels between their matrix products become few.

One block's forward is compiled, and its graph serves all blocks and all copies of the model.
Another kind of pass (with gradient, with pads, without adapters, in another dtype, of a frozen
copy) is another graph. So are the first two numbers of rows and of tokens; then a graph takes any.
What does not compile runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.utils._triton import has_triton

from .families import MaskPredictor

MOST_GRAPHS = 32  # twice what one model has been seen to need


@dataclass(eq=False)
class Graphs:
    """The compiler of a model's blocks, and what it did so far.

    ``count`` graphs, of which ``failed`` run as written, for the ``reason`` that the last one gave.
    ``full``: from here on nothing compiled is used. ``told``: the count that was last reported.
    """

    compiler: Callable[..., Callable[..., Any]]
    count: int = 0
    failed: int = 0
    reason: str = ""
    full: bool = False
    told: int = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Compile a graph, as torch calls its backends."""
        self.count += 1
        try:
            return self.compiler(graph, inputs)
        except Exception as error:  # compilers fail in many ways, and none may end a run
            self.failed += 1
            self.reason = str(error).strip().partition("\n")[0]
            return graph.forward


def compile_blocks(model: MaskPredictor, backend: str = "inductor") -> Graphs:
    """Compile the forward of every block, in place. The module, its names and hooks stay as they
    are, and a copy of it is compiled too.
    """
    # importing them takes two seconds
    import torch._dynamo
    from torch._dynamo.backends.registry import lookup_backend

    settings: Any = torch._dynamo.config
    # beyond its limit torch runs as written without a word, and recompute might then differ
    settings.recompile_limit = max(settings.recompile_limit, 4 * MOST_GRAPHS)
    # sharded blocks too have attributes that change (adapters on or off), so they need their guards
    settings.skip_fsdp_guards = False
    graphs = Graphs(lookup_backend(backend))
    made: dict[type, Callable[..., Any]] = {}
    for block in model.blocks:
        kind = type(block)
        if kind not in made:
            made[kind] = _either(kind.forward, graphs)
        # an attribute of the instance, which copies and sharded blocks keep
        block.forward = MethodType(made[kind], block)
    model.graphs = graphs
    return graphs


def graph_news(model: MaskPredictor) -> str | None:
    """A line if graphs were compiled since the last call; to be asked between steps.

    Beyond ``MOST_GRAPHS`` the blocks run as written from here on.
    """
    graphs: Graphs | None = model.graphs
    if graphs is None or graphs.count == graphs.told or graphs.full:
        return None
    graphs.told = graphs.count
    text = f"model.compile=blocks: graphs compiled so far: {graphs.count}"
    if graphs.failed:
        text += f"; {graphs.failed} could not be compiled and run as written ({graphs.reason})"
    graphs.full = graphs.count > MOST_GRAPHS
    if graphs.full:
        text += f"; more than {MOST_GRAPHS}, so blocks run as written from here on"
    return text


def no_compiler(device: torch.device) -> str | None:
    """Why blocks cannot be compiled for a device; None if they may be."""
    if device.type == "cuda":
        return None if has_triton() else "Triton is not installed, or the card is too old for it"
    return None if device.type == "cpu" else f"torch does not compile for {device.type}"


def _either(forward: Callable[..., Any], graphs: Graphs) -> Callable[..., Any]:
    compiled = torch.compile(forward, backend=graphs)

    def call(block: Any, *given: Any) -> Any:
        return (forward if graphs.full else compiled)(block, *given)

    return call
