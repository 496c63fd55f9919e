"""Own backward: what a `torch.autograd.Function` of the model computes back, in place of what torch would derive.

The graph of a model holds its forward as plain operators on detached operands, and its backward as a graph by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("incoming_gradient(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "own_gradient(Tensor[] results, Tensor[] operands, Tensor[] incoming, Tensor[] gradients) -> Tensor[]"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "own_backward(Tensor[] results, Tensor[] operands, Tensor[] saved, SymInt[] sizes, str body) -> Tensor[]"
)

_BODIES: dict[str, fx.GraphModule] = {}


def add_body(body: fx.GraphModule) -> str:
    """Make a backward known to the operators, and return its key, alike on all ranks and in every process."""
    key = hashlib.sha256(body.code.encode()).hexdigest()[:16]
    _BODIES.setdefault(key, body)
    return key


def backward_body_of(key: str) -> fx.GraphModule:
    """Return the backward that a key stands for: of incoming gradients, saved tensors and sizes, to gradients."""
    return _BODIES[key]


def incoming_gradient(x: Tensor) -> Tensor:
    """Return what stands for the gradient of `x` while passes place the backward that reads it."""
    return torch.zeros_like(x.detach())


def own_gradient(
    results: Sequence[Tensor], operands: Sequence[Tensor], incoming: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return results whose operands have the `gradients`, which the graph computes from the `incoming` ones.

    It stands in graphs while passes run, before `own_backward` takes its place.
    """
    return list(_OwnGradient.apply(len(results), *results, *operands))  # type: ignore[no-untyped-call]


def own_backward(
    results: Sequence[Tensor], operands: Sequence[Tensor], saved: Sequence[Tensor], sizes: Sequence[int], body: str
) -> list[Tensor]:
    """Return `results`, whose gradients become those of the operands by a backward of the model's own.

    Args:
        results: what forward computed, without gradients.
        operands: what the gradients are for.
        saved: the tensors that backward reads.
        sizes: the sizes that it reads.
        body: the key of the backward.
    """
    counts = len(results), len(operands)
    return list(_OwnBackward.apply(body, sizes, counts, *results, *operands, *saved))  # type: ignore[no-untyped-call]


# Composite: autograd and the compiler see what these call.
_LIBRARY.impl("incoming_gradient", incoming_gradient, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("own_gradient", own_gradient, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("own_backward", own_backward, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("a graph that passes still work on is differentiated")


class _OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: str, sizes: Sequence[int], counts: tuple[int, int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.body, ctx.sizes, ctx.counts = body, sizes, counts
        ctx.save_for_backward(*tensors[sum(counts) :])
        return tuple(x.detach() for x in tensors[: counts[0]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved, (num_results, _) = ctx.saved_tensors, ctx.counts
        found = backward_body_of(ctx.body)(*grads, *saved, *ctx.sizes)
        return None, None, None, *[None] * num_results, *found, *[None] * len(saved)
