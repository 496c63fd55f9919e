"""Adapt: what brings a block to a kernel that does not take it as it is, exactly: parts, documents, rectangles, head dims."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise, starmap

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.calls import LONG, STEP

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and columns of a block, and the block that they are."""

    rows: slice
    columns: slice
    block: Block

    @property
    def is_empty(self) -> bool:
        return bool(self.rows.start >= self.rows.stop or self.columns.start >= self.columns.stop)

    def is_whole(self, rows: int, columns: int) -> bool:
        """Whether these are all rows and columns."""
        return (self.rows, self.columns) == (slice(0, rows), slice(0, columns))


def _cut(x: Tensor | None, dim: int, part: slice) -> Tensor | None:
    """Return a part of a tensor, along a dim that may be broadcast."""
    return x if x is None or x.shape[dim] == 1 else x[(slice(None),) * (dim % x.dim()) + (part,)]


def cut(block: Block, rows: slice, columns: slice) -> Block:
    """Return the block that some rows and columns of `block` are."""
    shift = rows.start - columns.start
    mask = _cut(_cut(block.mask, -2, rows), -1, columns)
    documents, dropout = block.documents, block.dropout
    if documents is not None:
        documents = documents[0][:, rows], documents[1][:, columns]
    if dropout is not None:
        dropout = replace(dropout, row=dropout.row + rows.start, column=dropout.column + columns.start)
    return replace(
        block,
        low=None if block.low is None else block.low + shift,
        high=None if block.high is None else block.high + shift,
        mask=mask,
        documents=documents,
        key_padding=None if block.key_padding is None else block.key_padding[:, columns],
        prefix=None if block.prefix is None else block.prefix - columns.start,
        distance=block.distance + shift,
        dropout=dropout,
    )


def trim(block: Block, rows: int, columns: int) -> Part:
    """Return what the band leaves of a block: without rows that see no column, columns that no row sees, vacuous bounds.

    Many a band is a causal square then, or none at all, and every band is one that FlashAttention can express.
    """
    start, stop, first, last = 0, rows, 0, columns
    if block.low is not None:
        stop, first = min(stop, columns - block.low), max(first, block.low)
    # Columns of a prefix are seen whatever `high` says.
    if block.high is not None and block.prefix is None:
        start, last = max(start, -block.high), min(last, rows + block.high)
        if block.low is not None and block.low > block.high:
            stop = start
    part = Part(slice(start, stop), slice(first, last), block)
    if part.is_empty:
        return part
    if not part.is_whole(rows, columns):
        block = cut(block, part.rows, part.columns)
    if block.low is not None and block.low <= start - stop + 1:
        block = replace(block, low=None)
    if block.high is not None and block.high >= last - first - 1:
        block = replace(block, high=None)
    return Part(part.rows, part.columns, block)


def by_reach(part: Part) -> list[Part]:
    """Return a part with more rows than columns as those rows that the same bounds keep from some column.

    FlashAttention 2 takes a bound of as many keys as there are for none, and no bound for one of as many keys as there are. Both
    are wrong only where there are more rows than columns, which no part with a bound has then.
    """
    rows, columns = part.rows.stop - part.rows.start, part.columns.stop - part.columns.start
    block = part.block
    if block.prefix is not None or block.rectangles or rows <= columns:
        return [part]
    firsts = {0, rows}
    if block.high is not None:
        firsts.add(columns - 1 - block.high)  # the first row that sees all columns as far as `high` goes
    if block.low is not None:
        firsts.add(1 - block.low)  # the first row that `low` keeps from the first column
    found = []
    for own in starmap(slice, pairwise(sorted(row for row in firsts if 0 <= row <= rows))):
        inner = trim(cut(block, own, slice(0, columns)), own.stop - own.start, columns)
        if not inner.is_empty:
            at = _moved(inner.rows, own.start + part.rows.start)
            found.append(Part(at, _moved(inner.columns, part.columns.start), inner.block))
    return found


def documents(block: Block) -> list[Part]:
    """Return the documents of a block with `lengths` apart, those that the band hides wholly left out."""
    parts, start = [], 0
    for length in block.lengths:
        whole = slice(start, start + length)
        part = trim(replace(cut(block, whole, whole), lengths=()), length, length)
        if not part.is_empty:
            parts.append(Part(_moved(part.rows, start), _moved(part.columns, start), part.block))
        start += length
    return parts


def rectangles(block: Block) -> list[Part]:
    """Return the rectangles of a block apart, without those that the band hides wholly."""
    parts = []
    for at in block.rectangles:
        # From here on the band is counted from the first corner.
        shift = at.columns - at.rows
        low, high = (None if bound is None else bound + shift for bound in (block.low, block.high))
        alone = replace(cut(block, at.row_slice, at.column_slice), rectangles=(), low=low, high=high)
        part = trim(alone, at.rows, at.columns)
        if not part.is_empty:
            parts.append(Part(_moved(part.rows, at.row), _moved(part.columns, at.column), part.block))
    return parts


def of_known_sizes(part: Part) -> list[Part]:
    """Return the parts of a block that follows documents: of sizes that recur, which are not varied, and what is left.

    A causal square is a smaller one, and a strip of rows below it; a rectangle as well, if its width recurs. Documents too
    short for that stay together.
    """
    block, start = part.block, part.rows.start
    if not block.lengths:
        rows, columns = part.rows.stop - start, part.columns.stop - part.columns.start
        if rows % STEP == 0 and columns % STEP == 0:
            return [replace(part, block=replace(block, is_varied=False))]
        is_square = block.is_causal_square and rows == columns
        is_rectangle = not block.has_band and columns % STEP == 0
        return _above(part, rows) if rows >= LONG and (is_square or is_rectangle) else [part]
    if not block.is_causal_square:
        return [part]
    found: list[Part] = []
    for is_long, group in groupby(block.lengths, lambda length: length >= LONG):
        for lengths in ((x,) for x in group) if is_long else (tuple(group),):
            own = slice(start - part.rows.start, start - part.rows.start + sum(lengths))
            inner = replace(cut(block, own, own), lengths=lengths if len(lengths) > 1 else ())
            at = slice(start, start + sum(lengths))
            of_columns = _moved(own, part.columns.start)
            alone = Part(at, of_columns, inner)
            found += of_known_sizes(alone) if is_long else [alone]
            start = at.stop
    return found


def _above(part: Part, rows: int) -> list[Part]:
    """Return so many rows that their number recurs, with the columns that they see, and the rows below."""
    main = rows // STEP * STEP
    own, rest, columns = slice(0, main), slice(main, rows), slice(0, part.columns.stop - part.columns.start)
    parts = []
    for of_rows, of_columns, is_varied in (
        (own, own if part.block.has_band else columns, False),
        (rest, columns, True),
    ):
        if of_rows.start < of_rows.stop:
            block = replace(cut(part.block, of_rows, of_columns), is_varied=is_varied)
            parts.append(Part(_moved(of_rows, part.rows.start), _moved(of_columns, part.columns.start), block))
    return parts


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def sees_diagonal(block: Block) -> bool:
    """Whether the band has each row see its own column."""
    return (block.low is None or block.low <= 0) and (block.high is None or block.high >= 0)


def sees_last_corners(block: Block) -> bool:
    """Whether each row of the rectangles of a block sees some column."""
    has_all = block.high is None and block.low is None
    return has_all or (sees_diagonal(block) and all(part.rows <= part.columns for part in block.rectangles))


def with_dim(x: Tensor, size: int) -> Tensor:
    """Return `x` with zeros behind its last dim up to `size`: they change no product of two vectors."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def without_dim(x: Tensor, size: int) -> Tensor:
    """Return `x` without what `with_dim` put behind its last dim."""
    return x if x.shape[-1] == size else x[..., :size]
