"""The time of a step: kernels by the bytes that they move, products by their operations, messages where nothing hides them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cpcompile
from cpcompile.choose.machine import MACHINES
from cpcompile.choose.rates import BYTES, LATENCY, MEMORY, PRODUCTS, SLOWDOWN
from cpcompile.inspect.kernel_time import MEMORY as MOVING
from cpcompile.inspect.kernel_time import PRODUCTS as MULTIPLYING
from cpcompile.inspect.kernel_time import KernelTime, Spent, Transfer
from cpcompile.inspect.step_time import StepTime, parameters_sent, seconds_of
from tests.graph.test_memory import VOCABULARY, Stack, graph_of, tokens

H200 = MACHINES["h200"]
MATRIX = 4 * 64 * 64  # bytes


def spent(function: Any, *shapes: tuple[int, ...]) -> Spent:
    return KernelTime(H200, ranks=2).of(graph_of(function, *shapes).graph)


def moved(function: Any, *shapes: tuple[int, ...]) -> float:
    """The bytes that kernels read and write, in matrices of 64 x 64."""
    found = spent(function, *shapes)
    assert set(found.seconds) == {MOVING}
    return found.seconds[MOVING] * H200.bandwidth / MATRIX


def step_of(model: nn.Module, length: int = 256, **options: Any) -> StepTime:
    found = cpcompile.explain(model, tokens(length), **{"world_size": 2, "memory": True} | options).step
    assert found is not None
    return found


def test_a_chain_reads_its_operands_and_writes_its_result() -> None:
    size = (64, 64)
    assert moved(lambda a, b: (a.sin() * b).cos() + 1, size, size) == 3
    assert moved(lambda a: (a.sin(), a.cos()), size) == 3  # one kernel, which reads it once


def test_a_norm_is_one_kernel() -> None:
    assert moved(lambda a: a * a.square().mean(-1, keepdim=True).rsqrt(), (64, 64)) == 2


def test_of_a_table_the_rows_that_are_looked_up() -> None:
    """A thousandth of the table is read, and as much written; the numbers of the rows are a few bytes more."""
    gm = fx.experimental.proxy_tensor.make_fx(lambda table, rows: table[rows], tracing_mode="fake")(
        torch.empty(64000, 64), torch.zeros(64, dtype=torch.int64)
    )
    found = KernelTime(H200, ranks=2).of(gm.graph)
    assert found.seconds.total() * H200.bandwidth == 2 * MATRIX + 64 * 8


def test_a_product_takes_its_operations_or_the_memory_that_it_moves() -> None:
    large = spent(lambda a, b: a @ b, (4096, 4096), (4096, 4096))
    assert large.seconds == {MULTIPLYING: pytest.approx(2 * 4096**3 / H200.products)}
    thin = spent(lambda a, b: a @ b, (4096, 4096), (4096, 1))
    assert thin.seconds == {MULTIPLYING: pytest.approx(4 * (4096**2 + 2 * 4096) / H200.bandwidth)}


def test_products_of_a_step_are_those_of_forward_three_times() -> None:
    """By hand, of a rank: four products of a block and the head; the embedding has none."""
    found = step_of(Stack(2), loss_chunk=0)
    of_token = 2 * (3 + 1 + 4 + 4) * 64 * 64 + 64 * VOCABULARY
    assert found.seconds["products"] == pytest.approx(3 * 2 * 128 * of_token / PRODUCTS["cpu"])


def test_a_loss_in_chunks_has_the_products_of_the_whole_one() -> None:
    whole, chunked = (step_of(Stack(2), loss_chunk=chunk) for chunk in (0, 32))
    assert chunked.seconds["products"] == pytest.approx(whole.seconds["products"])
    # Four chunks add to the gradient of the weight.
    assert chunked.seconds["memory-bound"] > whole.seconds["memory-bound"]


def test_tiles_compute_again_what_they_computed_in_forward() -> None:
    plain, tiled = (step_of(Stack(2), tile=tile, loss_chunk=0) for tile in (0, 32))
    assert tiled.seconds["products"] == pytest.approx(plain.seconds["products"])
    of_mlp = 2 * 2 * 128 * 2 * 4 * 64 * 64 / PRODUCTS["cpu"]
    assert tiled.seconds["computed again"] - plain.seconds["computed again"] == pytest.approx(of_mlp, rel=0.5)


class Checkpointed(Stack):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_checkpoints_compute_again() -> None:
    """Of a block the product of q, k and v, that of the output and the first of the MLP: the last is read by nobody."""
    plain, again = step_of(Stack(2)), step_of(Checkpointed(2))
    assert again.seconds["products"] == pytest.approx(plain.seconds["products"])
    products = 2 * 2 * 128 * (3 + 1 + 4) * 64 * 64 / PRODUCTS["cpu"]
    assert again.seconds["computed again"] - plain.seconds["computed again"] == pytest.approx(products, rel=0.2)


def test_equal_layers_take_as_much_when_they_are_compiled_once() -> None:
    once, each = (step_of(Checkpointed(6), outline_layers=outline) for outline in (True, False))
    assert once.total == pytest.approx(each.total, rel=0.05)


def test_the_optimizer_reads_and_writes_its_states() -> None:
    adamw, plain = (step_of(Stack(2), optimizer_states=n).seconds["optimizer"] for n in (2, 0))
    count = sum(p.numel() for p in Stack(2).parameters())
    assert plain == pytest.approx(3 * 4 * count / MEMORY["cpu"], rel=0.01)
    assert adamw / plain == pytest.approx(7 / 3)


def test_what_nothing_hides_is_waited_for() -> None:
    """By hand: three gathers of a second; the first is waited for, and of the others what lasts longer than computation."""
    one = Transfer(int((1 - LATENCY) * H200.p2p), 2)
    assert seconds_of(one, H200) == pytest.approx(1)
    gathers = Spent(Counter(), [one] * 3)
    assert parameters_sent(gathers, H200, 10.0, 0, prefetch=1) == pytest.approx((1 + 2 * SLOWDOWN, 2))
    assert parameters_sent(gathers, H200, 0.5, 0, prefetch=1) == pytest.approx((1 + 1.5 + 0.5 * SLOWDOWN, 0.5))
    assert parameters_sent(gathers, H200, 10.0, 0, prefetch=0) == pytest.approx((3, 0))
    assert parameters_sent(Spent(), H200, 10.0, 0, prefetch=1) == (0, 0)


def test_parameters_that_are_sharded_travel() -> None:
    """By hand: a rank sends half of what is gathered, all weights in forward, and as many bytes of their gradients."""
    model = Stack(2)
    found, whole = (step_of(model, fully_sharded=x, prefetch=0) for x in (cpcompile.FullySharded(2), None))
    assert found.hidden == 0
    count = sum(p.numel() for p in model.parameters())
    assert found.seconds["messages"] > 2 * 4 * count / 2 / BYTES["cpu"]  # and what backward gathers once more
    assert found.seconds["optimizer"] == pytest.approx(whole.seconds["optimizer"] / 2, rel=0.01)


def test_what_takes_no_gradient_has_no_step() -> None:
    model = Stack(1).requires_grad_(False)
    assert cpcompile.explain(model, tokens(64), world_size=2, memory=True).step is None


def test_text_json_and_report_tell_it() -> None:
    model, inputs = (x.to("meta") if isinstance(x, nn.Module) else x for x in (Stack(2), tokens(256)))
    plan = cpcompile.explain(
        model, {name: x.to("meta") for name, x in inputs.items()}, world_size=2, memory=True, device="h200"
    )
    assert plan.step is not None
    assert set(plan.step.seconds) == {
        "attention",
        "products",
        "memory-bound",
        "computed again",
        "messages",
        "optimizer",
    }
    assert plan.step.total == pytest.approx(sum(plan.step.seconds.values()))
    assert plan.step.tokens_per_second == pytest.approx(256 / 2 / plan.step.total)
    text, data, html = str(plan), plan.to_dict()["step"], plan.to_html()
    for kind in ("attention", "products", "memory-bound", "optimizer"):
        assert kind in text and kind in html
    assert data["total"] == plan.step.total and "tokens_per_second" in data
    assert "a training step is estimated to take" in text and "tokens/s of each GPU" in html
    assert cpcompile.explain(Stack(1), tokens(64), world_size=2).step is None


def test_a_batch_counts_all_its_tokens() -> None:
    ids = torch.zeros(3, 64, dtype=torch.int64)
    plan = cpcompile.explain(Stack(1), {"input_ids": ids, "labels": ids}, world_size=2, memory=True)
    assert plan.step is not None and plan.step.tokens == 3 * 64
