"""Spans: what is told of stretches of time by those of others."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[float, float]
Spans = list[Span]


def union(spans: Iterable[Span]) -> Spans:
    """Return spans in order, those that overlap as one."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def minus(spans: Spans, others: Spans) -> Spans:
    """Return what of `spans` is in none of `others`; both are unions."""
    left, first = [], 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at, number = start, first
        while number < len(others) and others[number][0] < end:
            left.append((at, others[number][0]))
            at, number = others[number][1], number + 1
        left.append((at, end))
    return [(start, end) for start, end in left if start < end]


def clip(spans: Spans, window: Span) -> Spans:
    """Return what of `spans` is in a window."""
    return [
        (max(start, window[0]), min(end, window[1])) for start, end in spans if end > window[0] and start < window[1]
    ]


def total(spans: Iterable[Span]) -> float:
    """Return how long spans are together."""
    return sum(end - start for start, end in spans)
