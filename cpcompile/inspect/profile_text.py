"""Profile text: profiles of ranks as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from cpcompile.inspect.profile import PARTS, RankProfile
from cpcompile.inspect.stream_times import CAUSES
from cpcompile.inspect.text import duration, table
from cpcompile.ir.folding import fold

SHOWN = 10  # kernels that are printed
STREAM_HEAD = ("stream", "busy", *CAUSES.values())
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
            *layer_table(profiles),
            *stream_table(profiles),
            "",
            f"the longest {'kernels' if slowest.device == 'cuda' else 'operators'} of a step, mean of the ranks",
            *table(("name", "calls", "time"), [*islice(kernels, SHOWN)]),
        ]
    )


def layer_table(profiles: Sequence[RankProfile]) -> list[str]:
    """Return a line for equal layers, each way; nothing where no layer has a range."""
    found = layer_means(profiles)
    if not found:
        return []
    rows = []
    for path, group in fold(found, lambda key: key[0], lambda key: key[1]):
        longest_one = max(group, key=lambda key: found[key][0])
        sums = [sum(found[key][i] for key in group) for i in range(3)]
        most = f"{longest_one[0]} {duration(found[longest_one][0])}" if len(group) > 1 else ""
        rows.append((path, group[0][1], *map(duration, sums), most))
    head = ("module", "pass", "kernels", "transfers", "exposed", "the longest of them")
    return ["", "layers of a step with their attention, mean of the ranks", *table(head, rows)]


def layer_means(profiles: Sequence[RankProfile]) -> dict[tuple[str, str], list[float]]:
    """Return kernels, transfers and exposed of each layer and direction, the mean of the ranks, in the order of the model."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in (layer for profile in profiles for layer in profile.layers):
        sums = found.setdefault((each.layer, each.direction), [0.0] * 3)
        for i, seconds in enumerate((each.kernels, each.transfers, each.exposed)):
            sums[i] += seconds / len(profiles)
    return found


def stream_table(profiles: Sequence[RankProfile]) -> list[str]:
    """Return a line for each stream: how long it was busy, and idle by cause; nothing on a CPU."""
    found = stream_means(profiles)
    if not found:
        return []
    rows = [(str(stream), *map(duration, seconds)) for stream, seconds in found.items()]
    return ["", "streams of a step, busy and idle by cause, mean of the ranks", *table(STREAM_HEAD, rows)]


def stream_means(profiles: Sequence[RankProfile]) -> dict[int, list[float]]:
    """Return busy and each cause of each stream, the mean of the ranks that have it."""
    rows: dict[int, list[list[float]]] = {}
    for each in (stream for profile in profiles for stream in profile.streams):
        rows.setdefault(each.stream, []).append([getattr(each, name) for name in ("busy", *CAUSES)])
    return {key: [sum(x) / len(own) for x in zip(*own, strict=True)] for key, own in sorted(rows.items())}


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
