"""Partial: results and gradients that come in pieces: the first of a row is kept as it is, the others are merged into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from cpcompile.runtime import kernels, merge
from cpcompile.runtime.kernels import triton_merge
from cpcompile.runtime.lanes import Lanes
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.schedule import Piece, Span
from cpcompile.runtime.terms import Terms

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]


def empty_result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) without values. `out` is `[B, H, S, Dv]` over `[B, S, H, Dv]` memory: models merge the heads next."""
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=accumulation_dtype(q.dtype))


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block in place, in one pass over memory where a kernel can; see `merge.merge_`."""
    fused = triton_merge.takes(out, lse, block_out, block_lse)
    (triton_merge.merge_ if fused else merge.merge_)(out, lse, block_out, block_lse)


def add_(total: Tensor, x: Tensor) -> None:
    """Add `x` to `total` in place; see `merge.add_`."""
    (triton_merge.add_ if triton_merge.takes(total, x) else merge.add_)(total, x)


class _Covered:
    """Which slots of each row of the batch have a value: a few runs, so that asking costs the host nothing."""

    def __init__(self, batch: int, num_slots: int) -> None:
        self._runs: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        self._num_slots = num_slots

    def _of(self, batch: slice | None) -> list[list[tuple[int, int]]]:
        return self._runs if batch is None else self._runs[batch]

    def meets(self, batch: slice | None, slots: slice) -> bool:
        """Tell whether some of these slots have a value."""
        return any(start < slots.stop and slots.start < stop for runs in self._of(batch) for start, stop in runs)

    def add(self, batch: slice | None, slots: slice) -> None:
        """Note that these slots have a value."""
        for runs in self._of(batch):
            own = (slots.start, slots.stop)
            met = [run for run in runs if run[0] <= own[1] and own[0] <= run[1]]
            joined = min(run[0] for run in (own, *met)), max(run[1] for run in (own, *met))
            runs[:] = sorted([joined, *(run for run in runs if run not in met)])

    def fill(self) -> Iterator[tuple[int, int, int]]:
        """Yield (row of the batch, start, stop) of all slots without a value, which then have one."""
        for index, runs in enumerate(self._runs):
            end = 0
            for start, stop in [*runs, (self._num_slots, self._num_slots)]:
                if end < start:
                    yield index, end, start
                end = stop
            runs[:] = [(0, self._num_slots)]


class _Rows:
    """Tensors `[B, H, S, ...]` that are made of pieces of their rows.

    What a row holds before its first piece is `nothing`, one number for each tensor. With `is_wide`, the first tensor is
    accumulated in the accumulation dtype as soon as two pieces meet; without, in its own, which two pieces bear.
    """

    def __init__(
        self, empty: Callable[[], Tensors], shape: torch.Size, nothing: Sequence[float], is_wide: bool
    ) -> None:
        self._empty, self._nothing, self._is_wide = empty, nothing, is_wide
        self._shape = shape
        self._held: Tensors = ()
        self._covered = _Covered(shape[0], shape[2])

    def add(self, piece: Tensors, batch: slice | None, slots: slice, join: Callable[..., None]) -> None:
        """Put a piece into these rows, by `join(*held, *piece)` where they hold something."""
        rows = slice(None) if batch is None else batch
        if not self._held:
            if piece[0].shape == self._shape:
                self._held = piece
                self._covered.add(None, slots)
                return
            self._held = self._empty()
        if self._covered.meets(batch, slots):
            self._fill()
            if self._is_wide and self._held[0].dtype != accumulation_dtype(self._held[0].dtype):
                self._held = self._held[0].to(accumulation_dtype(self._held[0].dtype)), *self._held[1:]
            join(*(x[rows, :, slots] for x in self._held), *piece)
        else:
            for to, x in zip(self._held, piece, strict=True):
                to[rows, :, slots] = x
            self._covered.add(batch, slots)

    def _fill(self) -> None:
        """Give `nothing` to the rows without a piece."""
        for index, start, stop in self._covered.fill():
            for x, value in zip(self._held, self._nothing, strict=True):
                x[index, :, start:stop] = value

    def finish(self) -> Tensors:
        """Return the tensors; rows without a piece hold `nothing`."""
        self._held = self._held or self._empty()
        self._fill()
        return self._held


def _dense(x: Tensor) -> Tensor:
    """Kernels need the head dim contiguous; the other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _part(x: Tensor, piece: Piece, span: Span) -> Tensor:
    return (x if piece.batch is None else x[piece.batch])[:, :, span.slots]


class Result:
    """Attention so far: `out` `[B, H, S, Dv]` and `lse` `[B, H, S]`."""

    def __init__(self, q: Tensor, v: Tensor, num_blocks: int, num_pieces: int) -> None:
        """Expect `num_blocks` blocks of keys, of at most `num_pieces` pieces each."""
        self._q, self._v = q, v
        shape = torch.Size((*q.shape[:3], v.shape[3]))
        self._rows = _Rows(lambda: empty_result(q, v), shape, (0.0, -torch.inf), is_wide=num_blocks > 2)
        self._lanes = Lanes(q.device, num_pieces)

    def add(self, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], terms: Terms) -> None:
        """Merge the attention of some pieces, of rows of q and the keys that k and v hold."""
        q, k, v = _dense(q), _dense(k), _dense(v)

        def start(piece: Piece) -> None:
            at = (q, piece.rows), (k, piece.columns), (v, piece.columns)
            q_, k_, v_ = (_part(x, piece, span) for x, span in at)
            block = terms.block(piece, q.device)
            self._lanes.submit(
                lambda: kernels.forward(q_, k_, v_, block, terms.kernel),
                lambda found: self._rows.add(found, piece.batch, piece.rows.slots, merge_),
            )

        for piece in pieces:
            start(piece)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return (out, lse) in the dtypes and strides of `empty_result`; rows that saw no key are 0 and -inf."""
        self._lanes.flush()
        held, held_lse = self._rows.finish()
        out, lse = empty_result(self._q, self._v)
        same = held.dtype == out.dtype and held.stride() == out.stride()
        return held if same else out.copy_(held), held_lse.to(lse.dtype).contiguous()


class Gradient:
    """A gradient so far, `[B, H, S, D]`."""

    def __init__(self, like: Tensor, num_blocks: int) -> None:
        """Expect that `num_blocks` blocks add to each row."""
        self._like = like
        self._rows = _Rows(lambda: (torch.empty_like(like),), like.shape, (0.0,), is_wide=num_blocks > 2)

    def add(self, x: Tensor, slots: slice, batch: slice | None = None) -> None:
        """Add the gradient of the rows in `slots`."""
        self._rows.add((x,), batch, slots, add_)

    def finish(self) -> Tensor:
        """Return the gradient, in dtype and strides `empty_like` the tensor it belongs to; rows that none added to are 0."""
        held, like = self._rows.finish()[0], torch.empty_like(self._like)
        return held if held.dtype == like.dtype and held.stride() == like.stride() else like.copy_(held)


def add_gradients(
    dq: Gradient,
    dk: Gradient,
    dv: Gradient,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    pieces: Sequence[Piece],
    terms: Terms,
    lanes: Lanes,
) -> int:
    """Add the gradients of some pieces, once `lanes` has been waited for the number that is returned.

    `tensors`: dout, q, k, v, out, lse; the last two are over all keys.
    """
    dout, q, k, v, out, lse = tensors
    dout, q, k, v, out = (_dense(x) for x in (dout, q, k, v, out))

    def start(piece: Piece) -> int:
        dout_, q_, out_, lse_ = (_part(x, piece, piece.rows) for x in (dout, q, out, lse))
        k_, v_ = (_part(x, piece, piece.columns) for x in (k, v))
        block = terms.block(piece, q.device)

        def take(found: Tensors) -> None:
            for gradient, x, span in zip((dq, dk, dv), found, (piece.rows, piece.columns, piece.columns), strict=True):
                gradient.add(x, span.slots, piece.batch)

        return lanes.submit(lambda: kernels.backward(dout_, q_, k_, v_, out_, lse_, block, terms.kernel), take)

    return max((start(piece) for piece in pieces), default=0)
