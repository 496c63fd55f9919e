"""Profile difference: what two profiles of a step differ in, part by part, attention by attention and kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence

from cpcompile.inspect.profile import PARTS, AttentionTime, RankProfile
from cpcompile.inspect.profile_text import SHOWN, STREAM_HEAD, WIDTH, layer_means, longest, stream_means
from cpcompile.inspect.text import duration, table
from cpcompile.ir.folding import fold

TIMES = ("kernels", "transfers", "exposed")


def difference_text(now: Sequence[RankProfile], before: Sequence[RankProfile]) -> str:
    """Return what a step takes now and what it took before, the means of the ranks, as tables for people."""
    parts = [
        (text, mean(before, name), mean(now, name))
        for name, text in {**PARTS, "overlapped": "overlapped transfers"}.items()
    ]
    return "\n".join(
        [
            f"against {len(before)} rank(s), {before[0].num_steps} step(s) on {before[0].device}: a step, mean of the ranks",
            *table(("", "against", "now", "difference"), [(text, *compared(*times)) for text, *times in parts]),
            "",
            "difference of attentions",
            *table(("module", "pass", "against", "now", *TIMES), attention_lines(now, before)),
            *layer_lines(now, before),
            *stream_lines(now, before),
            "",
            f"the largest differences of {'kernels' if now[0].device == 'cuda' else 'operators'}",
            *table(("name", "calls", "against", "now", "difference"), kernel_lines(now, before)),
        ]
    )


def mean(profiles: Sequence[RankProfile], name: str) -> float:
    """Return the mean of a field over the ranks."""
    values: list[float] = [getattr(profile, name) for profile in profiles]
    return sum(values) / len(values)


def compared(before: float, now: float) -> tuple[str, str, str]:
    """Return two times and their difference for people."""
    return duration(before), duration(now), change(now - before)


def change(seconds: float) -> str:
    """Return a difference of times for people, with its sign."""
    return f"{'-' if seconds < 0 else '+'}{duration(abs(seconds))}"


def attention_lines(now: Sequence[RankProfile], before: Sequence[RankProfile]) -> list[tuple[str, ...]]:
    """Return a line for the attentions of equal layers: how they are computed in each profile, and the differences."""
    both = [attentions(profiles) for profiles in (before, now)]
    places = dict.fromkeys(place for found in both for place in found)

    def kinds(place: tuple[str, str]) -> tuple[str, ...]:
        return tuple(kind_of(found.get(place, [])) for found in both)

    lines = []
    for layer, group in fold(places, lambda place: place[0], lambda place: (place[1], kinds(place))):
        sums = [
            [sum(getattr(x, name) for place in group for x in found.get(place, [])) / len(profiles) for name in TIMES]
            for found, profiles in zip(both, (before, now), strict=True)
        ]
        changes = [change(new - old) for old, new in zip(*sums, strict=True)]
        lines.append((layer, group[0][1], *kinds(group[0]), *changes))
    return lines


def layer_lines(now: Sequence[RankProfile], before: Sequence[RankProfile]) -> list[str]:
    """Return a line for equal layers: their kernels in each profile, and the differences; nothing where neither has layers."""
    old, new = layer_means(before), layer_means(now)
    if not old and not new:
        return []
    rows = []
    for path, group in fold({**old, **new}, lambda key: key[0], lambda key: key[1]):
        sums = [[sum(found.get(key, [0.0] * 3)[i] for key in group) for i in range(3)] for found in (old, new)]
        changes = [change(is_now - was) for was, is_now in zip(*sums, strict=True)]
        rows.append((path, group[0][1], duration(sums[0][0]), duration(sums[1][0]), *changes))
    return ["", "difference of layers", *table(("module", "pass", "against", "now", *TIMES), rows)]


def stream_lines(now: Sequence[RankProfile], before: Sequence[RankProfile]) -> list[str]:
    """Return a line for each stream: by how much it was longer busy, and idle by cause; nothing on CPUs."""
    old, new = stream_means(before), stream_means(now)
    none = [0.0] * (len(STREAM_HEAD) - 1)
    rows = []
    for stream in sorted({**old, **new}):
        pairs = zip(old.get(stream, none), new.get(stream, none), strict=True)
        rows.append((str(stream), *(change(is_now - was) for was, is_now in pairs)))
    return ["", "difference of streams", *table(STREAM_HEAD, rows)] if rows else []


def attentions(profiles: Sequence[RankProfile]) -> dict[tuple[str, str], list[AttentionTime]]:
    """Return the attentions of all ranks by layer and direction."""
    found: dict[tuple[str, str], list[AttentionTime]] = {}
    for each in (attention for profile in profiles for attention in profile.attentions):
        found.setdefault((each.layer, each.direction), []).append(each)
    return found


def kind_of(own: Sequence[AttentionTime]) -> str:
    """Return how an attention is computed, `-` for one that is not there."""
    return ", ".join(dict.fromkeys(f"{each.strategy} {each.layout}" for each in own)) or "-"


def kernel_lines(now: Sequence[RankProfile], before: Sequence[RankProfile]) -> list[tuple[str, ...]]:
    """Return a line for each of the kernels whose time differs most."""
    old, new = ({name: times for name, *times in longest(profiles)} for profiles in (before, now))
    pairs = {name: (old.get(name, [0.0, 0.0]), new.get(name, [0.0, 0.0])) for name in {**old, **new}}
    ordered = sorted(pairs.items(), key=lambda item: -abs(item[1][1][1] - item[1][0][1]))
    return [
        (name[:WIDTH], f"{was[0]:g} -> {is_now[0]:g}", *compared(was[1], is_now[1]))
        for name, (was, is_now) in ordered[:SHOWN]
        if was != is_now
    ]
