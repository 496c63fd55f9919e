"""Ring step: which rank computes with which block of keys while which block travels, by the rates of the cost model.

Forward of one attention. A rank asks for the next block when it starts to compute with the one before, and computes with it once
it is there and the one before is done, as `runtime/attention/ring.py` does:

    compute  [ own keys ][ keys of rank 3 ][ keys of rank 2 ]
    arrives  [ rank 3 ]  [ rank 2 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpcompile.choose.cost import link_on, piece_seconds, rates_on
from cpcompile.choose.machine import Machine
from cpcompile.choose.rates import BYTES, LATENCY
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.key_needs import Visit, visits
from cpcompile.runtime.attention.workload import Workload, num_keys, pairs

MOST_PLACES = 16  # of a ring that are looked at


@dataclass(frozen=True, slots=True)
class Interval:
    """Seconds from `start` to `end` in which the keys of the place `source` are computed with, or arrive.

    `pairs` of a query and a key are computed, over all heads; `nbytes` arrive.
    """

    start: float
    end: float
    source: int
    pairs: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Lane:
    """What one place of the ring does: where ranks exchange heads, all ranks of the place do so alike."""

    place: int
    ranks: tuple[int, ...]
    computes: tuple[Interval, ...]
    arrives: tuple[Interval, ...]

    @property
    def end(self) -> float:
        """When it is done."""
        return self.computes[-1].end


def is_ring(workload: Workload, strategy: str) -> bool:
    """Tell whether blocks of keys go round."""
    return not STRATEGIES[strategy].is_at_once and workload.inner(strategy) < workload.world_size


def ring_step(workload: Workload, strategy: str, kernel: str, machine: Machine | None) -> tuple[Lane, ...]:
    """Return a lane for each place of the ring, of at most `MOST_PLACES`; without a machine it runs on CPUs."""
    inner = workload.inner(strategy)
    count = workload.world_size // inner
    spans = tuple(workload.rows(strategy, outer) for outer in range(count))
    heads = workload.heads_of(strategy)
    num_query, num_key = max(h.num_query for h in heads), max(map(num_keys, heads))
    width = max(workload.head_dim, workload.value_dim)
    rates, kind = rates_on(machine, kernel, width), link_on(machine, workload.world_size)
    rate = BYTES[kind] if machine is None else machine.bytes_per_second(kind)
    per_token = workload.itemsize * workload.key_width * num_key
    per_pair = 2.0 * workload.batch * num_query * (workload.head_dim + workload.value_dim)

    def work(visit: Visit) -> tuple[float, int]:
        seconds = sum(piece_seconds(piece, per_pair, rates)[0] for piece in visit.pieces)
        return seconds, workload.batch * num_query * sum(map(pairs, visit.pieces))

    lanes = []
    for place in range(min(count, MOST_PLACES)):
        found = visits(spans, workload.visible, place)
        sources = [(place - visit.step) % count for visit in found]
        sent = [per_token * visit.num_columns if visit.step else 0 for visit in found]
        computes, arrives = play(sources, list(map(work, found)), sent, rate)
        ranks = tuple(range(place * inner, (place + 1) * inner))
        lanes.append(Lane(place, ranks, computes, arrives))
    return tuple(lanes)


def play(
    sources: Sequence[int], work: Sequence[tuple[float, int]], sent: Sequence[int], rate: float
) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    """Return when a place computes with each block and when each arrives; the first is its own and needs not travel."""
    computes: list[Interval] = []
    arrives: list[Interval] = []
    free = there = 0.0  # the kernels are, and the block is
    for number, (source, (seconds, count)) in enumerate(zip(sources, work, strict=True)):
        start = max(free, there)
        computes.append(Interval(start, start + seconds, source, pairs=count))
        free = start + seconds
        if number + 1 < len(sources):
            nbytes = sent[number + 1]
            there = start + (LATENCY + nbytes / rate if nbytes else 0.0)
            arrives.append(Interval(start, there, sources[number + 1], nbytes=nbytes))
    return tuple(computes), tuple(arrives)
