"""Tile rows: what is computed of each token's row alone, and is wider than it, runs for some tokens at a time.

before  y = aten.linear(aten.mul(aten.silu(aten.linear(x, gate)), aten.linear(x, up)), down)
after   y, = cp.by_rows([x], [gate, up, down], function, 4096)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from cpcompile.analysis.token_rows import NotByRowsError, RowRegion, static, wide_region_of
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_call, insert_copy, keep_source
from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.runtime.by_rows import RowFunction, add_function

aten, cp = torch.ops.aten, torch.ops.cpcompile


def tile_rows(gm: fx.GraphModule, *, tile: int) -> int:
    """Return how many regions run by tiles of `tile` tokens.

    Needs: a graph of every rank.
    Gives: `cp.by_rows` in the place of products that widen the rows of their operand, up to where these are narrow again.
    """
    count = 0
    for source in list(gm.graph.nodes):
        if not is_tensor(source) or value_of(source).dim() < 2:
            continue
        try:
            region = wide_region_of(source)
        except NotByRowsError:
            region = None
        if region is not None:
            count += replace_by_tiles(region, tile)
    gm.graph.eliminate_dead_code()
    return count


def replace_by_tiles(region: RowRegion, tile: int) -> bool:
    """Let what reads the results of a region read those of `cp.by_rows`; False where nothing can stand in its place."""
    results = [node for node in region.nodes if any(user not in region.rows for user in node.users)]
    if not results or any(region.rows[node] is None or not is_tensor(node) for node in results):
        return False
    if sum(map(region.size, results)) >= max(
        map(region.size, region.nodes)
    ):  # what is kept is as wide: keys, queries, values
        return False
    function, rows, others = region.body(results)
    users = {node: [user for user in node.users if user not in region.rows] for node in results}
    first = min(user for each in users.values() for user in each)
    if any(x >= first for x in (region.source, *rows, *others, *region.read_to_write(results))):
        return False
    try:
        kinds = tuple((static(region.rows[node].inner), value_of(node).dtype) for node in results)  # type: ignore[union-attr]
    except NotByRowsError:
        return False
    key = add_function(RowFunction(function, kinds))
    flat = [insert_call(first, aten.reshape.default, x, [-1, *value_of(x).shape[region.num_lead[x] :]]) for x in rows]
    call = insert_call(first, cp.by_rows.default, [region.source, *flat], list(others), key, tile, False)
    for node in (*flat, call):
        keep_source(node, results[0])
    annotate(call, placement=tuple(placement_of(node) for node in results))
    for i, node in enumerate(results):
        found = insert_call(first, operator.getitem, call, i)
        keep_source(found, node)
        written = region.rows[node].written  # type: ignore[union-attr]
        if written is not None:
            with first.graph.inserting_before(first):  # sizes are those of a rank, and values those of the whole
                found = insert_copy(first.graph, aten.reshape.default, (found, [*written, *kinds[i][0]]), node)
        found.meta["val"] = value_of(node)
        annotate(found, placement=placement_of(node), origin=annotation(node).origin)
        for user in users[node]:
            user.replace_input_with(node, found)
    return True
