"""Attention arguments: what an attention computes beside q, k and v; every attention operator has these arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile.balance.token_order import segments_of
from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.kernels.block import Block, Dropout
from cpcompile.runtime.schedule import Band, Piece, Visible, pieces

Tensor = torch.Tensor

# The arguments of every attention operator behind q, k and v, and in their order the fields of `AttentionArguments`. None is
# called `kernel`: Inductor passes arguments by name to a function that has one of that name.
SCHEMA = (
    "Tensor? mask, Tensor? documents, Tensor? key_padding, float scale, bool is_causal, SymInt window, float softcap, "
    "float dropout=0.0, SymInt lookahead=-1, Tensor? bounds=None, Tensor? prefix=None, Tensor? slopes=None, "
    "Tensor? sinks=None, Tensor? seed=None, int site=0, str kernel_name='auto'"
)
NAMES = [argument.split("=")[0].split()[-1] for argument in SCHEMA.split(",")]

EVERYTHING = Visible(Band())


@dataclass(frozen=True, slots=True)
class AttentionArguments:
    """What an attention computes. A key is visible where all of these agree; a row that sees no key gives 0.

    Attributes:
        mask: `[B|1, H|1, rows|1, Skv|1]` with the rows that q has and the columns of the whole sequence: bool (True
            attends) or float (added to the scores after `softcap`).
        documents: ids `[B|1, S]` of the whole sequence, equal at query and key where visible.
        key_padding: bool `[B|1, Skv]` of the whole sequence, True where visible.
        scale: factor of the scores.
        is_causal: kv <= q, except for keys of the prefix.
        window: W > 0: q - kv < W.
        softcap: c > 0 turns scores s into `c * tanh(s / c)`.
        dropout: probability of a weight being dropped, decided by `seed` and `site`.
        lookahead: A >= 0: kv - q <= A.
        bounds: where documents begin, as `document_bounds` returns them, on the CPU; None where that is not known.
        prefix: int64 `[B|1]`: keys at positions below it are visible to all rows.
        slopes: `[H]`: ALiBi adds `-slopes[h] * |q - kv|` to the scores.
        sinks: `[H]`: a logit that takes part in each row's softmax and has no value.
        kernel: the kernel to use, or `auto`.
        first_head, num_heads: which heads these are, of how many; 0 heads: all.
        length: tokens of the whole sequence, for dropout.
        visible: what the host knows of what is visible.
    """

    mask: Tensor | None
    documents: Tensor | None
    key_padding: Tensor | None
    scale: float
    is_causal: bool
    window: int
    softcap: float
    dropout: float = 0.0
    lookahead: int = -1
    bounds: Tensor | None = None
    prefix: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    site: int = 0
    kernel: str = "auto"
    first_head: int = 0
    num_heads: int = 0
    length: int = 0
    visible: Visible = EVERYTHING

    @classmethod
    def of(cls, q: Tensor, k: Tensor, values: Sequence[Any], length: int) -> AttentionArguments:
        """Return the terms of an operator's arguments: `values` in the order of `SCHEMA`."""
        terms = cls(*values)
        mask = terms.mask
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        return replace(terms, mask=mask, num_heads=q.shape[1], length=length, visible=terms._visible())

    def of_heads(self, start: int, stop: int) -> AttentionArguments:
        """Return the terms of the query heads [start, stop)."""
        mask, heads = self.mask, slice(start, stop)
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        slopes, sinks = (None if x is None else x[heads] for x in (self.slopes, self.sinks))
        return replace(self, mask=mask, slopes=slopes, sinks=sinks, first_head=self.first_head + start)

    def _visible(self) -> Visible:
        """Return what the host knows of what is visible."""
        high = 0 if self.is_causal else None if self.lookahead < 0 else self.lookahead
        band = Band(1 - self.window if self.window > 0 else None, high)
        segments = segments_of(self.bounds) if self.documents is not None and self.bounds is not None else None
        tensors = (self.mask, self.documents if segments is None else None, self.key_padding, self.prefix, self.slopes)
        # These are read by position, and dropout counts positions.
        is_joined = all(x is None for x in tensors) and not self.dropout
        return Visible(band, segments, self.prefix is not None, is_joined)

    def pieces(self, rows: Spans, columns: Spans) -> tuple[Piece, ...]:
        """Return the rectangles to compute."""
        return pieces(rows, columns, self.visible)

    def block(self, piece: Piece, device: torch.device) -> Block:
        """Return what a kernel computes for `piece`."""
        rows, columns, batch = piece.rows, piece.columns, piece.batch
        mask = _of(self.mask, batch)
        if mask is not None:
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows.slots]
            mask = mask if mask.shape[3] == 1 else mask[..., columns.positions]
        documents = None
        if self.documents is not None and self.visible.segments is None:
            ids = _of(self.documents, batch)
            assert ids is not None
            documents = ids[:, rows.positions], ids[:, columns.positions]
        padding, prefix = _of(self.key_padding, batch), _of(self.prefix, batch)
        return Block(
            scale=self.scale,
            softcap=self.softcap,
            low=piece.low,
            high=piece.high,
            lengths=piece.lengths,
            rectangles=piece.rectangles,
            mask=mask,
            documents=documents,
            key_padding=None if padding is None else padding[:, columns.positions],
            prefix=None if prefix is None or piece.high is None else prefix - columns.position,
            slopes=self.slopes,
            distance=0 if self.slopes is None else rows.position - columns.position,
            dropout=self._dropout_of(piece),
            is_varied=self.visible.is_varied,
        )

    def _dropout_of(self, piece: Piece) -> Dropout | None:
        if self.dropout == 0:
            return None
        assert self.seed is not None, "dropout needs a seed"
        return Dropout(
            self.dropout,
            self.seed,
            self.site,
            piece.batch or 0,
            self.first_head,
            self.num_heads,
            piece.rows.position,
            piece.columns.position,
            self.length,
            self.length,
        )


def _of(x: Tensor | None, batch: int | None) -> Tensor | None:
    """Return the part of a tensor that belongs to a row of the batch, or to all."""
    return x if x is None or batch is None or x.shape[0] == 1 else x[batch : batch + 1]
