"""Folding: equal layers are one row, `model.layers.{0..31}.self_attn`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a component of a module's path


def fold(items: Iterable[T], path: Callable[[T], str], others: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Return groups of items that differ in the numbers of their paths only, each with one path for all; the first come first.

    Args:
        items: in the order of the model.
        path: of an item, dotted.
        others: all that items of a group have in common.
    """
    found: list[tuple[str, list[T]]] = []
    for group in grouped(items, lambda item: (_NUMBER.sub("{}", path(item)), others(item))):
        name = one_path([path(item) for item in group])
        found += [(name, group)] if name else [(path(item), [item]) for item in group]
    return found


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Return items of one key together; the first come first."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def one_path(paths: Sequence[str]) -> str:
    """Return one path for all of several that differ in their numbers; '' where the numbers are no full grid."""
    numbers = [tuple(map(int, _NUMBER.findall(path))) for path in paths]
    if len(set(numbers)) < len(numbers) and len(set(paths)) > 1:
        return ""
    along = [sorted(set(values)) for values in zip(*numbers, strict=True)]
    if set(itertools.product(*along)) != set(numbers):
        return ""
    texts = iter([str(values[0]) if len(values) == 1 else f"{{{ranges(values)}}}" for values in along])
    return _NUMBER.sub(lambda _: next(texts), paths[0])


def ranges(values: Sequence[int]) -> str:
    """Return ascending numbers for people: `0..31`, `0,2,..,30` or `0,1,5`."""
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(values) > 2 and len(steps) == 1:
        (step,) = steps
        return f"{values[0]}..{values[-1]}" if step == 1 else f"{values[0]},{values[1]},..,{values[-1]}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
