"""Block: what one kernel call computes beside its q, k and v.

Row i and column j are numbered within the block: q has the rows, k and v the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cpcompile.balance.token_spans import Rectangle
from cpcompile.runtime.tokens.dropout import is_kept

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Dropout:
    """Which weights are dropped: a function of the seed and of a weight's place in the whole `[B, H, S, Skv]`.

    Attributes:
        p: probability of being dropped, below 1. Weights that are kept are scaled by `1 / (1 - p)`.
        seed: int64 scalar, on the device; `site` tells the attentions of a graph apart.
        batch, head: the first of the block.
        num_heads: how many heads the whole attention has.
        row, column: the positions of row 0 and column 0.
        num_rows, num_columns: S and Skv of the whole attention.
    """

    p: float
    seed: Tensor
    site: int
    batch: int
    head: int
    num_heads: int
    row: int
    column: int
    num_rows: int
    num_columns: int

    def kept(self, batch: int, heads: int, rows: int, columns: int) -> Tensor:
        """Return which weights of `[batch, heads, rows, columns]` are kept."""
        at = self.seed.device
        b = torch.arange(self.batch, self.batch + batch, device=at)[:, None, None, None] * self.num_heads
        h = (b + torch.arange(self.head, self.head + heads, device=at)[:, None, None]) * self.num_rows
        r = (h + torch.arange(self.row, self.row + rows, device=at)[:, None]) * self.num_columns
        index = r + torch.arange(self.column, self.column + columns, device=at)
        return is_kept(self.seed, self.site, index, self.p)


@dataclass(frozen=True, slots=True)
class Block:
    """A column is visible to a row where all of these agree; a row that sees no column gives out 0 and lse -inf.

    Attributes:
        scale: factor of the scores.
        softcap: c > 0 turns scaled scores s into `c * tanh(s / c)`.
        low, high: bounds of `j - i`, None for no bound: a causal square has high 0, a causal window of W also low 1 - W.
        lengths: rows and columns are the same documents, of these lengths, and see their own only; the band is counted
            from their starts.
        rectangles: rows see columns within these only, no row is in two; the band is counted from their last corners, so that
            high 0 is causal where all rows of a rectangle follow its columns up to the last ones.
        mask: broadcasts to `[B, H, Sq, Skv]`; bool, True attends, or float, added to the scores after `softcap`.
        documents: ids `[B|1, Sq]` of rows and `[B|1, Skv]` of columns, equal where visible.
        key_padding: bool `[B|1, Skv]`, True where visible.
        prefix: int64 `[B|1]`: columns j < prefix[b] are visible whatever `high` says.
        slopes: `[H]`: ALiBi adds `-slopes[h] * |i - j + distance|` to the scores after `softcap`.
        distance: position of row 0 minus position of column 0.
        dropout: which weights are dropped.
        is_deterministic: the same bits at each run.
        is_varied: its sizes follow the documents of a batch, so that few blocks have been seen before.
    """

    scale: float
    softcap: float = 0.0
    low: int | None = None
    high: int | None = None
    lengths: tuple[int, ...] = ()
    rectangles: tuple[Rectangle, ...] = ()
    mask: Tensor | None = None
    documents: tuple[Tensor, Tensor] | None = None
    key_padding: Tensor | None = None
    prefix: Tensor | None = None
    slopes: Tensor | None = None
    distance: int = 0
    dropout: Dropout | None = None
    is_deterministic: bool = False
    is_varied: bool = False

    @property
    def has_band(self) -> bool:
        """Whether `j - i` is bounded."""
        return self.low is not None or self.high is not None

    @property
    def is_causal_square(self) -> bool:
        """Whether row i sees columns 0..i and nothing else is said of the band."""
        return self.high == 0 and self.low is None

    @property
    def is_causal_window(self) -> bool:
        """Whether row i sees columns up to i, and some before them."""
        return self.high == 0 and self.low is not None and self.low <= 0

    @property
    def is_of_numbers(self) -> bool:
        """Whether there is no tensor in it: equal ones are the same block."""
        tensors = (self.mask, self.documents, self.key_padding, self.prefix, self.slopes, self.dropout)
        return all(x is None for x in tensors)

    @property
    def hides_more(self) -> bool:
        """Whether tensors, not only the band, decide what is visible."""
        return any(x is not None for x in (self.mask, self.documents, self.key_padding, self.prefix))

    def visible(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Return the bool mask `[B|1, H|1, rows, columns]` of everything that hides keys, or None if all is visible.

        A float mask is not part of it.
        """
        i, j = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
        seen: Tensor | None = None
        distance = j - i
        if self.rectangles:
            within = torch.zeros(rows, columns, dtype=torch.bool, device=device)
            for part in self.rectangles:
                within[part.row_slice, part.column_slice] = True
                distance[part.row_slice] += part.row + part.rows - part.column - part.columns
            seen = within[None, None]
        if self.high is not None:
            below = (distance <= self.high)[None, None]
            if self.prefix is not None:
                below = below | (j < self.prefix[:, None])[:, None, None]
            seen = _both(seen, below)
        if self.low is not None:
            seen = _both(seen, (distance >= self.low)[None, None])
        if self.lengths:
            ids = torch.repeat_interleave(torch.tensor(self.lengths, device=device))
            seen = _both(seen, (ids[:, None] == ids)[None, None])
        if self.documents is not None:
            of_rows, of_columns = self.documents
            seen = _both(seen, (of_rows[:, :, None] == of_columns[:, None]).unsqueeze(1))
        if self.key_padding is not None:
            seen = _both(seen, self.key_padding[:, None, None].expand(-1, 1, rows, columns))
        if self.mask is not None and self.mask.dtype == torch.bool:
            seen = _both(seen, self.mask)
        return seen

    def bias(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Return what is added to the scores, `[B|1, H|1, rows, columns]`, or None."""
        bias = self.mask if self.mask is not None and self.mask.dtype != torch.bool else None
        if self.slopes is None:
            return bias
        i, j = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
        slopes = -self.slopes[None, :, None, None] * (i - j + self.distance).abs()
        return slopes if bias is None else bias + slopes

    def with_dense_mask(self, rows: int, columns: int, device: torch.device) -> Block:
        """Return the same block with everything that hides keys in one bool mask."""
        seen = self.visible(rows, columns, device)
        mask = self.mask if self.mask is not None and self.mask.dtype != torch.bool else None
        if mask is not None and seen is not None:
            mask, seen = torch.where(seen, mask, -torch.inf), None
        dense = mask if seen is None else seen
        plain = replace(
            self, low=None, high=None, lengths=(), rectangles=(), documents=None, key_padding=None, prefix=None
        )
        return replace(plain, mask=dense)


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b
