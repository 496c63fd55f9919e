"""`stack_writes`: a tensor that is written entry by entry is a stack."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes import stack_writes

aten = torch.ops.aten


def traced(*places: tuple[int, int], reads: bool = False) -> tuple[fx.GraphModule, Tensor]:
    """Return a graph that writes rows of its input to the entries `(dim, index)` of a copy of `[3, 3]`."""
    x = torch.rand(3, 3)

    def write(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.zeros_like(x)
        written = []
        for number, (dim, index) in enumerate(places):
            y = aten.select_scatter(y, x[number % 3] * 2, dim, index)
            written += [y * 3] if reads else []
        return y, *written

    return make_fx(write, tracing_mode="fake")(x), x


def count(gm: fx.GraphModule, target: torch._ops.OpOverload) -> int:
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return len(gm.graph.find_nodes(op="call_function", target=target))


def test_every_entry_is_written() -> None:
    gm, x = traced((1, 0), (1, -1), (1, 1), (1, 0))
    (whole,) = gm(x)
    assert stack_writes(gm) == 1
    assert count(gm, aten.select_scatter.default) == 0
    assert torch.equal(gm(x)[0], whole)
    assert stack_writes(gm) == 0


def test_what_is_read_in_between_stays() -> None:
    gm, x = traced((0, 0), (0, 1), (0, 2), reads=True)
    whole = gm(x)
    assert stack_writes(gm) == 1
    assert count(gm, aten.select_scatter.default) == 2
    assert all(map(torch.equal, gm(x), whole))


def test_some_entries_or_other_dims_are_left_alone() -> None:
    for places in (((0, 0), (0, 2)), ((0, 0), (1, 1), (0, 2)), ((0, 0), (0, 0), (0, 1))):
        gm, _ = traced(*places)
        before = str(gm.graph)
        assert stack_writes(gm) == 0
        assert str(gm.graph) == before
