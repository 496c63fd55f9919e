"""Messages that ranks lay in memory that they share: attention through them, reuse and growth of slots, and who chooses this."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpcompile.balance.layout import LAYOUTS
from cpcompile.runtime.transport import choice as transport
from cpcompile.runtime.transport.post import Ring, new_message, post, set_transport, transport_of
from cpcompile.runtime.transport.symmetric import Lane, Slot
from tests.gloo import test_attention
from tests.gloo.late_device import LateDevice

NAMES = (
    "causal",
    "short",
    "heads_9_3",
    "window",
    "documents",
    "bounds",
    "bounds_window",
    "prefix_window",
    "everything",
)
CASES = {name: test_attention.CASES[name] for name in NAMES}


@contextmanager
def shared(groups: list[str], device: LateDevice) -> Iterator[None]:
    """Let messages of CPU tensors go through shared memory."""
    transport.DEVICES["cpu"] = lambda _: device
    for group in groups:
        set_transport(group, "symmetric")
    try:
        yield
    finally:
        del transport.DEVICES["cpu"]
        for group in groups:
            set_transport(group, "auto")


def attend(rank: Any, strategy: str, layout: str, cases: dict[str, dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Run the operators through shared memory, one after the other."""
    name, _, number = strategy.partition("_")
    groups = [group for group in rank.grid(int(number)) if group] if name == "usp" else [rank.group]
    with shared(groups, LateDevice(0.002, seed=rank.rank)):
        results = test_attention.attend(rank, strategy, layout, cases)
        assert {transport_of(group) for group in groups} == {"symmetric"}
    return results


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        *(
            pytest.param(size, name, marks=() if size == 3 else pytest.mark.slow)
            for size in (2, 3, 4)
            for name in ("ring", "gather", "gather_1", "halo", "ulysses")
        ),
        (4, "usp_2"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_whole_attention(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    test_attention.check(pool, strategy, layout, world_size, CASES, attend)


class HastyLane(Lane):
    """Takes a slot again as soon as the last copy from it has been started."""

    def close(self, slot: Slot) -> None:
        super().close(slot)
        passed = self.device.aside(lambda: None)
        self._free.extendleft((read, passed) for read in self._read)
        self._read.clear()


def values(rank: int, index: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a rank says in its message `index`."""
    return (torch.arange(numel) % 97 + 1000 * index + 100 * rank).to(dtype)


def exchange(rank: Any, num_rounds: int, has_barriers: bool, is_hasty: bool, captures: bool) -> tuple[int, int, int]:
    """Fetch a message in several steps, with another one exchanged between each, as the backward of a ring does.

    Messages grow from round to round, and those in between have another size on each rank. The copies of rank 0 come late.
    With `captures`, they do not grow, and every other round lays them as in a graph.
    Return how many arrived wrong, how often memory was taken, and the slots that are left.
    """
    ring = Ring.of(rank.group, rank.world_size)
    symmetric_lane, transport.Lane = transport.Lane, HastyLane if is_hasty else Lane
    device = LateDevice(0.002 if rank.rank else 0.02, rank.rank, has_barriers)
    num_wrong, index = 0, 0

    def check(x: torch.Tensor, source: int, message: int, start: int) -> None:
        nonlocal num_wrong
        num_wrong += not torch.equal(x, values(source, message, start + x.numel(), x.dtype)[start:])

    with shared([rank.group], device):
        for i in range(num_rounds):
            device.captures = captures and i > 1 and i % 3 > 0
            keys_index, keys_size = (index := index + 1), 1000 + 300_000 * (0 if captures else i // 2)
            message = new_message(keys_size, torch.empty(0, dtype=torch.float64), ring)
            keys = post(message.copy_(values(ring.rank, index, keys_size, torch.float64)), ring, ring.size - 1)
            for step in range(1, ring.size):
                part = slice(step, keys_size - 5)
                into = torch.empty(part.stop - part.start, dtype=torch.float64)
                fetching = keys.start([step], [[into]], lambda *_, part=part: [part])
                index += 1
                size = 500 + 10 * ring.rank
                message = new_message(size, torch.empty(0, dtype=torch.float32), ring, 500 + 10 * ring.size)
                between = post(message.copy_(values(ring.rank, index, size, torch.float32)), ring, 1)
                source = ring.before(ring.size - step)
                small = torch.empty(500 + 10 * source)
                coming = between.start([ring.size - step], [[small]], lambda _, s: [slice(0, 500 + 10 * s)])
                fetching.wait()
                check(into, ring.before(step), keys_index, step)
                coming.wait()
                check(small, source, index, 0)
        found = transport.lane_of(ring, message.device)
        assert found is not None
        num_slots = len(found._free) + len(found._read)
    transport.Lane = symmetric_lane
    return num_wrong, device.num_memories, num_slots


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_no_message_is_overwritten_while_it_is_read(pool: Any, world_size: int) -> None:
    for num_wrong, num_memories, num_slots in pool.run(world_size, exchange, 8, True, False, False):
        assert num_wrong == 0
        assert num_slots <= 3
        assert num_memories <= 1 + 3 * 4  # a trial, and each slot for some of four sizes


def test_graphs_and_other_work_overwrite_no_message_of_each_other(pool: Any) -> None:
    for num_wrong, num_memories, _ in pool.run(3, exchange, 14, True, False, True):
        assert num_wrong == 0
        assert num_memories <= 1 + 3


def test_without_barriers_messages_arrive_wrong(pool: Any) -> None:
    assert sum(wrong for wrong, _, _ in pool.run(3, exchange, 8, False, False, False)) > 5


def test_slots_taken_again_at_once_make_messages_wrong(pool: Any) -> None:
    assert sum(wrong for wrong, _, _ in pool.run(3, exchange, 8, True, True, False)) > 5


def capture_first(rank: Any) -> str:
    """Lay a message as in a graph that is larger than those before."""
    ring, device, like = Ring.of(rank.group, rank.world_size), LateDevice(0.0, 0), torch.empty(0)
    with shared([rank.group], device):
        for numel in (4, 2**20):
            into = torch.empty(numel)
            try:
                post(new_message(numel, like, ring), ring, 1).start(
                    [1], [[into]], lambda _, s, n=numel: [slice(n)]
                ).wait()
            except RuntimeError as error:
                return str(error)
            device.captures = True
    return ""


def test_a_graph_takes_no_memory(pool: Any) -> None:
    for error in pool.run(2, capture_first):
        assert "before capturing them" in error


def leave_group(rank: Any) -> tuple[int, int]:
    """Return how many choices are known before and after a group ends."""
    group = dist.new_group(range(rank.world_size))
    name = str(group.group_name)
    with shared([name], LateDevice(0.0, 0)):
        new_message(4, torch.empty(0), Ring.of(name, rank.world_size))
        before = sum(key[0] == name for key in transport._chosen)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        return before, sum(key[0] == name for key in transport._chosen)


def test_memory_ends_with_its_group(pool: Any) -> None:
    assert pool.run(4, leave_group) == [(1, 0)] * 4


def choose(rank: Any, wanted: list[str], hosts: list[str], broken: int | None) -> tuple[str, list[str]]:
    """Lay a message; return the transport and what was logged, or the error."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("cpcompile.runtime.transport.choice")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    real, socket.gethostname = socket.gethostname, lambda: hosts[rank.rank]

    class Device(LateDevice):
        def memory(self, num_bytes: int, group: str) -> Any:
            if broken is not None:  # in each rank's own way
                raise RuntimeError("no handle for it\nmore" if rank.rank == broken else "the handle of another rank")
            return super().memory(num_bytes, group)

    try:
        with shared([rank.group], Device(0.0, 0)):
            set_transport(rank.group, wanted[rank.rank])
            ring = Ring.of(rank.group, rank.world_size)
            for _ in range(2):
                message, into = new_message(4, torch.empty(0), ring), torch.empty(4)
                post(message.fill_(1), ring, 1).start([1], [[into]], lambda *_: [slice(4)]).wait()
            return transport_of(rank.group), lines
    except ValueError as error:
        return str(error), lines
    finally:
        socket.gethostname = real
        log.removeHandler(handler)


@pytest.mark.parametrize("wanted", ["auto", "symmetric"])
def test_ranks_of_one_host_share_memory(pool: Any, wanted: str) -> None:
    assert pool.run(3, choose, [wanted] * 3, ["a"] * 3, None) == [("symmetric", [])] * 3


def test_p2p_shares_no_memory(pool: Any) -> None:
    assert pool.run(2, choose, ["p2p"] * 2, ["a"] * 2, None) == [("p2p", [])] * 2


@pytest.mark.parametrize(
    ("hosts", "broken", "reason"),
    [(["a", "a", "b"], None, "its ranks are on 2 hosts (a, b)"), (["a"] * 3, 0, "no handle for it")],
)
def test_auto_sends_where_memory_cannot_be_shared_and_says_so_once(
    pool: Any, hosts: list[str], broken: int | None, reason: str
) -> None:
    for found, lines in pool.run(3, choose, ["auto"] * 3, hosts, broken):
        assert found == "p2p"
        assert len(lines) == 1 and lines[0].endswith(f"because {reason}")
    for found, _ in pool.run(3, choose, ["symmetric"] * 3, hosts, broken):
        assert found.startswith("transport 'symmetric' does not work") and reason in found


def test_ranks_must_choose_alike(pool: Any) -> None:
    for found, _ in pool.run(2, choose, ["auto", "p2p"], ["a"] * 2, None):
        assert "chose different transports: ['auto', 'p2p']" in found


def test_names_of_transports() -> None:
    with pytest.raises(ValueError, match="'auto', 'symmetric', 'p2p'"):
        set_transport("", "nvlink")


def lay_on_the_host(rank: Any) -> tuple[str, str]:
    """Ask for shared memory where there is none."""
    ring = Ring.of(rank.group, rank.world_size)
    set_transport(rank.group, "symmetric")
    try:
        new_message(1, torch.empty(0), ring)
    except ValueError as error:
        return str(error), transport_of(rank.group)
    finally:
        set_transport(rank.group, "auto")
    return "", transport_of(rank.group)


def test_cpu_tensors_have_no_symmetric_memory(pool: Any) -> None:
    for error, found in pool.run(2, lay_on_the_host):
        assert "cpu tensors have none" in error
        assert found == "symmetric"
