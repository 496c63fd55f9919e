"""The order of operations in which parameters travel beside computation."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile._torch import OverlapPass
from cpcompile.compile.overlap import Transfer, overlapped


class Program:
    """Operations by name, each behind those that it needs."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.needs: list[set[int]] = []
        self.gathers: list[Transfer] = []
        self.sums: list[Transfer] = []

    def add(self, name: str, *needs: int) -> int:
        self.names.append(name)
        self.needs.append(set(needs))
        return len(self.names) - 1

    def layer(self, index: int, x: int, size: int = 4) -> int:
        """A parameter is cast, gathered and multiplied with."""
        start = self.add(f"gather {index}", self.add(f"cast {index}"))
        wait = self.add(f"wait {index}", start)
        self.gathers.append(Transfer(start, wait, size))
        return self.add(f"mm {index}", x, wait)

    def unit(self, index: int, x: int, size: int = 4) -> int:
        """Two parameters are cast, gathered by one collective and multiplied with, one after the other."""
        start = self.add(f"gather {index}", self.add(f"cast {index}"))
        for name in ("a", "b"):
            wait = self.add(f"wait {name} {index}", start)
            self.gathers.append(Transfer(start, wait, size))
            x = self.add(f"mm {name} {index}", x, wait)
        return x

    def gradient(self, index: int, x: int, size: int = 4) -> int:
        """A gradient is computed, summed and scattered, and cast."""
        start = self.add(f"sum {index}", self.add(f"grad {index}", x))
        wait = self.add(f"wait {index}", start)
        self.sums.append(Transfer(start, wait, size))
        return self.add(f"cast {index}", wait)

    def gradients(self, index: int, x: int, size: int = 4) -> None:
        """Two gradients are computed, and summed and scattered by one collective."""
        start = self.add(f"sum {index}", self.add(f"grad {index}", x))
        for name in ("a", "b"):
            self.sums.append(Transfer(start, self.add(f"wait {name} {index}", start), size))

    def order(self, limit: int) -> list[str]:
        return [self.names[i] for i in overlapped(self.needs, self.gathers, self.sums, limit)]


def test_a_gather_starts_while_the_one_before_is_used() -> None:
    program = Program()
    x = program.add("x")
    for index in range(3):
        x = program.layer(index, x)
    assert program.order(0) == [
        *("cast 0", "gather 0", "x"),
        *("wait 0", "cast 1", "gather 1", "mm 0"),
        *("wait 1", "cast 2", "gather 2", "mm 1"),
        *("wait 2", "mm 2"),
    ]
    assert program.order(4) == program.order(0)  # what is used now is not in flight
    assert program.order(5)[:6] == ["cast 0", "gather 0", "cast 1", "gather 1", "x", "wait 0"]
    assert program.order(5)[6:8] == ["cast 2", "gather 2"]


def test_parameters_that_travel_together() -> None:
    program = Program()
    x = program.add("x")
    for index in range(3):
        x = program.unit(index, x)
    assert program.order(8) == [
        *("cast 0", "gather 0", "x"),
        *("wait a 0", "cast 1", "gather 1", "mm a 0", "wait b 0", "mm b 0"),
        *("wait a 1", "cast 2", "gather 2", "mm a 1", "wait b 1", "mm b 1"),
        *("wait a 2", "mm a 2", "wait b 2", "mm b 2"),
    ]


def test_a_sum_is_waited_for_behind_the_next_ones() -> None:
    program = Program()
    x = program.add("x")
    for index in range(3):
        x = program.add(f"mm {index}", x)
        program.gradient(index, x)
    assert program.order(4) == [
        *("x", "mm 0", "grad 0", "sum 0", "mm 1", "grad 1", "sum 1", "mm 2", "grad 2", "sum 2"),
        *("wait 0", "cast 0", "wait 1", "cast 1", "wait 2", "cast 2"),
    ]
    assert program.order(0)[7:] == [
        "wait 0",
        "cast 0",
        "mm 2",
        "grad 2",
        "sum 2",
        "wait 1",
        "cast 1",
        "wait 2",
        "cast 2",
    ]


def test_sums_that_travel_together_are_waited_for_behind_the_next_ones() -> None:
    program = Program()
    x = program.add("x")
    for index in range(3):
        x = program.add(f"mm {index}", x)
        program.gradients(index, x)
    assert program.order(1) == [
        *("x", "mm 0", "grad 0", "sum 0", "mm 1", "grad 1", "sum 1", "wait a 0", "wait b 0"),
        *("mm 2", "grad 2", "sum 2", "wait a 1", "wait b 1", "wait a 2", "wait b 2"),
    ]


def test_a_collective_that_needs_a_sum_does_not_wait() -> None:
    program = Program()
    x = program.add("x")
    scattered = program.gradient(0, x)
    program.add("sum over replicas", scattered)
    program.add("mm", x)
    fixed = {program.names.index("sum over replicas")}
    order = [program.names[i] for i in overlapped(program.needs, [], program.sums, 100, fixed=fixed)]
    assert order.index("sum over replicas") < order.index("mm")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    program = Program()
    results = [program.add("x")]
    for index in range(draw(st.integers(1, 12))):
        kind, size = draw(st.sampled_from(["layer", "unit", "gradient", "other"])), draw(st.integers(1, 9))
        x = draw(st.sampled_from(results))
        if kind == "layer":
            results.append(program.layer(index, x, size))
        elif kind == "unit":
            results.append(program.unit(index, x, size))
        elif kind == "gradient":
            reduced = program.gradient(index, x, size)
            if draw(st.booleans()):
                results.append(reduced)
        else:
            results.append(program.add("other", x, draw(st.sampled_from(results))))
    return program


@settings(deadline=None, max_examples=200)
@given(programs(), st.integers(0, 20))
def test_every_order_is_of_the_same_program(program: Program, limit: int) -> None:
    order = overlapped(program.needs, program.gathers, program.sums, limit)
    assert sorted(order) == list(range(len(program.names)))
    place = {i: position for position, i in enumerate(order)}
    assert all(place[need] < place[i] for i, needs in enumerate(program.needs) for need in needs)
    # At most the limit is in flight beside the transfer that started last.
    for start, _, _ in program.gathers:
        others = [size for at, wait, size in program.gathers if place[at] < place[start] < place[wait]]
        first = min(place[wait] for at, wait, _ in program.gathers if at == start)
        assert sum(others) < max(limit, 1) or first == place[start] + 1  # it is needed now


def test_order_of_a_compiled_program() -> None:
    """Three layers of sharded weights, for a rank of two whose collectives do nothing: what Inductor runs, in order.

    A function that cannot be pickled keeps the program out of Inductor's caches.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group = dist.group.WORLD.group_name
        seen = []

        def recorded(*args: Any, **kwargs: Any) -> list[int]:
            order = overlapped(*args, **kwargs)
            place = {i: position for position, i in enumerate(order)}
            seen.append([[(place[start], place[wait]) for start, wait, _ in transfers] for transfers in args[1:3]])
            return order

        def model(x: Tensor, weights: list[Tensor]) -> Tensor:
            for weight in weights:
                options = [32, 32], 0, 2, group, 1, "", torch.float32, torch.float32, 1.0
                x = torch.tanh(x @ torch.ops.cpcompile.unshard_parameter(weight, *options))
            return x.sum()

        weights = [torch.randn(16, 32, requires_grad=True) for _ in range(3)]
        overlap = OverlapPass(recorded, 32 * 32 * 4, frozenset([group]))
        with torch._inductor.config.patch(overlap.options):
            torch.compile(model)(torch.randn(32, 32), weights).backward()
    finally:
        dist.destroy_process_group()
    (gathers, none), (again, sums) = seen
    assert len(gathers) == len(sums) == 3 and not none and not again
    assert (
        gathers[0][1] < gathers[1][0] < gathers[1][1] < gathers[2][0]
    )  # one and no more is under way beside what is used
    assert sums[1][0] < sums[0][1]


def test_pickled_for_the_caches_of_inductor() -> None:
    overlap = OverlapPass(overlapped, 10, frozenset(["0"]))
    assert pickle.loads(pickle.dumps(overlap)) == overlap
