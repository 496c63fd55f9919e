"""Layers outlined: equal ones become calls of one function, with the same bits, and all else is left alone."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cpcompile._torch.repeated_calls import schemas_once
from cpcompile.capture.lowering import capture
from cpcompile.capture.stages import Tracing
from cpcompile.compile.inner import keep_results
from cpcompile.compile.outline_layers import is_seen, outline_layers

INVOKE = torch.ops.higher_order.invoke_subgraph
WIDTH = 8
contexts = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
)
SELECTIVE = {"use_reentrant": False, "context_fn": contexts}


class Layer(nn.Module):
    """A layer of more operators than a call is worth; `slope` is a fixed argument of one of them."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.slope = slope
        self.both, self.down = (
            nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64),
            nn.Linear(WIDTH, WIDTH, dtype=torch.float64),
        )
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a new state, a piece of what was computed, and a number that no gradient reaches."""
        y = self.norm(x) * table
        heads = y.unflatten(-1, (2, -1)).transpose(0, 1)
        y = torch.cat([heads[..., :2].sin(), -heads[..., 2:]], -1).transpose(0, 1).flatten(1)
        gate, up = self.both(y).chunk(2, -1)
        return x + self.down(F.leaky_relu(gate, self.slope) * up.tanh()), up, (gate > 0).double().sum()


class Stack(nn.Module):
    """Layers between an embedding and a head, in activation checkpoints or not.

    What each returns is read once more at the end, as a view and in pieces, if `is_u_net`.
    """

    def __init__(
        self, layers: list[Layer], is_u_net: bool = False, checkpoints: bool = False, num_frozen: int = 0
    ) -> None:
        super().__init__()
        self.embedding, self.head = (
            nn.Embedding(11, WIDTH, dtype=torch.float64),
            nn.Linear(WIDTH, 11, dtype=torch.float64),
        )
        self.layers, self.is_u_net, self.checkpoints = nn.ModuleList(layers), is_u_net, checkpoints
        for module in [self.embedding, *layers[:num_frozen]] if num_frozen else []:
            module.requires_grad_(False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        table = torch.arange(ids.shape[0], dtype=torch.float64)[:, None].cos()
        between, counts = [], []
        for layer in self.layers:
            x, piece, count = checkpoint(layer, x, table, **SELECTIVE) if self.checkpoints else layer(x, table)
            between.append((x.t(), piece))
            counts.append(count)
        if self.is_u_net:
            x = x + sum(y.t() + piece for y, piece in between)
        return F.cross_entropy(self.head(x), ids), torch.stack(counts)


def trained(
    model: nn.Module, ids: Tensor, edit: Callable[[fx.GraphModule], Any], dynamic: bool = False
) -> list[Tensor]:
    """Return loss, counts and gradients of a model whose graph is edited before autograd."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        edit(captured)
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)(captured, inputs)

    def partition(gm: fx.GraphModule, *args: Any, **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        keep_results(gm.graph)
        halves = min_cut_rematerialization_partition(gm, *args, **settings)
        assert not any("fw" in name for name in calls(halves[1])), (
            "a layer runs once; what is computed again is inside of it"
        )
        assert not seen(halves[0]), "backward takes views of what a layer was given again"
        return halves

    torch._dynamo.reset()
    loss, counts = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(ids)
    assert not counts.requires_grad
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [loss.detach(), counts, *grads]


def calls(gm: fx.GraphModule) -> list[str]:
    return [node.args[1] for node in gm.graph.find_nodes(op="call_function", target=INVOKE)]


def seen(gm: fx.GraphModule) -> list[fx.Node]:
    """Return what calls return that are operands or views of operands."""
    found = []
    for call in gm.graph.find_nodes(op="call_function", target=INVOKE):
        body = getattr(gm, call.args[0].target).graph
        operands, (output,) = dict.fromkeys(body.find_nodes(op="placeholder")), body.find_nodes(op="output")
        returned = [(result, output.args[0][result.args[1]]) for result in call.users]
        found += [result for result, x in returned if isinstance(x, fx.Node) and is_seen(x, operands)]
    return found


def shapes(layers: list[Layer], **settings: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(layers, **settings)


MODELS: dict[str, tuple[Callable[[], Stack], int]] = {
    "equal": (lambda: shapes([Layer() for _ in range(4)]), 4),
    "read later": (lambda: shapes([Layer() for _ in range(4)], is_u_net=True), 4),
    "in turn": (lambda: shapes([Layer(0.1 + 0.1 * (i % 2)) for i in range(8)]), 4),
    "one differs": (lambda: shapes([Layer(0.1 if i != 5 else 0.3) for i in range(10)]), 9),
    "frozen below": (lambda: shapes([Layer() for _ in range(10)], num_frozen=5), 4),
    "in checkpoints": (lambda: shapes([Layer() for _ in range(4)], checkpoints=True), 4),
    "shared": (lambda: shapes([Layer()] * 4), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name: str) -> None:
    make, num_calls = MODELS[name]
    dynamic = name == "read later"
    model, ids = make(), torch.randint(11, (7,))
    found: list[str] = []

    def edit(gm: fx.GraphModule) -> None:
        outline_layers(gm)
        found.extend(calls(gm))
        made = [x for call in gm.graph.find_nodes(op="call_function", target=INVOKE) for x in (call, *call.users)]
        assert all(x.meta["recompute"] is CheckpointPolicy.MUST_SAVE and "ac_graph_id" not in x.meta for x in made)

    expected = trained(model, ids, lambda gm: None, dynamic)
    outlined = trained(model, ids, edit, dynamic)
    assert all(torch.equal(a, b) for a, b in zip(outlined, expected, strict=True))
    assert len(found) == num_calls, found


def test_a_function_is_traced_as_often_for_any_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    find = type(INVOKE).gen_schema
    monkeypatch.setattr(
        type(INVOKE),
        "gen_schema",
        lambda self, body, name, *given: traced.append(name) or find(self, body, name, *given),
    )
    with schemas_once():
        for num_layers, ids in ((4, torch.randint(11, (7,))), (8, torch.randint(11, (7,)))):
            trained(shapes([Layer() for _ in range(num_layers)]), ids, outline_layers)
            assert len(traced) <= 4, num_layers
            traced.clear()


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

    trained(shapes([Layer() for _ in range(4)]), torch.randint(11, (7,)), edit)


def test_garbage_is_collected_seldom_only_while_a_model_is_compiled() -> None:
    before, during = gc.get_threshold(), list[int]()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        during.append(gc.get_threshold()[0])
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(torch.sin, backend=backend)
    for _ in range(2):
        with Tracing().call():
            compiled(torch.ones(3))
        assert gc.get_threshold() == before
    assert during == [1_000_000]
