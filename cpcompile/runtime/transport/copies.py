"""Copies: what is copied from some tensors to others, found once and made again for all tensors of the same sizes and strides.

The host is where an attention of short documents loses its time: a view takes it some 3 us and a copy 9 (H200), so that each
copy takes two views, by strides that are known, and nothing is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, int | torch.SymInt]  # sizes, strides, and the place in 16 bytes
Pair = tuple[int, Tensor, int, Tensor]  # the number of a tensor and the view of it to copy to, and those to copy from
_WIDE = torch.complex128


@dataclass(frozen=True, slots=True)
class View:
    """A view of the tensor of that number: its sizes and strides, and where it begins behind the first element."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, view: Tensor, number: int, whole: Tensor) -> View:
        """Describe a view of `whole`."""
        return cls(number, tuple(view.shape), view.stride(), int(view.storage_offset() - whole.storage_offset()))

    def among(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the view of its tensor."""
        whole = tensors[self.number]
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.start)


@dataclass(frozen=True, slots=True)
class Copies:
    """Pairs of a place and what is copied there; the first go 16 bytes at once, where torch takes element by element."""

    wide: tuple[tuple[View, View], ...]
    others: tuple[tuple[View, View], ...]
    numbers: frozenset[int]  # of the tensors of the first

    @classmethod
    def of(cls, pairs: Iterable[Pair], tensors: Sequence[Tensor]) -> Copies:
        """Describe copies between tensors without values."""
        wide, others = list[tuple[View, View]](), list[tuple[View, View]]()
        for to, place, number, x in pairs:
            bases = tensors[to], tensors[number]
            if has_wide_copy(place, x) and all(map(has_wide_rows, bases)):
                place, x, bases = place.view(_WIDE), x.view(_WIDE), (bases[0].view(_WIDE), bases[1].view(_WIDE))
                wide.append((View.of(place, to, bases[0]), View.of(x, number, bases[1])))
            else:
                others.append((View.of(place, to, bases[0]), View.of(x, number, bases[1])))
        return cls(tuple(wide), tuple(others), frozenset(view.number for pair in wide for view in pair))

    def make(self, tensors: Sequence[Tensor]) -> None:
        """Copy between tensors like those that were described."""
        for place, x in self.others:
            place.among(tensors).copy_(x.among(tensors))
        if self.wide:
            wide = [x.view(_WIDE) if number in self.numbers else x for number, x in enumerate(tensors)]
            for place, x in self.wide:
                place.among(wide).copy_(x.among(wide))


def has_wide_copy(to: Tensor, x: Tensor) -> bool:
    """Tell whether a copy goes 16 bytes at once: torch does that itself where both are contiguous."""
    are_runs = to.dtype == x.dtype and not (to.is_contiguous() and x.is_contiguous())
    return are_runs and has_wide_rows(to) and has_wide_rows(x)


def has_wide_rows(x: Tensor) -> bool:
    """Tell whether a view of 16-byte elements exists."""
    *strides, last = x.stride() or (0,)
    size = _WIDE.itemsize // x.dtype.itemsize
    return last == 1 and all(n % size == 0 for n in (x.shape[-1], x.storage_offset(), *strides))


def kind_of(x: Tensor) -> Kind:
    """Return what copies depend on: tensors of one kind are described alike."""
    return x.shape, x.stride(), x.dtype, x.storage_offset() % _WIDE.itemsize


def like(kind: Kind) -> Tensor:
    """Return a tensor of a kind without values and memory."""
    shape, stride, dtype, first = kind
    numel = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if shape.numel() else 0
    return torch.empty(first + numel, dtype=dtype, device="meta").as_strided(shape, stride, first)
