"""Partial results: results and gradients come in pieces; the first of a row is kept as it is, the others are merged into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cpcompile.balance.token_spans import Rectangle
from cpcompile.runtime import kernels
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.kernels import merge, triton_merge
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.calls import of_known_widths, together, windows_apart
from cpcompile.runtime.kernels.case import Case, features
from cpcompile.runtime.kernels.lanes import Lanes
from cpcompile.runtime.kernels.merge import accumulation_dtype
from cpcompile.runtime.schedule import Piece, Visible

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
# Elements from which on the kernel is worth while that adds bfloat16 to float32: it takes 26 us for 8 M where torch takes 38, and
# its host 24 where that of torch takes 7 (H100).
LARGE = 1 << 22


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
    fused = total.numel() >= LARGE and total.dtype != x.dtype and triton_merge.takes(total, x)
    (triton_merge.add_ if fused else merge.add_)(total, x)


class _Covered:
    """Which slots have a value, in a few runs for all rows of the batch, or for each once a piece is of some of them."""

    def __init__(self, batch: int, num_slots: int) -> None:
        self._batch, self._num_slots = batch, num_slots
        self._runs: list[list[tuple[int, int]]] = [[]]

    def _of(self, batch: int | None) -> list[list[tuple[int, int]]]:
        if batch is not None and len(self._runs) < self._batch:
            self._runs = [list(self._runs[0]) for _ in range(self._batch)]
        return self._runs if batch is None else [self._runs[batch]]

    def meets(self, batch: int | None, slots: slice) -> bool:
        """Tell whether some of these slots have a value."""
        return any(start < slots.stop and slots.start < stop for runs in self._of(batch) for start, stop in runs)

    def add(self, batch: int | None, slots: slice) -> None:
        """Note that these slots have a value."""
        own = (slots.start, slots.stop)
        for runs in self._of(batch):
            if not runs or runs[-1][1] < own[0]:  # pieces come in order, mostly
                runs.append(own)
            elif runs[-1][1] == own[0]:
                runs[-1] = (runs[-1][0], own[1])
            else:
                met = [run for run in runs if run[0] <= own[1] and own[0] <= run[1]]
                joined = min(run[0] for run in (own, *met)), max(run[1] for run in (own, *met))
                runs[:] = sorted([joined, *(run for run in runs if run not in met)])

    def fill(self) -> Iterator[tuple[int | None, slice]]:
        """Yield (row of the batch or None for all, slots) of all without a value, which then have one."""
        for index, runs in enumerate(self._runs):
            end, rows = 0, None if len(self._runs) == 1 else index
            for start, stop in [*runs, (self._num_slots, self._num_slots)]:
                if end < start:
                    yield rows, slice(end, start)
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

    def add(self, piece: Tensors, batch: int | None, slots: slice, join: Callable[..., None]) -> None:
        """Put a piece into these rows, by `join(*held, *piece)` where they hold something."""
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
            join(*(_part(x, batch, slots) for x in self._held), *piece)
        else:
            for to, x in zip(self._held, piece, strict=True):
                _part(to, batch, slots).copy_(x)
            self._covered.add(batch, slots)

    def _fill(self) -> None:
        """Give `nothing` to the rows without a piece."""
        for rows, slots in self._covered.fill():
            for x, value in zip(self._held, self._nothing, strict=True):
                _part(x, rows, slots).fill_(value)

    def finish(self) -> Tensors:
        """Return the tensors; rows without a piece hold `nothing`."""
        self._held = self._held or self._empty()
        self._fill()
        return self._held


def _dense(x: Tensor) -> Tensor:
    """Kernels need the head dim contiguous; the other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _part(x: Tensor, batch: int | None, slots: slice) -> Tensor:
    """Return some slots of a row of the batch, or of all rows."""
    size = slots.stop - slots.start
    x = x if batch is None else x[batch : batch + 1]
    return x if size == x.shape[2] else x.narrow(2, slots.start, size)


def _within(slots: slice, run: slice) -> slice:
    """Return where a run is in what a kernel returned for some slots."""
    return slice(run.start - slots.start, run.stop - slots.start)


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """A call of kernels: the slots of its rows and columns, the runs of both where its results go, and what is computed.

    `block` is None where it holds tensors, so that each call makes its own.
    """

    piece: Piece
    rows: slice
    columns: slice
    row_runs: tuple[slice, ...]
    column_runs: tuple[slice, ...]
    block: Block | None

    @classmethod
    def of(cls, piece: Piece, block: Block | None) -> _Launch:
        """Return the launch of a piece."""
        return cls(piece, piece.rows.slots, piece.columns.slots, piece.row_runs, piece.column_runs, block)


def _launches(
    pieces: tuple[Piece, ...], terms: AttentionArguments, q: Tensor, v: Tensor, for_backward: bool
) -> Sequence[_Launch]:
    """Return the pieces as the calls of kernels that compute them."""
    if not terms.visible.is_joined:
        return [_Launch.of(piece, None) for piece in pieces]
    case = Case(q.device.type, q.dtype, q.shape[3], v.shape[3])
    is_deterministic = torch.are_deterministic_algorithms_enabled()  # kernels are chosen by it
    numbers = terms.scale, terms.softcap, terms.kernel
    return _known_launches(pieces, terms.visible, *numbers, case, for_backward, is_deterministic)


@lru_cache(maxsize=1024)
def _known_launches(
    pieces: tuple[Piece, ...],
    visible: Visible,
    scale: float,
    softcap: float,
    kernel: str,
    plain: Case,
    for_backward: bool,
    is_deterministic: bool,
) -> tuple[_Launch, ...]:
    """Return the calls of what numbers say in full, found once for all layers of a batch and for batches alike."""
    terms = AttentionArguments(None, None, None, scale, False, 0, softcap, visible=visible)
    parts = _calls(pieces, terms, kernel, plain, for_backward)
    return tuple(_Launch.of(piece, terms.block(piece, torch.device(plain.device))) for piece in parts)


def _calls(
    pieces: tuple[Piece, ...], terms: AttentionArguments, kernel: str, plain: Case, for_backward: bool
) -> tuple[Piece, ...]:
    """Return the pieces joined or cut as the kernel takes them that computes them."""
    visible = terms.visible
    has_window = visible.band.low is not None
    if not pieces or not (has_window or visible.is_varied):
        return pieces
    block = terms.block(pieces[0], torch.device(plain.device))

    def case_of(block: Block) -> Case:
        return replace(plain, features=features(block))

    if has_window and kernels.prefers_squares(case_of, block, kernel):
        pieces = windows_apart(pieces)
    if not visible.is_varied:
        return pieces
    many = replace(block, rectangles=(Rectangle(0, 1, 0, 1),))
    return (
        together(pieces, for_backward) if kernels.takes_rectangles(case_of(many), kernel) else of_known_widths(pieces)
    )


class Result:
    """Attention so far: `out` `[B, H, S, Dv]` and `lse` `[B, H, S]`."""

    def __init__(self, q: Tensor, v: Tensor, num_blocks: int, num_pieces: int) -> None:
        """Expect `num_blocks` blocks of keys, of `num_pieces` pieces in all."""
        self._q, self._v = q, v
        shape = torch.Size((*q.shape[:3], v.shape[3]))
        self._rows = _Rows(lambda: empty_result(q, v), shape, (0.0, -torch.inf), is_wide=num_blocks > 2)
        self._lanes = Lanes(q.device, num_pieces)

    def add(self, q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Piece, ...], terms: AttentionArguments) -> None:
        """Merge the attention of some pieces, of rows of q and the keys that k and v hold."""
        q, k, v = _dense(q), _dense(k), _dense(v)

        def start(launch: _Launch) -> None:
            rows, columns, batch = launch.rows, launch.columns, launch.piece.batch
            q_, k_, v_ = _part(q, batch, rows), _part(k, batch, columns), _part(v, batch, columns)
            block = launch.block or terms.block(launch.piece, q.device)

            def take(found: Tensors) -> None:
                for run in launch.row_runs:
                    parts = found if run == rows else tuple(_part(x, None, _within(rows, run)) for x in found)
                    self._rows.add(parts, batch, run, merge_)

            self._lanes.submit(lambda: kernels.forward(q_, k_, v_, block, terms.kernel), take)

        for launch in _launches(pieces, terms, q, v, for_backward=False):
            start(launch)

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

    def add(self, x: Tensor, slots: slice, batch: int | None = None) -> None:
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
    pieces: tuple[Piece, ...],
    terms: AttentionArguments,
    lanes: Lanes,
) -> int:
    """Add the gradients of some pieces, once `lanes` has been waited for the number that is returned.

    `tensors`: dout, q, k, v, out, lse; the last two are over all keys.
    """
    dout, q, k, v, out, lse = tensors
    dout, q, k, v, out = (_dense(x) for x in (dout, q, k, v, out))

    def start(launch: _Launch) -> int:
        rows, columns, batch = launch.rows, launch.columns, launch.piece.batch
        dout_, q_, out_, lse_ = (_part(x, batch, rows) for x in (dout, q, out, lse))
        k_, v_ = _part(k, batch, columns), _part(v, batch, columns)
        block = launch.block or terms.block(launch.piece, q.device)

        def take(found: Tensors) -> None:
            of_columns = columns, launch.column_runs
            places = (rows, launch.row_runs), of_columns, of_columns
            for gradient, x, (slots, runs) in zip((dq, dk, dv), found, places, strict=True):
                for run in runs:
                    gradient.add(x if run == slots else _part(x, None, _within(slots, run)), run, batch)

        return lanes.submit(lambda: kernels.backward(dout_, q_, k_, v_, out_, lse_, block, terms.kernel), take)

    return max((start(launch) for launch in _launches(pieces, terms, q, v, for_backward=True)), default=0)
