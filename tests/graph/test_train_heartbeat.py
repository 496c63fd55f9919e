"""Silence is noticed by the watcher's own clock; one that was stopped itself forgives; ranks of a store watch each other."""

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from cpcompile.train import heartbeat
from cpcompile.train.heartbeat import NeighbourWatch, Watch, interval, silence, start_beating, state_of


class Clock:
    """Stands for the monotonic clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def advance(self, watch: Watch[int], seconds: float, *heard: int) -> list[int]:
        """Let time pass in steps of a second; return who is silent at the end."""
        silent: list[int] = []
        for _ in range(int(seconds)):
            self.now += 1.0
            for number in heard:
                watch.hear(number)
            silent = watch.silent()
        return silent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    # A wall clock that jumps must not matter: nothing may ask for it.
    monkeypatch.setattr(heartbeat.time, "time", lambda: pytest.fail("the wall clock was asked"))
    return clock


def test_the_silent_one_is_named(clock: Clock) -> None:
    watch = Watch([0, 1, 2], 45.0)
    assert clock.advance(watch, 45, 0, 2) == []
    assert clock.advance(watch, 1, 0, 2) == [1]


def test_a_new_process_may_be_silent_for_longer(clock: Clock) -> None:
    watch = Watch([0], 45.0, start=300.0)
    assert clock.advance(watch, 300) == []
    watch.hear(0)
    assert clock.advance(watch, 45) == []
    assert clock.advance(watch, 1) == [0]


def test_a_watcher_that_was_stopped_itself_forgives(clock: Clock) -> None:
    watch = Watch([0, 1], 45.0)
    clock.now += 3600.0
    assert watch.silent() == []
    assert clock.advance(watch, 45, 1) == []
    assert clock.advance(watch, 1, 1) == [0]


def test_who_has_finished_is_not_expected(clock: Clock) -> None:
    watch = Watch([0, 1], 45.0)
    watch.forget(1)
    watch.hear(1)  # a late message
    assert clock.advance(watch, 100, 0) == []


def test_zero_waits_for_ever(clock: Clock) -> None:
    assert clock.advance(Watch([0], 0.0), 100_000) == []


def test_beats_come_several_times_within_the_limit() -> None:
    assert (interval(45.0), interval(2.0)) == (5.0, 0.5)
    beats: list[float] = []
    start_beating(lambda: beats.append(time.monotonic()), 0.01)
    time.sleep(0.5)
    assert len(beats) > 5


def test_the_state_of_a_process() -> None:
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("no /proc here")
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"]) as process:
        os.kill(process.pid, 19)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert state_of(process.pid) == f"process {process.pid}, stopped (SIGSTOP)"
        process.kill()
    assert state_of(process.pid) == f"process {process.pid}"


def test_what_is_said() -> None:
    assert silence("rank 1", 45.0, "process 7, stopped (SIGSTOP)") == (
        "rank 1 gave no sign of life for 45 s (process 7, stopped (SIGSTOP)); all ranks were ended. "
        "--heartbeat SECONDS waits longer."
    )


def test_ranks_of_a_store_hear_each_other(clock: Clock) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (NeighbourWatch(dist.PrefixStore("beats", store), rank, 2, 45.0) for rank in (0, 1))
    first.watch.silent(), second.watch.silent()
    for _ in range(20):
        clock.now += 5.0
        second.beat()
        first.beat()
        assert first.watch.silent() == []
    # The second beats no more.
    for _ in range(9):
        clock.now += 5.0
        first.beat()
        assert first.watch.silent() == []
    clock.now += 5.0
    first.beat()
    assert first.watch.silent() == ["next"]
    # It had come to its end.
    second.stop()
    first.beat()
    assert first.watch.silent() == []
    # The store does not answer.
    for _ in range(9):
        clock.now += 5.0
        first.watch.silent()
    clock.now += 5.0
    assert "store" in first.watch.silent()
