"""Equal names: what is the same but for the numbers of layers becomes one line, `model.layers.{0..31}.self_attn`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

Item = TypeVar("Item")


def pattern(name: str) -> str:
    """Return a module path without its numbers: those of one pattern are the same module of several layers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def folded(names: Sequence[str]) -> str:
    """Return module paths of one pattern as one; where numbers of several places do not combine freely, the ends."""
    names = list(dict.fromkeys(names))
    parts = list(zip(*(name.split(".") for name in names), strict=True))
    different = [list(dict.fromkeys(part)) for part in parts]
    if math.prod(map(len, different)) != len(names):
        return f"{names[0]} to {names[-1]} ({len(names)})"
    return ".".join(part[0] if len(part) == 1 else f"{{{ranges(map(int, part))}}}" for part in different)


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: `0..4, 6`."""
    ordered = sorted(numbers)
    runs = [[number for _, number in run] for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Return items of one key together, in the order in which keys come first."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
