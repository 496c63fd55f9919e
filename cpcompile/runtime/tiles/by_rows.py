"""By rows: a function of each token's row runs for a tile of tokens at a time, in forward and again in backward.

What it computes between is in memory for one tile only, and nothing of it is kept for backward (Liu and Abbeel, Blockwise
Parallel Transformer, 2023; Bekman et al., Arctic Long Sequence Training, 2025). Gradients of what all tokens share are added up
over tiles in float32 at least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile import _torch

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "by_rows(Tensor[] rows, Tensor[] others, str function, int tile, bool compiled) -> Tensor[]"
)


@dataclass(frozen=True, slots=True)
class RowFunction:
    """A function of rows `[T, ...]` and of what all tokens share.

    Attributes:
        function: of rows and others, to the results.
        results: their shapes behind the dim of the tokens, and dtypes.
    """

    function: fx.GraphModule
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    _compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What it is known by, alike on all ranks and in every process."""
        return hashlib.sha256(f"{self.function.code}\n{self.results}".encode()).hexdigest()[:16]

    def compile(
        self, rows: Sequence[Tensor], others: Sequence[Tensor], needs: Sequence[bool], options: Mapping[str, Any]
    ) -> None:
        """Have Inductor compile forward and backward for any number of tokens, given operands of a tile."""
        grads = [rows[0].new_zeros(rows[0].shape[0], *inner, dtype=dtype) for inner, dtype in self.results]
        by_row = [True] * len(rows) + [False] * len(others)
        forward, backward = (self._kinds(rows, others, of) for of in (None, needs))
        if forward not in self._compiled:
            self._compiled[forward] = _torch.compile_by_rows(self.function, [*rows, *others], by_row, options)
        if backward not in self._compiled:
            count = len(grads)
            self._compiled[backward] = _torch.compile_by_rows(
                lambda *x: self._gradients(x[:count], x[count:], needs),
                [*grads, *rows, *others],
                [*[True] * count, *by_row],
                options,
            )

    def forward(self, compiled: bool, rows: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the results for a tile."""
        run = self._compiled[self._kinds(rows, others, None)] if compiled else self.function
        found: Sequence[Tensor] = run(*rows, *others)
        return found

    def backward(
        self,
        compiled: bool,
        grads: Sequence[Tensor],
        rows: Sequence[Tensor],
        others: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """Return the gradients of the operands that `needs` says, for a tile."""
        if compiled:
            return list(self._compiled[self._kinds(rows, others, needs)](*grads, *rows, *others))
        return self._gradients(grads, [*rows, *others], needs)

    def _gradients(self, grads: Sequence[Tensor], operands: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        with _torch.recording_gradients():
            given = [x.detach().requires_grad_(need) for x, need in zip(operands, needs, strict=True)]
            results = self.function(*given)
            reached = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
            wanted = [x for x, need in zip(given, needs, strict=True) if need]
            found = torch.autograd.grad(
                [r for r, _ in reached], wanted, [g for _, g in reached], allow_unused=True, materialize_grads=True
            )
        return list(found)

    def _kinds(self, rows: Sequence[Tensor], others: Sequence[Tensor], needs: Sequence[bool] | None) -> Any:
        """Return what a compiled function depends on beside the number of tokens."""
        by_row = [(x.dtype, tuple(x.shape[1:]), x.device.type) for x in rows]
        return (*by_row, *[(x.dtype, tuple(x.shape), x.device.type) for x in others], needs and tuple(needs))


_FUNCTIONS: dict[str, RowFunction] = {}


def add_function(function: RowFunction) -> str:
    """Make a function known to the operators, and return its key."""
    return _FUNCTIONS.setdefault(function.key, function).key


def function_of(key: str) -> RowFunction:
    """Return the function that a key stands for."""
    return _FUNCTIONS[key]


def by_rows(rows: Sequence[Tensor], others: Sequence[Tensor], function: str, tile: int, compiled: bool) -> list[Tensor]:
    """Return what a function computes of the rows of all tokens.

    Args:
        rows: `[..., features]`, and other tensors of one row a token, `[T, ...]`.
        others: what all tokens share.
        function: the key of the function.
        tile: how many tokens at once.
        compiled: whether Inductor has compiled the function.

    Returns:
        Results with the leading dims of the first operand.
    """
    lead = rows[0].shape[:-1]
    operands = [x.contiguous() for x in (rows[0].flatten(0, -2), *rows[1:], *others)]
    results = _ByRows.apply(function, tile, compiled, len(rows), *operands)  # type: ignore[no-untyped-call]
    return [x.reshape(*lead, *inner) for x, (inner, _) in zip(results, _FUNCTIONS[function].results, strict=True)]


# Composite: autograd and the compiler see the operators below.
_LIBRARY.impl("by_rows", by_rows, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: str, tile: int, compiled: bool, num_rows: int, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.arguments = key, tile, compiled, num_rows
        ctx.save_for_backward(*operands)
        return tuple(tiles_forward(list(operands[:num_rows]), list(operands[num_rows:]), key, tile, compiled))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        key, tile, compiled, num_rows = ctx.arguments
        operands, needs = ctx.saved_tensors, list(ctx.needs_input_grad[4:])
        rows, others = list(operands[:num_rows]), list(operands[num_rows:])
        given = iter(tiles_backward([g.contiguous() for g in grads], rows, others, key, tile, compiled, needs))
        return (
            None,
            None,
            None,
            None,
            *[next(given).to(x.dtype) if n else None for x, n in zip(operands, needs, strict=True)],
        )


@torch.library.custom_op("cpcompile::tiles_forward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def tiles_forward(rows: list[Tensor], others: list[Tensor], function: str, tile: int, compiled: bool) -> list[Tensor]:
    """Return the results of a function for all tokens."""
    of = _FUNCTIONS[function]
    results = _empty_results(of, rows[0])
    for part in tiles(rows[0].shape[0], tile):
        for result, found in zip(results, of.forward(compiled, [x[part] for x in rows], others), strict=True):
            result[part] = found
    return results


@tiles_forward.register_fake
def _(rows: list[Tensor], others: list[Tensor], function: str, tile: int, compiled: bool) -> list[Tensor]:
    return _empty_results(_FUNCTIONS[function], rows[0])


@torch.library.custom_op("cpcompile::tiles_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def tiles_backward(
    grads: list[Tensor],
    rows: list[Tensor],
    others: list[Tensor],
    function: str,
    tile: int,
    compiled: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of the operands that `needs` says; those of others in float32 at least."""
    of = _FUNCTIONS[function]
    totals = _empty_gradients(rows, others, needs)
    of_rows = sum(needs[: len(rows)])
    for i, part in enumerate(tiles(rows[0].shape[0], tile)):
        found = of.backward(compiled, [g[part] for g in grads], [x[part] for x in rows], others, needs)
        for total, grad in zip(totals[:of_rows], found[:of_rows], strict=True):
            total[part] = grad
        for total, grad in zip(totals[of_rows:], found[of_rows:], strict=True):
            total.add_(grad) if i else total.copy_(grad)
    return totals


@tiles_backward.register_fake
def _(
    grads: list[Tensor],
    rows: list[Tensor],
    others: list[Tensor],
    function: str,
    tile: int,
    compiled: bool,
    needs: list[bool],
) -> list[Tensor]:
    return _empty_gradients(rows, others, needs)


def tiles(count: int, size: int) -> list[slice]:
    """Return slices of about the same length, at most `size`, of a number of tokens; one of none."""
    num = max(-(-count // size), 1)
    length = max(-(-count // num), 1)
    return [slice(start, start + length) for start in range(0, max(count, 1), length)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that many values of a dtype are added up in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _empty_results(function: RowFunction, like: Tensor) -> list[Tensor]:
    return [like.new_empty([like.shape[0], *inner], dtype=dtype) for inner, dtype in function.results]


def _empty_gradients(rows: Sequence[Tensor], others: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    dtypes = [*[x.dtype for x in rows], *[wide(x.dtype) for x in others]]
    operands = zip((*rows, *others), dtypes, needs, strict=True)
    return [x.new_empty(x.shape, dtype=dtype) for x, dtype, needed in operands if needed]
