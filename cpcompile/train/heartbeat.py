"""Heartbeat: a rank that is stopped or cut off says nothing, not even that it failed; who watches it notices.

A thread of each rank beats while its main thread computes or waits. Times are those of the watcher's own monotonic clock, so
that neither a clock that jumps nor one that is wrong on another host matters.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from cpcompile.front.message_comparison import compare_messages
from cpcompile.front.messages import newest_messages, print_messages

Key = TypeVar("Key", bound=Hashable)

# Until a new process has imported torch, it cannot beat.
START_SECONDS = 300.0
_STATES = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "waiting for a disk or a file system"}


def interval(limit: float) -> float:
    """Return the seconds between two beats when silence may last `limit`."""
    return min(5.0, limit / 4)


class Watch(Generic[Key]):
    """Whom one expects to hear at least every `limit` seconds; 0 waits for ever."""

    def __init__(self, keys: Iterable[Key], limit: float, start: float = 0.0) -> None:
        self.limit = limit if limit > 0 else float("inf")
        self.looked = time.monotonic()
        self.deadlines = {key: self.looked + max(self.limit, start) for key in keys}

    def hear(self, key: Key) -> None:
        """`key` is alive."""
        if key in self.deadlines:
            self.deadlines[key] = time.monotonic() + self.limit

    def forget(self, key: Key) -> None:
        """Expect nothing more of `key`."""
        self.deadlines.pop(key, None)

    def silent(self) -> list[Key]:
        """Return who has been silent for too long; call it every second."""
        now = time.monotonic()
        if now - self.looked > self.limit / 2:
            # This process was stopped itself, as by Ctrl-Z, perhaps with all the others.
            self.deadlines = {key: max(deadline, now + self.limit) for key, deadline in self.deadlines.items()}
        self.looked = now
        return [key for key, deadline in self.deadlines.items() if now > deadline]


def start_beating(beat: Callable[[], None], seconds: float) -> None:
    """Call `beat` every `seconds` from a thread, until it raises or the process ends."""

    def run() -> None:
        while True:
            try:
                beat()
            except (OSError, RuntimeError):
                return
            time.sleep(seconds)

    threading.Thread(target=run, name="heartbeat", daemon=True).start()


def state_of(process: int | None) -> str:
    """Return what a process of this host is doing, as far as the system says so."""
    try:
        letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return f"process {process}"
    return f"process {process}, {_STATES[letter]}" if letter in _STATES else f"process {process}"


class NeighbourWatch:
    """Beats in the store by which torchrun's ranks have met, and watches the next rank there, on whatever host it is.

    Who finds silence says so in the store, and all ranks leave: one that waits in a collective for a stopped one
    cannot be woken otherwise. With its beats, each rank leaves its last messages there.
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float) -> None:
        self.store, self.rank, self.world_size, self.limit = store, rank, world_size, limit
        self.next = (rank + 1) % world_size
        self.watch = Watch(("store", "next"), limit)
        self.count = -1
        self.is_over = False

    def start(self) -> None:
        """Beat and watch from two threads: the one that asks the store does not return when the store is stopped."""
        start_beating(self.beat, interval(self.limit))
        threading.Thread(target=self.look, name="watch", daemon=True).start()

    def beat(self) -> None:
        """One beat of this rank, and what the store has of the others."""
        self.store.add(f"beat {self.rank}", 1)
        self.watch.hear("store")
        count = self.store.add(f"beat {self.next}", 0)
        if count != self.count or self.store.check([f"over {self.next}"]):
            self.watch.hear("next")
        self.count = count
        self.store.set(f"messages {self.rank}", pickle.dumps(newest_messages()))
        if self.store.check(["silent"]) and not self.is_over:
            print_messages()
            os._exit(2)

    def look(self) -> None:
        """End this process when the next rank or the store is silent."""
        while not self.is_over:
            silent = self.watch.silent()
            if silent and not self.is_over:
                who = f"rank {self.next}" if silent == ["next"] else "the store of the ranks (torchrun's, or rank 0's)"
                print(f"error: {silence(who, self.limit)}", file=sys.stderr, flush=True)
                print_messages()
                # Not from here: the store may fall silent in this moment.
                saying = threading.Thread(target=self.say, args=(who,), daemon=True)
                saying.start()
                saying.join(2.0)
                os._exit(2)
            time.sleep(min(1.0, interval(self.limit)))

    def say(self, who: str) -> None:
        """Say in the store who is silent, and here which rank is behind."""
        self.store.set("silent", who)
        print(self.compared(), file=sys.stderr, flush=True)

    def compared(self) -> str:
        """Return which rank is behind, as far as the store knows."""
        keys = {rank: f"messages {rank}" for rank in range(self.world_size)}
        return compare_messages({r: pickle.loads(self.store.get(k)) for r, k in keys.items() if self.store.check([k])})

    def answer(self) -> None:
        """Print the last messages of this rank; the first one says which rank is behind."""
        print_messages()
        if self.rank == 0:
            print(self.compared(), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing is expected of this rank any more."""
        self.is_over = True
        self.store.set(f"over {self.rank}", "")


def silence(who: str, limit: float, state: str = "") -> str:
    """Return the message about `who` was silent for `limit` seconds."""
    details = f" ({state})" if state else ""
    return (
        f"{who} gave no sign of life for {limit:g} s{details}; all ranks were ended. --heartbeat SECONDS waits longer."
    )
