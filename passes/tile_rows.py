"""Tile rows: what is computed of each token's row alone, and is wider than it, runs for some tokens at a time.

before  y = aten.linear(aten.mul(aten.silu(aten.linear(x, gate)), aten.linear(x, up)), down)
after   y, = cp.by_rows([x], [gate, up, down], function, 4096)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.token_rows import NotByRowsError, RowRegion, static, wide_region_of
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.runtime.tiles.by_rows import RowFunction, add_function

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
    results = [node for node in region.nodes if region.readers(node)]
    if not results or any(region.rows[node] is None or not is_tensor(node) for node in results):
        return False
    if sum(map(region.size, results)) >= max(
        map(region.size, region.nodes)
    ):  # what is kept is as wide: keys, queries, values
        return False
    function, rows, others = region.body(results)
    first = region.first_reader(results)
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
    region.replace(results, call, first)
    return True
