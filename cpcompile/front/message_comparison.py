"""Comparison of messages: which rank of a stuck job is behind, by what each has recorded."""

from __future__ import annotations

from collections.abc import Mapping

from cpcompile.front.messages import Message, Messages
from cpcompile.runtime import record

LATE = 1.0  # seconds that a collective waits for a rank before this is said to be behind


def compare_messages(of_ranks: Mapping[int, Messages]) -> str:
    """Return one line that says which rank is behind, and where; '' where no ranks have sent anything together."""
    said = [_compared(group, of_ranks) for group in dict.fromkeys(m.ranks for one in of_ranks.values() for m in one)]
    grave, line = max(said, default=(0, ""))
    return line if grave > 1 else missing_at_collectives(of_ranks) or line


def _compared(group: tuple[int, ...], of_ranks: Mapping[int, Messages]) -> tuple[int, str]:
    """Return how grave a difference within a group is, and what it is."""
    each = {rank: {m.number: m for m in of_ranks[rank] if m.ranks == group} for rank in group if rank in of_ranks}
    each = {rank: messages for rank, messages in each.items() if messages}
    silent = [rank for rank in group if rank in of_ranks and not len(of_ranks[rank])]
    newest = {rank: messages[max(messages)] for rank, messages in each.items()}
    if not newest:  # of a group that is no more
        return 0, ""
    most = max(newest, key=lambda rank: newest[rank].number)
    come = f"rank {most} has come to {newest[most].number}, {newest[most]}."
    if silent:
        return 2, f"{_are(silent)} behind: no message was known there yet; {come}"
    if len(each) < 2:
        return 0, ""
    first, *others = each
    for number in sorted(set.intersection(*map(set, each.values()))):  # the oldest difference made the others
        for rank in others:
            one, other = each[first][number], each[rank][number]
            if (one.operator, one.layer) != (other.operator, other.layer):
                return 3, f"ranks {first} and {rank} do not do the same: message {number} is {one} and {other}."
    least = min(newest, key=lambda rank: newest[rank].number)
    if newest[least].number == newest[most].number:
        return _compared_on_gpus(each)
    behind = [rank for rank, m in newest.items() if m.number == newest[least].number]
    return 2, f"{_are(behind)} behind: the last message there is {newest[least].number}, {newest[least]}; {come}"


def _compared_on_gpus(each: Mapping[int, Mapping[int, Message]]) -> tuple[int, str]:
    """Compare ranks whose hosts have come equally far: by the first message that has not ended."""
    at = {rank: _first_unfinished(messages) for rank, messages in each.items()}
    least, most = (pick(at.values(), key=lambda m: m.number) for pick in (min, max))
    if least.number == most.number:
        return 1, f"no rank is behind: all {len(at)} have come to message {least.number}, {least}."
    behind = [rank for rank, m in at.items() if m.number == least.number]
    first = next(rank for rank, m in at.items() if m.number == most.number)
    come = f"rank {first} has come to {most.number}, {most}"
    return 2, f"{_are(behind)} behind: message {least.number}, {least}, has not ended there; {come}."


def _first_unfinished(messages: Mapping[int, Message]) -> Message:
    return next(
        (m for _, m in sorted(messages.items()) if m.state in (record.RUNNING, "launched")), messages[max(messages)]
    )


def missing_at_collectives(of_ranks: Mapping[int, Messages]) -> str:
    """Return one line that says which rank has not come to a collective that others wait in; '' where that is none."""
    waiting = sorted(
        ((c, rank) for rank, one in of_ranks.items() for c in one.collectives), key=lambda x: -x[0].seconds
    )
    for collective, rank in waiting:
        if collective.seconds < LATE:  # ranks are not asked in the same instant
            break
        there = {r for c, r in waiting if (c.ranks, c.group) == (collective.ranks, collective.group)}
        missing = [r for r in collective.ranks if r in of_ranks and r not in there]
        if missing:
            come = "it has" if len(missing) == 1 else "they have"
            return f"{_are(missing)} behind: rank {rank} waits in {collective}, to which {come} not come."
    return ""


def _are(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
