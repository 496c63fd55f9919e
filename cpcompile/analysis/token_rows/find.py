"""Find: the regions that begin at one value, and how the graph is walked from it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from torch import fx

from cpcompile.analysis.token_rows.region import NotByRowsError, RowRegion
from cpcompile.analysis.token_rows.write import PRODUCTS, Writer
from cpcompile.ir.operator_call import Call, value_of


def wide_region_of(source: fx.Node) -> RowRegion | None:
    """Return what products of the rows of `source` make wider than it, with all that reads that; None if some is not by rows."""
    width = value_of(source).shape[-1]
    starts = {x for x in source.users if x.target in PRODUCTS and Call.of(x)[PRODUCTS[x.target]] is source}
    wide = {x for x in starts if is_wider(value_of(x).shape[-1], width)}
    if not wide:
        return None
    writer = Writer(source, lambda node: True)

    def is_wide(node: fx.Node) -> bool:
        writer.add(node)
        return bool(writer.region.size(node) > width)

    try:
        follow(wide, is_wide)
    except NotByRowsError:
        return None
    return writer.region


def follow(starts: Iterable[fx.Node], leads_on: Callable[[fx.Node], bool]) -> None:
    """Visit nodes in the order of the graph: `starts`, and what reads a visited one that `leads_on`."""
    waiting, seen = list(starts), set[fx.Node]()
    heapq.heapify(waiting)
    while waiting:
        node = heapq.heappop(waiting)
        if node in seen:
            continue
        seen.add(node)
        if leads_on(node):
            for user in node.users:
                heapq.heappush(waiting, user)


def is_wider(size: object, width: object) -> bool:
    """Tell whether a size is known to be larger than another."""
    return isinstance(size, int) and isinstance(width, int) and size > width


def region_of(source: fx.Node, is_constant: Callable[[fx.Node], bool]) -> RowRegion:
    """Return all that is computed of the rows of `source`, `[..., inner]`, up to sums over the tokens.

    Args:
        source: its last dim is the inner one.
        is_constant: whether a value from elsewhere needs no gradient; operators on others are left out.
    """
    writer = Writer(source, is_constant)
    follow(source.users, writer.has_rows)
    return writer.region
