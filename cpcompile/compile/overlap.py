"""Overlap: where in a compiled program transfers of parameters begin and are waited for, so that they run beside computation.

A gather begins while the parameters before it are used, a sum of gradients is waited for when later ones have begun. Both are
bounded by the bytes in flight and not by estimates of time, so that every rank finds the same order: ranks that disagree about
the order of two collectives wait for each other for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple


class Transfer(NamedTuple):
    """A collective of a program: the positions of its start and its wait, and the bytes that it holds between them.

    One that has several results is as many, with one start.
    """

    start: int
    wait: int
    num_bytes: int


def overlapped(
    needs: Sequence[AbstractSet[int]],
    gathers: Sequence[tuple[int, int, int]],
    sums: Sequence[tuple[int, int, int]],
    limit: int,
    *,
    fixed: AbstractSet[int] = frozenset(),
) -> list[int]:
    """Return a new order of the operations of a program.

    Args:
        needs: of each operation, the earlier ones that it must come behind.
        gathers: transfers (start, wait, bytes) to start early: each follows the one before as soon as less than `limit` bytes of
            others are in flight, or none.
        sums: transfers to wait for late: each is waited for when those behind it hold more than `limit` bytes. What uses
            their results waits as well.
        limit: in bytes.
        fixed: operations that wait for nothing but what they need, such as other collectives: results of sums are computed when
            one needs them.
    """
    return _Order(needs, [Transfer(*g) for g in gathers], [Transfer(*s) for s in sums], limit, fixed).found()


class _Order:
    """The state of one search."""

    def __init__(
        self,
        needs: Sequence[AbstractSet[int]],
        gathers: Sequence[Transfer],
        sums: Sequence[Transfer],
        limit: int,
        fixed: AbstractSet[int],
    ) -> None:
        self.needs, self.limit = needs, limit
        starts = {t.start for t in (*gathers, *sums)}
        barriers = fixed | starts | {t.wait for t in (*gathers, *sums)}
        leads = {g: self._lead(g.start, barriers) for g in gathers}
        self.early = deque(sorted((g for g, lead in leads.items() if lead is not None), key=lambda g: g.wait))
        self.led = {
            i for lead in leads.values() for i in lead or ()
        }  # come with their gather, or with what else needs them
        self.arrives = {g.wait: g for g in self.early}
        self.summed = {s.wait: s for s in sums}
        self.must = fixed | starts
        self.order: list[int] = []
        self.done = set[int]()
        self.held = set[int]()  # waits of sums, and what needs them
        self.pending: deque[Transfer] = deque()
        self.flying = 0

    def found(self) -> list[int]:
        """Return the order."""
        self._start_early()
        for i in range(len(self.needs)):
            if i in self.done or i in self.led:
                continue
            if i in self.arrives:
                self._arrive(i)
            elif i in self.summed:
                self._hold(i)
            elif self.needs[i] & self.held and i not in self.must:
                self.held.add(i)
            else:
                self._emit(i)
        for i in range(len(self.needs)):
            self._emit(i)
        return self.order

    def _lead(self, start: int, barriers: AbstractSet[int]) -> list[int] | None:
        """Return what must come before a gather, itself included; None where that waits for another transfer."""
        found, stack = {start}, [start]
        while stack:
            for i in self.needs[stack.pop()] - found:
                if i in barriers:
                    return None
                found.add(i)
                stack.append(i)
        return sorted(found)

    def _emit(self, i: int) -> None:
        """Put an operation next, behind what it needs and is not there yet."""
        stack = [i]
        while stack:
            j = stack[-1]
            missing = sorted(k for k in self.needs[j] if k not in self.done)
            if j in self.done or not missing:
                stack.pop()
                if j not in self.done:
                    self.done.add(j)
                    self.held.discard(j)
                    self.order.append(j)
            else:
                stack.extend(reversed(missing))

    def _start_early(self) -> None:
        while self.early and (self.flying < self.limit or not self.flying):
            self._start_next()

    def _start_next(self) -> None:
        start = self.early[0].start
        self._emit(start)
        self.flying += sum(each.num_bytes for each in self.early if each.start == start)
        self.early = deque(each for each in self.early if each.start != start)

    def _arrive(self, wait: int) -> None:
        gather = self.arrives[wait]
        while gather.start not in self.done:
            self._start_next()
        self._emit(wait)
        self.flying -= gather.num_bytes
        self._start_early()

    def _hold(self, wait: int) -> None:
        """Put the wait of a sum off, and those off long enough next, with what needs them."""
        self.held.add(wait)
        self.pending.append(self.summed[wait])
        while self._bytes_behind_first() > self.limit:
            self._emit(self.pending.popleft().wait)
            for i in sorted(self.held):
                if not self.needs[i] - self.done and i not in self.summed:
                    self._emit(i)

    def _bytes_behind_first(self) -> int:
        """Return the bytes of sums that began later than the first one that is not waited for."""
        first = self.pending[0].start
        return sum(each.num_bytes for each in self.pending if each.start != first)
