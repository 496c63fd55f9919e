"""Block: attention of the tokens in some spans over the tokens in others, whatever hides keys, by the pieces of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpcompile.runtime import kernels
from cpcompile.runtime.merge import accumulation_dtype, merge_
from cpcompile.runtime.schedule import Piece, Span, pieces


@dataclass(frozen=True, slots=True)
class Terms:
    """What an attention computes, apart from q, k and v.

    `mask` `[B|1, H|1, rows|1, S|1]` has the rows that q has and the columns of the whole sequence; `documents` and
    `key_padding` `[B|1, S]` are of the whole sequence. All are None or apply together with `is_causal` and `window`.
    """

    mask: torch.Tensor | None
    documents: torch.Tensor | None
    key_padding: torch.Tensor | None
    scale: float
    is_causal: bool
    window: int
    softcap: float

    @classmethod
    def of(
        cls,
        mask: torch.Tensor | None,
        documents: torch.Tensor | None,
        key_padding: torch.Tensor | None,
        scale: float,
        is_causal: bool,
        window: int,
        softcap: float,
    ) -> Terms:
        """Return the terms with a mask of four dims."""
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        return cls(mask, documents, key_padding, scale, is_causal, window, softcap)

    def pieces(self, rows: Sequence[Span], columns: Sequence[Span]) -> list[Piece]:
        """Return the rectangles to compute."""
        tensors = (self.mask, self.documents, self.key_padding)
        needs_mask = any(tensor is not None for tensor in tensors)
        return pieces(rows, columns, is_causal=self.is_causal, window=self.window, needs_mask=needs_mask)

    def mask_of(self, piece: Piece, device: torch.device) -> torch.Tensor | None:
        """Return what `piece` may see: None for all, True for visible, or a float mask to add."""
        if not piece.is_masked:
            return None
        rows, columns = piece.rows, piece.columns
        q = torch.arange(rows.position, rows.end, device=device)[:, None]
        k = torch.arange(columns.position, columns.end, device=device)
        visible = torch.ones(1, 1, rows.size, columns.size, dtype=torch.bool, device=device)
        if self.is_causal:
            visible = visible & (k <= q)
        if self.window:
            visible = visible & (q - k < self.window)
        if self.documents is not None:
            same = self.documents[:, rows.positions, None] == self.documents[:, None, columns.positions]
            visible = visible & same.unsqueeze(1)
        if self.key_padding is not None:
            visible = visible & self.key_padding[:, None, None, columns.positions]
        if self.mask is None:
            return visible
        mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, rows.slots]
        mask = mask if mask.shape[3] == 1 else mask[..., columns.positions]
        return visible & mask if mask.dtype == torch.bool else torch.where(visible, mask, -torch.inf)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Kernels need the head dim contiguous; the other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_result(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) without values. `out` is `[B, H, S, Dv]` over `[B, S, H, Dv]` memory: models merge the heads next."""
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=accumulation_dtype(q.dtype))


class Result:
    """Attention so far, `out` `[B, H, S, Dv]` and `lse` `[B, H, S]`; blocks are merged in the accumulation dtype."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor) -> None:
        self._empty = empty_result(q, v)
        self._merged: tuple[torch.Tensor, torch.Tensor] | None = None

    def _merge(self, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        dtype = self._empty[1].dtype
        if self._merged is None and out.shape == self._empty[0].shape:
            # The first block over all rows is the result; often it is the only one, and then nothing is copied.
            self._merged = out, lse.to(dtype)
            return
        if self._merged is None:
            self._merged = torch.zeros_like(self._empty[0], dtype=dtype), self._empty[1].fill_(-torch.inf)
        self._merged = self._merged[0].to(dtype), self._merged[1]
        merge_(self._merged[0][:, :, rows], self._merged[1][:, :, rows], out, lse)

    def add(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: Sequence[Span],
        columns: Sequence[Span],
        terms: Terms,
    ) -> None:
        """Merge the attention of `rows` over `columns`, the keys that k and v hold."""
        for piece in terms.pieces(rows, columns):
            to, seen = piece.rows.slots, piece.columns.slots
            out, lse = kernels.forward(
                _dense(q)[:, :, to],
                _dense(k)[:, :, seen],
                _dense(v)[:, :, seen],
                terms.mask_of(piece, q.device),
                scale=terms.scale,
                is_causal=piece.is_causal,
                softcap=terms.softcap,
            )
            self._merge(to, out, lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, lse) in the dtypes and strides of `empty_result`; rows that saw no key are 0 and -inf."""
        out, lse = self._empty
        if self._merged is None:
            return out.zero_(), lse.fill_(-torch.inf)
        merged = self._merged[0].to(out.dtype)
        return merged if merged.stride() == out.stride() else out.copy_(merged), self._merged[1].contiguous()


@dataclass(slots=True)
class Gradients:
    """The gradients so far, in the accumulation dtype: `dq` of the local rows, `dk` and `dv` of the keys at hand."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor

    @classmethod
    def empty(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
        """Return zeros for these tensors."""
        dtype = accumulation_dtype(q.dtype)
        return cls(*(x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v)))

    def add(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rows: Sequence[Span],
        columns: Sequence[Span],
        terms: Terms,
    ) -> None:
        """Add the gradients of `rows` over `columns`; `out` and `lse` are over all keys."""
        for piece in terms.pieces(rows, columns):
            to, seen = piece.rows.slots, piece.columns.slots
            dq, dk, dv = kernels.backward(
                _dense(dout)[:, :, to],
                _dense(q)[:, :, to],
                _dense(k)[:, :, seen],
                _dense(v)[:, :, seen],
                out[:, :, to],
                lse[:, :, to],
                terms.mask_of(piece, q.device),
                scale=terms.scale,
                is_causal=piece.is_causal,
                softcap=terms.softcap,
            )
            self.dq[:, :, to] += dq
            self.dk[:, :, seen] += dk
            self.dv[:, :, seen] += dv
