"""What blocks keep for backward waits in host memory: less is held, copies run beside the next block, and come back before it."""

from __future__ import annotations

import functools
import unittest.mock
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cpcompile
from cpcompile import _torch
from cpcompile.compile.offload import move_to_host
from cpcompile.errors import ConfigError
from cpcompile.inspect.explanation import memory_lines
from cpcompile.memory.ledger import Ledger
from cpcompile.options.config import Config
from tests.graph.test_memory import LAYERS, WIDTH, Block, Stack, held, tokens

cp = torch.ops.cpcompile
INVOKE = torch.ops.higher_order.invoke_subgraph
TOKENS = 1024  # of a rank of two
SHORT = {
    cp.to_host.default: "to",
    cp.from_host.default: "from",
    cp.wait_copy.default: "wait",
    cp.ring_attention.default: "attention",
    cp.ring_attention_backward.default: "attention backward",
    INVOKE: "call",
}


@functools.cache
def predicted(
    offload: str, memory_budget: float = 0.0, outlines: bool = False, kind: type[Stack] = Stack
) -> tuple[Ledger, fx.GraphModule, fx.GraphModule]:
    """Return what a step of a stack holds, with its forward and backward."""
    halves: list[fx.GraphModule] = []
    divide = _torch.divide

    def divided(*args: Any, **kwargs: Any) -> Any:
        halves.extend(found := divide(*args, **kwargs))
        return found

    with unittest.mock.patch.object(_torch, "divide", divided):
        options = {"strategy": "ring", "offload": offload, "memory_budget": memory_budget, "outline_layers": outlines}
        of = cpcompile.explain(kind(), tokens(2048), world_size=2, memory=True, **options).memory
    assert of is not None
    return of, *halves


def order_of(half: fx.GraphModule) -> list[str]:
    return [SHORT[node.target] for node in half.graph.nodes if node.target in SHORT]


def test_copies_run_beside_the_next_block() -> None:
    forward, backward = map(order_of, predicted("inputs")[1:])
    # A copy has the time of a block, and then what it was made of is free. The input of the last block stays.
    assert forward == ["to", "attention", "wait"] * (LAYERS - 1) + ["attention"]
    between = ["from", "wait", "attention backward"] * (LAYERS - 2)
    assert backward == ["from", "attention backward", *between, "wait", "attention backward"]


def test_copies_run_beside_the_next_call_of_a_layer() -> None:
    of, forward, backward = predicted("inputs", outlines=True)
    assert order_of(forward) == ["to", "call", "wait"] * (LAYERS - 1) + ["call"]
    between = ["from", "wait", "call"] * (LAYERS - 2)
    assert order_of(backward) == ["from", "call", *between, "wait", "call"]
    assert of.host == predicted("inputs")[0].host


def test_results_of_a_call_are_copied_beside_the_next() -> None:
    """Those of attention: its output and the log-sum-exp. They are there when the call has ended."""
    of, forward, backward = predicted("all", outlines=True)
    first, other = ["to", "call", "to", "to", "wait"], ["to", "call", "to", "to", "wait", "wait", "wait"]
    assert order_of(forward) == [*first, *other * (LAYERS - 2), "call", "wait", "wait"]
    come, wait = ["from"] * 3, ["wait"] * 3
    assert order_of(backward) == [*come, "call", *[*come, *wait, "call"] * (LAYERS - 2), *wait, "call"]
    assert of.host == predicted("all")[0].host
    for node in forward.graph.find_nodes(op="call_function", target=cp.wait_copy.default):
        assert node.args[2]


class Halved(Block):
    """A block of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class InTurn(Stack):
    """Blocks of two kinds in turn, so that a call holds two."""

    def __init__(self) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList(kind() for _ in range(LAYERS) for kind in (Block, Halved))


def test_what_enters_a_block_inside_of_a_call() -> None:
    _, forward, backward = predicted("inputs", outlines=True, kind=InTurn)
    assert order_of(forward) == ["to", "call", "to", "wait", *["to", "call", "to", "wait", "wait"] * 2, "call", "wait"]
    assert order_of(backward).count("from") == 2 * (LAYERS - 1)
    assert not [body for half in (forward, backward) for body in half.children() if {"to", "from"} & {*order_of(body)}]


def test_calls_that_compute_nothing_again_are_left_alone() -> None:
    of, forward, backward = predicted("all", memory_budget=1.0, outlines=True)
    assert of.host == 0 and {*order_of(forward), *order_of(backward)} == {"call"}


def test_a_second_run_changes_nothing() -> None:
    _, forward, backward = predicted("inputs")
    assert move_to_host(forward, backward, 1, offload="inputs") == 0


def test_every_order_is_a_dependency() -> None:
    """Compilers keep no order that they do not have to."""
    for half in predicted("inputs")[1:]:
        starts = [node for node in half.graph.nodes if node.target in (cp.to_host.default, cp.from_host.default)]
        waits = half.graph.find_nodes(op="call_function", target=cp.wait_copy.default)
        assert len(starts) == len(waits) == LAYERS - 1
        assert all(wait.args[2] for wait in waits)  # not before the block has been computed
        if starts[0].target is cp.to_host.default:  # not before the copy of the block before is made
            assert [start.args[1] for start in starts] == [[], [starts[0]], [starts[1]]]
        else:  # not before the block before is there, which is not read before this one has begun
            assert all(start.args[2] for start in starts)
            assert [[x for x in wait.args[2] if x in starts] for wait in waits] == [[starts[1]], [starts[2]], []]


@pytest.mark.parametrize("offload", ["inputs", "all"])
def test_the_ledger_knows_what_is_in_host_memory(offload: str) -> None:
    (kept, *_), (moved, *_) = predicted("none"), predicted(offload)
    # Of each block but the last what enters it; and what attention returns, with a number for each head.
    expected = (LAYERS - 1) * TOKENS * WIDTH * 4 * (1 if offload == "inputs" else 2 + 4 / WIDTH)
    assert kept.host == 0 and moved.host == expected
    # Those of two blocks may be held at once: one is waited for, and the next arrives.
    saved = max(held(kept, "saved")) - max(held(moved, "saved"))
    assert saved >= expected * (LAYERS - 3) / (LAYERS - 1)
    assert moved.phases[0].total < kept.phases[0].total and moved.phases[1].total < kept.phases[1].total
    assert "in host memory" in "".join(memory_lines(moved)) and "in host memory" not in "".join(memory_lines(kept))


def test_moves_nothing_of_blocks_that_keep_all() -> None:
    of, forward, backward = predicted("all", memory_budget=1.0)
    assert of.host == 0
    assert {*order_of(forward), *order_of(backward)} == {"attention", "attention backward"}


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="inner='eager' compiles none: use 'inductor'"):
        Config(offload="all", inner="eager")
    with pytest.raises(ConfigError, match="offload='input' is not an option"):
        Config(offload="input")
