"""Repeated nodes: a call that another one is like is copied, and the graph is the one that tracing every call makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from cpcompile import _torch
from cpcompile._torch import repeated_nodes, tracing
from cpcompile.capture.writes.aliases import source_of

WIDTH = 8


class Block(nn.Module):
    """Views, copies, operators that return their operand as it is, and one that draws numbers."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.down = writes, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32).contiguous()
        heads = y.view(*y.shape[:-1], 2, -1).transpose(0, 1).reshape(*y.shape)
        with torch.no_grad():
            scale = heads.abs().amax(-1, keepdim=True)
        first, second = (heads / (1 + scale)).chunk(2, -1)
        both = torch.cat([second.sin(), -first[..., :]], -1)
        if self.writes:
            both = both.clone()
            both[:, 0] = 1.0
        return x + nn.functional.dropout(self.down(both), 0.1)


class Blocks(nn.Module):
    """Four blocks, the last two in checkpoints."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(writes) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i > 1 else block(x)
        return x.mul(2.0).sum()


def traced(model: nn.Module, monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> tuple[list[fx.GraphModule], int]:
    """Return the graph of a model with copies, then the one that is traced call by call; and how many calls were copied."""
    graphs: list[fx.GraphModule] = []
    copied: list[Any] = []
    make = repeated_nodes.RepeatedNodes._copy

    def copy(self: Any, trace: Any, operands: Any) -> Any:
        copied.append(trace)
        return make(self, trace, operands)

    monkeypatch.setattr(repeated_nodes.RepeatedNodes, "_copy", copy)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        mode, fakes = _torch.fake_inputs(inputs)
        graphs.append(_torch.trace_pre_dispatch(gm, mode, fakes)[0])
        graphs.append(tracing._traced(gm, mode, fakes, (), None)[0])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(torch.randn(3, 5, WIDTH))
    return graphs, len(copied)


def described(gm: fx.GraphModule) -> list[str]:
    """Return the nodes of a graph by their places: names are numbered by what was traced and dropped again."""
    place = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}
    return [
        str((node.op, str(node.target), fx.node.map_arg((node.args, node.kwargs), lambda x: place[x])))
        for node in gm.graph.nodes
        if node.op != "placeholder"
    ]


@pytest.mark.parametrize("dynamic", [False, True])
def test_copies_are_what_tracing_makes(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (found, expected), num_copied = traced(Blocks(), monkeypatch, dynamic)
    assert num_copied > len(expected.graph.nodes) / 3
    assert described(found) == described(expected)
    for node, other in zip(found.graph.nodes, expected.graph.nodes, strict=True):
        assert node.meta.keys() == other.meta.keys(), node
        assert node.meta.get("nn_module_stack") == other.meta.get("nn_module_stack")
        assert node.meta.get("stack_trace") == other.meta.get("stack_trace")
        assert str(source_of(node)) == str(source_of(other)), "views are of the same memory"
        a, b = node.meta.get("val"), other.meta.get("val")
        if isinstance(a, Tensor):
            assert (a.dtype, a.device, str(a.shape), str(a.stride())) == (
                b.dtype,
                b.device,
                str(b.shape),
                str(b.stride()),
            )
            assert str(a.storage_offset()) == str(b.storage_offset())


def test_a_model_that_writes_is_traced_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    (found, expected), _ = traced(Blocks(writes=True), monkeypatch, dynamic=False)
    assert described(found) == described(expected)
    assert "copy_" in found.code


def test_a_call_under_another_mode_of_gradients_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x.sin()
            return x.sin() + y

    _, num_copied = traced(Twice(), monkeypatch, dynamic=False)
    assert num_copied == 0
