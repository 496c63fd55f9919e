"""The record of messages on gloo ranks: ranks record the same, and one that does not come is named while the others wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

import cpcompile
from cpcompile.front.message_comparison import compare_messages
from cpcompile.front.messages import Messages, start_on
from tests.models import batch, loss_of, make

ops = torch.ops.cpcompile


def step(rank: Any) -> Messages:
    """Run a step, and return what is recorded."""
    torch._dynamo.reset()
    model = make("llama", num_layers=2)
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", strategy="ring", balancer="zig_zag")
    loss_of(model(**batch(model, 24))).backward()
    return cpcompile.last_messages()


def test_ranks_record_the_same(pool: Any) -> None:
    first, second = pool.run(2, step)
    assert [(m.number, m.operator, m.layer, m.is_backward, m.ranks) for m in first] == [
        (m.number, m.operator, m.layer, m.is_backward, m.ranks) for m in second
    ]
    assert {m.state for m in first} == {"done"}
    attentions = [(m.operator, m.layer, m.is_backward) for m in first if "attention" in m.operator]
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert attentions[-4:] == [
        *(("ring_attention", layer, False) for layer in layers),
        *(("ring_attention_backward", layer, True) for layer in reversed(layers)),
    ]
    assert {"compare_ranks", "all_reduce", "sum_gradients"} <= {m.operator for m in first}
    assert compare_messages({0: first, 1: second}).startswith("no rank is behind")


def wait_for_one(rank: Any) -> Messages:
    """Rank 1 comes late to the second operator; return what each rank has recorded meanwhile."""
    axis = {"length": 8, "layout": "zig_zag", "world_size": 2, "group": rank.group}
    q = torch.randn(1, 2, 4, 4)
    ops.ring_attention(q, q, q, None, None, None, 1.0, True, 0, 0.0, **axis, layer="layers.3.mixer")
    processes = [0, 0]
    dist.all_gather_object(processes, os.getpid(), group=rank.process_group)
    if rank.rank == 1:
        time.sleep(0.5)
        os.kill(processes[0], signal.SIGUSR1)
        time.sleep(0.5)
        seen = cpcompile.last_messages(1)
        ops.all_reduce(torch.ones(2), 2, rank.group)
        return seen
    found, told = list[Messages](), threading.Event()

    def look() -> None:
        found.append(cpcompile.last_messages(2))
        told.set()

    start_on(signal.SIGUSR1, look)
    ops.all_reduce(torch.ones(2), 2, rank.group)
    assert told.wait(10)
    return found[0]


def test_the_rank_that_does_not_come_is_named(pool: Any) -> None:
    first, second = pool.run(2, wait_for_one)
    number = second[-1].number
    assert compare_messages({0: first, 1: second}) == (
        f"rank 1 is behind: the last message there is {number}, ring_attention of layers.3.mixer (done); "
        f"rank 0 has come to {number + 1}, all_reduce (running)."
    )
    assert 0.1 < first[-1].seconds < 5.0


def wait_outside(rank: Any) -> Messages:
    """Rank 1 comes late to a collective that is none of cpcompile's; return what each rank has recorded meanwhile."""
    ops.all_reduce(torch.ones(2), 2, rank.group)
    if rank.rank == 1:
        time.sleep(2.0)
        seen = cpcompile.last_messages(1)
        dist.all_reduce(torch.ones(4), group=rank.process_group)
        return seen
    work = dist.all_reduce(torch.ones(4), group=rank.process_group, async_op=True)
    time.sleep(1.3)
    found = cpcompile.last_messages(1)
    assert work is not None
    work.wait()
    return found


def test_the_rank_that_does_not_come_to_a_collective_of_others_is_named(pool: Any) -> None:
    first, second = pool.run(2, wait_outside)
    (waits,) = first.collectives
    assert (waits.operator, waits.ranks, second.collectives) == ("gloo:all_reduce", (0, 1), ())
    assert 1.0 < waits.seconds < 5.0
    assert (
        compare_messages({0: first, 1: second})
        == f"rank 1 is behind: rank 0 waits in {waits}, to which it has not come."
    )
