"""Layers outlined: equal ones become calls of one function, with the same bits, and all else is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from cpcompile.capture.lowering import capture
from cpcompile.compile.outline_layers import outline_layers, pass_operands_by

INVOKE = torch.ops.higher_order.invoke_subgraph
WIDTH = 8


class Layer(nn.Module):
    """A layer of more operators than a call is worth; `slope` is a fixed argument of one of them."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.slope = slope
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y = self.norm(x) * table
        heads = y.unflatten(-1, (2, -1)).transpose(0, 1)
        y = torch.cat([heads[..., :2].sin(), -heads[..., 2:]], -1).transpose(0, 1).flatten(1)
        return x + self.down(F.leaky_relu(self.gate(y), self.slope) * self.up(y).tanh())


class Stack(nn.Module):
    """Layers between an embedding and a head; views of what each returns are read once more at the end if `is_u_net`."""

    def __init__(self, layers: list[Layer], is_u_net: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = (
            nn.Embedding(11, WIDTH, dtype=torch.float64),
            nn.Linear(WIDTH, 11, dtype=torch.float64),
        )
        self.layers, self.is_u_net = nn.ModuleList(layers), is_u_net

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        table = torch.arange(ids.shape[0], dtype=torch.float64)[:, None].cos()
        between = []
        for layer in self.layers:
            x = layer(x, table)
            between.append(x.t())
        if self.is_u_net:
            x = x + sum(y.t() for y in between)
        return F.cross_entropy(self.head(x), ids)


def trained(
    model: nn.Module, ids: Tensor, edit: Callable[[fx.GraphModule], Any], dynamic: bool = False
) -> list[Tensor]:
    """Return loss and gradients of a model whose graph is edited before autograd."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        edit(captured)
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)(captured, inputs)

    def partition(gm: fx.GraphModule, *args: Any, **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        pass_operands_by(gm.graph)
        return min_cut_rematerialization_partition(gm, *args, **settings)

    torch._dynamo.reset()
    loss = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(ids)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [loss.detach(), *grads]


def calls(gm: fx.GraphModule) -> list[str]:
    return [node.args[1] for node in gm.graph.find_nodes(op="call_function", target=INVOKE)]


def shapes(layers: list[Layer], **settings: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(layers, **settings)


MODELS: dict[str, tuple[Callable[[], Stack], int]] = {
    "equal": (lambda: shapes([Layer() for _ in range(6)]), 6),
    "read later": (lambda: shapes([Layer() for _ in range(6)], is_u_net=True), 6),
    "in turn": (lambda: shapes([Layer(0.1 + 0.1 * (i % 2)) for i in range(10)]), 5),
    "one differs": (lambda: shapes([Layer(0.1 if i != 5 else 0.3) for i in range(10)]), 9),
    "shared": (lambda: shapes([Layer()] * 6), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name: str) -> None:
    make, num_calls = MODELS[name]
    dynamic = name in ("equal", "read later")
    model, ids = make(), torch.randint(11, (7,))
    found: list[str] = []

    def edit(gm: fx.GraphModule) -> None:
        outline_layers(gm)
        found.extend(calls(gm))

    expected = trained(model, ids, lambda gm: None, dynamic)
    outlined = trained(model, ids, edit, dynamic)
    assert all(torch.equal(a, b) for a, b in zip(outlined, expected, strict=True))
    assert len(found) == num_calls, found


def test_few_layers_are_left_alone() -> None:
    def edit(gm: fx.GraphModule) -> None:
        before = str(gm.graph)
        assert outline_layers(gm) == 0
        assert str(gm.graph) == before

    trained(shapes([Layer() for _ in range(3)]), torch.randint(11, (7,)), edit)


def test_twice_changes_nothing() -> None:
    def edit(gm: fx.GraphModule) -> None:
        assert outline_layers(gm)
        once = str(gm.graph)
        assert outline_layers(gm) == 0
        assert str(gm.graph) == once

    trained(shapes([Layer() for _ in range(6)]), torch.randint(11, (7,)), edit)
