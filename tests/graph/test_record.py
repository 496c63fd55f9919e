"""The record of messages: what sends is recorded in order, the last 256 stay, and the rank that is behind is named."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import timeit
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import cpcompile
from cpcompile import _torch
from cpcompile._torch import flight_recorder
from cpcompile.errors import ConfigError
from cpcompile.front.message_comparison import compare_messages
from cpcompile.front.messages import Collective, Message, Messages, print_messages_on
from cpcompile.runtime import record, traffic
from tests.graph.test_profile import run_attentions

LAYER = "layers.3.mixer"


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin and end without entries."""
    for name in ("_ROWS", "_NUMBERS", "_COUNTS"):
        getattr(record, name).clear()
    yield
    for name in ("_ROWS", "_NUMBERS", "_COUNTS"):
        getattr(record, name).clear()


def send(operator: str, group: str = "a", layer: str = "", run: Any = lambda: None, x: Any = None) -> None:
    record.call(operator, group, x, layer, run, (), {})


def test_the_last_are_kept_in_order_and_groups_count_for_themselves() -> None:
    for number in range(record.SIZE):
        send("ring_attention", layer=str(number))
    send("all_reduce", "b", x=torch.zeros(3))
    found = record.entries()
    assert [each.layer for each in found[:2]] == ["1", "2"]
    assert [each.number for each in found[-2:]] == [256, 1]
    assert found[-1][1:8] == ("all_reduce", "", "b", 12, -1, -1, found[-1].start)
    assert len(found) == len(cpcompile.last_messages()) == 256
    assert [m.operator for m in cpcompile.last_messages(2)] == ["ring_attention", "all_reduce"]


def test_states() -> None:
    def fail() -> None:
        assert record.entries()[-1].state == "running"
        raise KeyError

    with pytest.raises(KeyError):
        send("gather_tokens", run=fail)
    with pytest.raises(KeyError), record.recorded("compare_ranks", "a"):
        fail()
    send("all_reduce")
    assert [m.state for m in cpcompile.last_messages()] == ["failed", "failed", "done"]


class Event:
    """Behind an operator of a GPU that ends when the test says so."""

    has_ended = False

    def record(self, stream: Any) -> None:
        self.has_ended = False

    def query(self) -> bool:
        return self.has_ended


class OnGpu:
    """The operand of an operator that a GPU computes."""

    nbytes = 4

    def get_device(self) -> int:
        return 0


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Stand in for those of a GPU."""
    made = [Event() for _ in range(2 * record.SIZE)]
    monkeypatch.setattr(record, "_EVENTS", {0: made})
    monkeypatch.setattr(record, "_TURNS", itertools.count())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_a_gpu_has_not_ended_what_the_host_has_launched(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        send("ring_attention", x=OnGpu())
    events[0].has_ended = True
    assert [m.state for m in cpcompile.last_messages()] == ["done", "launched", "launched"]
    for _ in range(3 * record.SIZE):
        send("ring_attention", x=OnGpu())
    assert len({id(each.event) for each in record.entries()}) == record.SIZE  # used again, when their row has gone
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    send("all_reduce", x=OnGpu())
    assert record.entries()[-1].event is None
    assert cpcompile.last_messages()[-1].state == "launched"


def test_the_gpu_that_is_behind_is_named() -> None:
    def of(rank: int, ended: int) -> Messages:
        states = ["done"] * ended + ["launched"] * (3 - ended)
        messages = [
            Message(i + 1, "ring_attention", LAYER, False, (0, 1), 4, 1.0, state) for i, state in enumerate(states)
        ]
        return Messages(rank, tuple(messages), {})

    assert compare_messages({0: of(0, 2), 1: of(1, 1)}) == (
        f"rank 1 is behind: message 2, ring_attention of {LAYER} (launched), has not ended there; "
        f"rank 0 has come to 3, ring_attention of {LAYER} (launched)."
    )
    assert compare_messages({0: of(0, 1), 1: of(1, 1)}).startswith("no rank is behind: all 2 have come to message 2, ")
    assert compare_messages({0: of(0, 3), 1: of(1, 3)}).startswith("no rank is behind: all 2 have come to message 3, ")


def test_the_rank_that_misses_a_collective_of_others_is_named() -> None:
    message = Message(7, "all_reduce", "", False, (0, 1), 4, 9.0, "done")
    waits = Collective(13, "nccl:all_gather", "fsdp", (0, 1), 8.0, True)
    first, second = Messages(0, (message,), {}, (waits,)), Messages(1, (message,), {})
    assert str(first).splitlines()[-1] == "  not ended: nccl:all_gather 13 of fsdp (ranks 0,1, begun), 8 s ago"
    assert compare_messages({0: first, 1: second}) == (
        "rank 1 is behind: rank 0 waits in nccl:all_gather 13 of fsdp (ranks 0,1, begun), to which it has not come."
    )
    at_once = replace(waits, seconds=0.2)  # the other rank was asked a moment before
    assert compare_messages({0: replace(first, collectives=(at_once,)), 1: second}).startswith("no rank is behind")
    both = Messages(1, (message,), {}, (waits,))
    assert compare_messages({0: first, 1: both}).startswith("no rank is behind")


def test_groups_of_the_same_ranks_and_description_are_told_apart() -> None:
    message = Message(7, "all_reduce", "", False, (0, 1), 4, 9.0, "done")
    first, second = (
        Collective(1, "gloo:all_reduce", "undefined", (0, 1), 9.0 - rank, False, f"{rank + 1}") for rank in range(2)
    )
    of_ranks = {0: Messages(0, (message,), {}, (first,)), 1: Messages(1, (message,), {}, (second,))}
    assert compare_messages(of_ranks).startswith("rank 1 is behind: rank 0 waits in gloo:all_reduce 1 of undefined")


def test_a_collective_of_a_destroyed_group_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = flight_recorder.Collective(2, "gloo:all_reduce", "17", "mine", 0.5, False)
    monkeypatch.setattr(_torch, "unfinished_collectives", lambda: [stale])
    assert cpcompile.last_messages().collectives == ()


def test_backward_is_told_from_forward() -> None:
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: send("all_reduce"))
    send("all_reduce")
    x.sum().backward()
    assert [m.is_backward for m in cpcompile.last_messages()] == [False, True]
    assert cpcompile.last_messages().counts == {("all_reduce", "", False): 1, ("all_reduce", "", True): 1}


def test_nothing_is_recorded_with_one_rank() -> None:
    run_attentions()
    torch.ops.cpcompile.all_reduce(torch.ones(2), 1, "")
    assert not record.entries()
    assert str(cpcompile.last_messages()) == "rank 0: no message was sent"


def test_every_operator_that_sends_is_recorded() -> None:
    assert set(traffic._COUNTS) <= record.RECORDED
    backwards = {f"{name}_backward" for name in traffic._COUNTS if hasattr(torch.ops.cpcompile, f"{name}_backward")}
    assert len(backwards) > 8
    assert backwards <= record.RECORDED


def test_an_entry_costs_microseconds() -> None:
    seconds = min(timeit.repeat(lambda: send("all_reduce"), number=100, repeat=20)) / 100
    assert seconds < 20e-6  # about one, on a machine that does nothing else


def test_the_table() -> None:
    send("ring_attention", layer=LAYER, x=torch.zeros(256))
    head, names, row = str(cpcompile.last_messages()).splitlines()
    assert head == "rank 0: the last messages"
    assert names.split() == [
        "number",
        "operator",
        "layer",
        "direction",
        "first",
        "operand",
        "group",
        "started",
        "state",
    ]
    assert row.split()[:6] == ["1", "ring_attention", LAYER, "forward", "1", "KiB"]
    assert row.endswith("done")


def message(
    number: int, operator: str, state: str = "done", layer: str = "", ranks: tuple[int, ...] = (0, 1)
) -> Message:
    return Message(number, operator, layer, False, ranks, 0, 1.0, state)


def of(rank: int, *messages: Message) -> Messages:
    return Messages(rank, messages, {})


def test_who_is_behind() -> None:
    first = of(0, message(6, "all_reduce"), message(7, "ring_attention", "running", LAYER))
    assert compare_messages({0: first, 1: of(1, message(6, "all_reduce"))}) == (
        "rank 1 is behind: the last message there is 6, all_reduce (done); "
        "rank 0 has come to 7, ring_attention of layers.3.mixer (running)."
    )
    assert compare_messages({0: first, 1: of(1, *first)}) == (
        "no rank is behind: all 2 have come to message 7, ring_attention of layers.3.mixer (running)."
    )
    assert compare_messages({0: first, 1: of(1)}) == (
        "rank 1 is behind: no message was known there yet; rank 0 has come to 7, ring_attention of layers.3.mixer (running)."
    )
    gone = of(1, message(3, "all_reduce", ranks=()))
    assert compare_messages({0: gone, 1: gone}) == ""
    assert compare_messages({0: of(0), 1: of(1)}) == compare_messages({0: first}) == ""


def test_ranks_that_do_different_things() -> None:
    one, other = (of(rank, message(6, name, "running")) for rank, name in enumerate(("all_reduce", "move_tokens")))
    assert compare_messages({0: one, 1: other}) == (
        "ranks 0 and 1 do not do the same: message 6 is all_reduce (running) and move_tokens (running)."
    )


def test_only_ranks_of_one_group_are_compared() -> None:
    pairs = {
        rank: of(rank, message(5 + rank, "all_reduce", ranks=(rank // 2 * 2, rank // 2 * 2 + 1))) for rank in range(4)
    }
    pairs[1] = of(1, message(5, "all_reduce"))
    assert compare_messages(pairs).startswith("rank 2 is behind: the last message there is 7,")


def test_a_signal_prints_while_the_main_thread_waits(capfd: pytest.CaptureFixture[str]) -> None:
    before, fd = signal.getsignal(signal.SIGUSR2), signal.set_wakeup_fd(-1)
    send("ring_attention", layer=LAYER)
    try:
        print_messages_on(signal.SIGUSR2)
        threads = threading.active_count()
        print_messages_on(signal.SIGUSR2)  # again: it would print twice
        assert threading.active_count() == threads
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline, said = time.monotonic() + 10, ""
        while "main thread" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capfd.readouterr().err
    finally:
        signal.set_wakeup_fd(fd)
        signal.signal(signal.SIGUSR2, before)
    assert LAYER in said
    assert "test_record.py:" in said


def test_numbers_that_are_none() -> None:
    for count in (0, -1):
        with pytest.raises(cpcompile.ConfigError, match=f"count={count} is no number of messages"):
            cpcompile.last_messages(count)
    for number in (signal.SIGKILL, 999, "USR1"):
        with pytest.raises(cpcompile.ConfigError, match="no signal that can be caught"):
            print_messages_on(number)  # type: ignore[arg-type]


def test_only_the_main_thread_may_say_what_a_signal_does() -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            print_messages_on(signal.SIGUSR2)
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
