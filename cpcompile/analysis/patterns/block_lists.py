"""The lists of blocks of a block mask: flex attention sees the mask_mod in the blocks of one, all of the blocks of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from cpcompile.analysis.patterns.formula import size_of
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import size_hint, value_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class BlockLists:
    """What a block mask lists: for each row of blocks how many blocks, and which, partly or fully visible.

    `num` are `[B|1, H|1, rows]`, `indices` `[B|1, H|1, rows, columns]`; the full ones may be None.
    """

    partial: tuple[fx.Node, fx.Node]
    full: tuple[fx.Node, fx.Node] | None
    block_size: tuple[int, int]

    @classmethod
    def of(cls, block_mask: Sequence[Any]) -> BlockLists | None:
        """Return the lists, or None when capture found that they only list what the mask_mod shows."""
        num, indices, full_num, full_indices = block_mask[2:6]
        if value_of(num).numel() == 0:
            return None
        full = None if full_num is None else (full_num, full_indices)
        return cls((num, indices), full, (block_mask[-3], block_mask[-2]))


def visible(before: fx.Node, lists: BlockLists, mask: fx.Node, places: Sequence[fx.Node], keys: fx.Node) -> fx.Node:
    """Return where a query sees a key of `keys`: by the mask in blocks that are partly visible, and everywhere in full ones."""
    seen = insert_call(
        before, aten.logical_and.default, mask, in_listed_block(before, lists, lists.partial, places, keys)
    )
    if lists.full is None:
        return seen
    return insert_call(before, aten.logical_or.default, seen, in_listed_block(before, lists, lists.full, places, keys))


def in_listed_block(
    before: fx.Node, lists: BlockLists, listed: tuple[fx.Node, fx.Node], places: Sequence[fx.Node], keys: fx.Node
) -> fx.Node:
    """Return at which places (batch, head, query, key) the block is listed."""
    table = block_table(before, *listed, keys, lists.block_size[1])
    rows, columns = (
        insert_call(before, aten.div.Tensor_mode, place, size, rounding_mode="floor")
        for place, size in zip(places[2:], lists.block_size, strict=True)
    )
    outer: list[fx.Node] = []
    for place in places[1::-1]:  # the head dim first: it is counted from the back
        dim = value_of(table).dim() - 3
        if value_of(table).shape[dim - len(outer)] == 1:
            table = insert_call(before, aten.select.int, table, dim - len(outer), 0)
        else:
            outer.insert(0, place)
    return insert_call(before, aten.index.Tensor, table, [*outer, rows, columns])


def block_table(before: fx.Node, num: fx.Node, indices: fx.Node, keys: fx.Node, width: int) -> fx.Node:
    """Return the listed blocks as booleans `[B|1, H|1, rows, columns]`."""
    with value_of(num).fake_mode:
        device = value_of(num).device
        columns = insert_call(before, aten.arange.start_step, 0, size_of(before, keys, -2), width, device=device)
        order = insert_call(before, aten.arange.default, size_of(before, indices, -1), device=device)
    count = insert_call(before, aten.unsqueeze.default, num, -1)
    # Column 0 takes the entries that do not count; block i is column i + 1.
    moved = insert_call(before, aten.add.Tensor, indices, 1)
    counts = insert_call(before, aten.lt.Tensor, order, count)
    to = insert_call(before, aten.to.dtype, insert_call(before, aten.where.ScalarOther, counts, moved, 0), torch.int64)
    shape = insert_call(before, aten.add.Tensor, insert_call(before, aten.pad.default, columns, [1, 0]), count)
    empty = insert_call(before, aten.zeros_like.default, shape)
    table = insert_call(before, aten.scatter.value, empty, -1, to, 1)
    return insert_call(before, aten.gt.Scalar, insert_call(before, aten.slice.Tensor, table, -1, 1), 0)


def list_the_mask(
    lists: BlockLists, mask_mod: Callable[..., torch.Tensor], tensors: Sequence[Any], q: torch.Tensor, k: torch.Tensor
) -> bool:
    """Tell whether, for the inputs of this compilation, the lists hide nothing that `mask_mod` shows, nor show what it hides."""
    examples = [example_of(node) for node in (*lists.partial, *(lists.full or ()), *tensors)]
    if any(example is None for example in examples):
        return False
    partial, rest = examples[:2], examples[2:]
    full, captured = (rest[:2], rest[2:]) if lists.full is not None else (None, rest)
    device = partial[0].device
    b, h = (torch.arange(size, device=device) for size in partial[0].shape[:2])
    queries, keys = (torch.arange(size_hint(x.shape[2]), device=device) for x in (q, k))
    at_places = over_places(lambda *place: mask_mod(*place, *captured))
    for row, some_queries in enumerate(torch.split(queries, lists.block_size[0])):
        blocks = torch.split(at_places(b, h, some_queries, keys), lists.block_size[1], dim=-1)
        is_full = listed_in_row(full, row, len(blocks)) if full is not None else torch.zeros((), dtype=torch.bool)
        is_listed = listed_in_row(partial, row, len(blocks)) | is_full
        has_some, has_all = (
            torch.stack([f(block.flatten(-2), -1) for block in blocks], -1) for f in (torch.any, torch.all)
        )
        if (has_some & ~is_listed).any() or (is_full & ~has_all).any():
            return False
    return True


def listed_in_row(lists: Sequence[torch.Tensor], row: int, num_columns: int) -> torch.Tensor:
    """Return which blocks of a row of blocks are listed, `[B|1, H|1, columns]`."""
    num, indices = (x[:, :, row] for x in lists)
    counts = torch.arange(indices.shape[-1], device=num.device) < num[..., None]
    columns = torch.arange(num_columns, device=num.device)
    return ((indices[..., None] == columns) & counts[..., None]).any(-2)


def over_places(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function of one place as one of vectors (batches, heads, queries, keys), with a dim for each."""
    for dim in reversed(range(4)):
        function = torch.vmap(function, tuple(0 if i == dim else None for i in range(4)))
    return function


def example_of(node: Any) -> Any:
    """Return the input of this compilation that a node stands for, or None."""
    if not isinstance(node, fx.Node) or isinstance(value_of(node), torch.SymInt):
        return size_hint(value_of(node) if isinstance(node, fx.Node) else node)
    example = getattr(node.meta.get("grapharg"), "example", None)
    return None if isinstance(example, FakeTensor) else example
