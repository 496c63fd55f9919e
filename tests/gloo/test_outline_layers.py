"""Equal layers as calls of one function, on gloo ranks: exact beside checkpoints, frozen layers, documents and any length."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn import functional as F

import cpcompile
from cpcompile.options.config import Config
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64
SHAPE = {"num_layers": 6}


def trained(rank: Any, num_frozen: int, options: dict[str, Any]) -> tuple[dict[str, float], list[int]]:
    """Errors of two backward passes of two lengths and of a call without gradients; how many calls each graph has."""
    torch._dynamo.reset()
    model, alone = make("rotary", **SHAPE), make("rotary", **SHAPE)
    for each in (model, alone):
        for block in each.blocks[:num_frozen]:
            block.requires_grad_(False)
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", **options)
    num_calls = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        num_calls.append(len(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)))
        return make_boxed_func(gm)

    found: dict[str, float] = {}
    # Inductor takes minutes where this takes seconds; the graphs are the same.
    with (
        unittest.mock.patch.object(Config, "outlines", True),
        unittest.mock.patch("torch._functorch.compilers.nop", compiler),
    ):
        for seed, length in enumerate((29, 35)):
            inputs = batch(alone, length, seed=seed)
            losses = [loss_of(each(**inputs)) for each in (model, alone)]
            for loss in losses:
                loss.backward()
            found[f"loss {length}"] = error(losses[0].detach(), losses[1].detach())
        with torch.no_grad():
            found["without gradients"] = error(*(loss_of(each(**inputs)) for each in (model, alone)))
    return found | errors(gradients(model), gradients(alone)), num_calls


@pytest.mark.parametrize(
    ("world_size", "num_frozen", "options"),
    [
        (2, 0, {"strategy": "ring"}),
        (3, 0, {"strategy": "ulysses", "memory_budget": 0.0}),
        pytest.param(2, 0, {"strategy": "ulysses", "dynamic": False}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"strategy": "ring", "memory_budget": 0.0}, marks=pytest.mark.slow),
        (1, 2, {"strategy": "ring"}),
    ],
)
def test_trains_exactly(pool: Any, world_size: int, num_frozen: int, options: dict[str, Any]) -> None:
    for found, num_calls in pool.run(world_size, trained, num_frozen, options, timeout=250):
        assert max(found.values()) < EXACT, found
        assert min(num_calls) == SHAPE["num_layers"] - num_frozen, num_calls


WIDTH, VOCABULARY = 8, 16


class Attending(nn.Module):
    """A layer that is given the length, for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ByToken(nn.Module):
    """A layer that is given no length: it computes each token by itself, all sequences as one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for part, function in zip(self.parts, (torch.tanh, torch.sin, torch.cos, torch.sigmoid), strict=True):
            x = x + function(part(x))
        return x


class OfTwoLengths(nn.Module):
    """Layers of a kind between an embedding and a head, and an input that none reads, whose length is another to torch."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.first = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, VOCABULARY),
            Attending(),
        )
        self.layers = nn.ModuleList(layer() for _ in range(6))

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        x = self.first(self.embedding(input_ids))
        x = x.flatten(0, 1) if isinstance(self.layers[0], ByToken) else x
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten())


def unknown_sizes(call: fx.Node) -> set[Any]:
    """Return on what sizes of a call's operands depend and what Inductor does not know in the function."""
    traced = call.meta.get("eager_input_vals")
    operands = traced[0][2:] if traced else [x.meta["val"] for x in call.args[2:]]
    tensors = [x for x in operands if isinstance(x, Tensor)]
    numbers = {x.node._expr if traced else x.node.expr for x in operands if isinstance(x, torch.SymInt)}
    sizes = {size.node.expr for x in tensors for size in x.shape if isinstance(size, torch.SymInt)}
    return free_symbols(tensors) - numbers - sizes


def of_two_lengths(rank: Any, layer: type[nn.Module], inner: str) -> tuple[dict[str, float], list[set[Any]]]:
    """Errors of two lengths, and what is unknown in each call."""
    torch._dynamo.reset()
    model, alone = OfTwoLengths(layer).double(), OfTwoLengths(layer).double()
    cpcompile.apply(model, rank.mesh(), inner=inner, loss_chunk=0, memory_budget=0.0)
    unknown, found = [], {}

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        unknown.extend(map(unknown_sizes, calls))
        return make_boxed_func(gm)

    with (
        unittest.mock.patch.object(Config, "outlines", True),
        unittest.mock.patch("torch._functorch.compilers.nop", compiler),
    ):
        for length in (21, 30):
            ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
            inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length).repeat(2, 1)}
            losses = [each(**inputs) for each in (model, alone)]
            for loss in losses:
                loss.backward()
            found[f"loss {length}"] = error(losses[0].detach(), losses[1].detach())
    return found | errors(gradients(model), gradients(alone)), unknown


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", [Attending, ByToken])
def test_a_layer_knows_the_sizes_it_is_given(pool: Any, layer: type[nn.Module], inner: str) -> None:
    for found, unknown in pool.run(2, of_two_lengths, layer, inner, timeout=280):
        assert max(found.values()) < EXACT, found
        assert not any(unknown) and (len(unknown) >= 12 or inner == "inductor"), unknown
