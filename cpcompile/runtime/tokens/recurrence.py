"""A linear recurrence: states of which each is a factor times the one before, plus what is given at its place.

    y[0] = x[0],  y[t] = factor[t] * y[t - 1] + x[t]

Its adjoint is one too, from the end to the front: G[t] = g[t] + factor[t + 1]^T G[t + 1].
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
_HALVES = (torch.float16, torch.bfloat16)


@torch.library.custom_op("cpcompile::recurrence", mutates_args=())
def recurrence(factor: Tensor, x: Tensor, dim: int, by_matrix: bool) -> Tensor:
    """Return all states, in the shape of `x`; half precision is rounded once for each state, and carried in float32.

    Args:
        factor: of as many dims as `x`, and as long along `dim`; other dims broadcast. The first one counts for nothing.
        x: `[..., t, ...]`, or `[..., t, ..., k, v]` for matrices.
        by_matrix: factors are matrices `[..., k, k]`, multiplied from the left; otherwise elements are multiplied.
    """
    dtype = torch.float32 if x.dtype in _HALVES else x.dtype
    if not x.shape[dim]:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    factors, given = (tensor.to(dtype).unbind(dim) for tensor in (factor, x))
    states = [given[0]]
    for step, added in zip(factors[1:], given[1:], strict=True):
        states.append(torch.add(step @ states[-1] if by_matrix else step * states[-1], added))
    return torch.stack(states, dim).to(x.dtype)


@recurrence.register_fake
def _(factor: Tensor, x: Tensor, dim: int, by_matrix: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factor, _, ctx.dim, ctx.by_matrix = inputs
    ctx.save_for_backward(factor, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
    factor, states = ctx.saved_tensors
    dim, by_matrix = ctx.dim, ctx.by_matrix
    # At t, the factor of t + 1; the last one counts for nothing.
    following = (factor.mT if by_matrix else factor).roll(-1, dim)
    of_states = recurrence(following.flip(dim), grad.flip(dim), dim, by_matrix).flip(dim)
    before = torch.cat([torch.zeros_like(states.narrow(dim, 0, 1)), states.narrow(dim, 0, states.shape[dim] - 1)], dim)
    of_factors = of_states @ before.mT if by_matrix else of_states * before
    return of_factors.sum_to_size(factor.shape), of_states, None, None


recurrence.register_autograd(_backward, setup_context=_keep)
