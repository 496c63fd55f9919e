"""Profile text: profiles of ranks as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from cpcompile.inspect.profile import PARTS, RankProfile
from cpcompile.inspect.text import duration, table
from cpcompile.ir.folding import fold

SHOWN = 10  # kernels that are printed
WIDTH = 70  # letters of their names, which templates make long


def to_text(profiles: Sequence[RankProfile]) -> str:
    """Return the profiles as tables for people."""
    slowest = max(profiles, key=lambda profile: profile.step)
    steps = f"{slowest.num_steps} step(s) on {slowest.device}"
    head = ("rank", *PARTS.values(), "overlapped transfers")
    rows = [
        (p.rank, duration(p.step), *(share(getattr(p, name), p) for name in (*list(PARTS)[1:], "overlapped")))
        for p in profiles
    ]
    kernels = ((name[:WIDTH], f"{calls:g}", duration(seconds)) for name, calls, seconds in longest(profiles))
    return "\n".join(
        [
            f"{len(profiles)} rank(s), {steps}; the slowest is rank {slowest.rank}",
            *table(head, rows),
            f"  a step = {' + '.join(list(PARTS.values())[1:])}; overlapped transfers run beside these",
            "",
            "attention of a step, mean of the ranks",
            *table(
                ("module", "strategy", "layout", "pass", "calls", "kernels", "transfers", "exposed"), lines(profiles)
            ),
            "",
            f"the longest {'kernels' if slowest.device == 'cuda' else 'operators'} of a step, mean of the ranks",
            *table(("name", "calls", "time"), [*islice(kernels, SHOWN)]),
        ]
    )


def longest(profiles: Sequence[RankProfile]) -> list[tuple[str, float, float]]:
    """Return name, calls and seconds of each kernel, the mean of the ranks, the longest first."""
    found: dict[str, tuple[float, float]] = {}
    for each in (kernel for profile in profiles for kernel in profile.kernels):
        calls, seconds = found.get(each.name, (0.0, 0.0))
        found[each.name] = calls + each.calls / len(profiles), seconds + each.seconds / len(profiles)
    return sorted(((name, *times) for name, times in found.items()), key=lambda each: -each[2])


def share(seconds: float, of: RankProfile) -> str:
    """Return a time and its share of a step."""
    return f"{duration(seconds)} {seconds / of.step if of.step else 0:.0%}"


def lines(profiles: Sequence[RankProfile]) -> list[tuple[str, ...]]:
    """Return a line for the attentions of equal layers, the mean of the ranks."""
    everywhere = [each for profile in profiles for each in profile.attentions]
    keys = dict.fromkeys((x.layer, x.strategy, x.layout, x.direction) for x in everywhere)
    found = []
    for layer, group in fold(keys, lambda key: key[0], lambda key: key[1:]):
        own = [x for x in everywhere if (x.layer, x.strategy, x.layout, x.direction) in group]
        calls = sum(x.calls for x in own) / len(profiles)
        times = [sum(getattr(x, name) for x in own) / len(profiles) for name in ("kernels", "transfers", "exposed")]
        found.append((layer, *group[0][1:], f"{calls:g}", *map(duration, times)))
    return found
