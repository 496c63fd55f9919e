"""Loss body: what is computed of the logits of some tokens, as a graph that every rank knows by the same key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile import _torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """A result of a body.

    Attributes:
        inner: its shape behind the dim of the tokens; None for a sum over them.
        dtype: of the result.
        has_gradient: whether it can be differentiated.
    """

    inner: tuple[int, ...] | None
    dtype: torch.dtype
    has_gradient: bool


@dataclass(slots=True)
class Body:
    """What is computed of the logits of some tokens.

    Attributes:
        function: from logits `[T, classes]`, tensors of `[T, ...]` and others to the results.
        results: what it returns.
        provider: what computes it of all tokens at once, where that is not ours (`loss_providers`): its function takes hidden
            states `[T, features]`, weight and bias in the place of logits.
    """

    function: fx.GraphModule
    results: tuple[Result, ...]
    provider: str = ""
    _compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict)  # by the kinds of operands

    @property
    def key(self) -> str:
        """What the body is known by, alike on all ranks and in every process."""
        text = (
            f"{self.function.code}\n{self.provider}\n{[(r.inner, str(r.dtype), r.has_gradient) for r in self.results]}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_one_sum(self) -> bool:
        """Whether all that has a gradient is one sum over the tokens."""
        sums = [r.inner is None for r in self.results if r.has_gradient]
        return sums == [True]

    def compile(
        self, logits: Tensor, rows: Sequence[Tensor], others: Sequence[Tensor], options: Mapping[str, Any]
    ) -> None:
        """Have Inductor compile `step` for any number of tokens, given operands of a chunk."""
        kinds = kinds_of(logits, rows, others)
        if kinds not in self._compiled:
            smooth = [r for r in self.results if r.has_gradient]
            shapes = [() if r.inner is None else (logits.shape[0], *r.inner) for r in smooth]
            grads = [logits.new_zeros(shape, dtype=r.dtype) for shape, r in zip(shapes, smooth, strict=True)]
            by_row = [True, *[r.inner is not None for r in smooth], *[True] * len(rows), *[False] * len(others)]
            sizes = len(grads), len(rows)
            self._compiled[kinds] = _torch.compile_by_rows(
                lambda z, *rest: self.eager_step(z, *split(rest, *sizes)),
                [logits, *grads, *rows, *others],
                by_row,
                options,
            )

    def step(
        self, compiled: bool, logits: Tensor, grads: Sequence[Tensor], rows: Sequence[Tensor], others: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the results for a chunk, and write the gradient of its logits in their place."""
        if not compiled:
            return self.eager_step(logits, grads, rows, others)
        return list(self._compiled[kinds_of(logits, rows, others)](logits, *grads, *rows, *others))

    def eager_step(
        self, logits: Tensor, grads: Sequence[Tensor], rows: Sequence[Tensor], others: Sequence[Tensor]
    ) -> list[Tensor]:
        """Do what `step` does, not compiled."""
        results, (grad,) = self.differentiated([logits], [True], grads, rows, others)
        assert grad is not None
        logits.copy_(grad)
        return results

    def differentiated(
        self,
        inputs: Sequence[Tensor | None],
        needs: Sequence[bool],
        grads: Sequence[Tensor],
        rows: Sequence[Tensor],
        others: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the results, and the gradients of the first inputs that `needs` says."""
        with _torch.recording_gradients():
            leaves = [
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip(inputs, needs, strict=True)
            ]
            results = self.function(*leaves, *rows, *others)
            smooth = [r for r, of in zip(results, self.results, strict=True) if of.has_gradient]
            # Of a value that is only made alike (zeros_like) no gradient reaches the logits.
            reached = [(r, g) for r, g in zip(smooth, grads, strict=True) if r.requires_grad]
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            of_reached = [r for r, _ in reached], wanted, [g for _, g in reached]
            found = iter(torch.autograd.grad(*of_reached) if reached else map(torch.zeros_like, wanted))
        of_leaves = [next(found) if x is not None and x.requires_grad else None for x in leaves]
        return [r.detach() for r in results], of_leaves


def kinds_of(logits: Tensor, rows: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
    """Return what a compiled step depends on beside the number of tokens."""
    by_row = [(x.dtype, tuple(x.shape[1:]), x.device.type) for x in (logits, *rows)]
    return (*by_row, *[(x.dtype, tuple(x.shape), x.device.type) for x in others])


def split(values: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Return parts of these sizes, and the rest."""
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return [*parts, values]


_BODIES: dict[str, Body] = {}


def add_body(body: Body) -> str:
    """Make a body known to the operators, and return its key."""
    return _BODIES.setdefault(body.key, body).key


def body_of(key: str) -> Body:
    """Return the body that a key stands for."""
    return _BODIES[key]
