"""Parameters sharded over the ranks of FSDP: gathered before they are used, and their gradients reduced and scattered.

The operator is made of torch's functional collectives, so that Inductor sees these in forward and backward, joins small ones and
runs them beside computation (Zhao et al., PyTorch FSDP, 2023; Zhang et al., SimpleFSDP, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives

Tensor = torch.Tensor
c10d = torch.ops._c10d_functional

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "unshard_parameter(Tensor shard, int[] shape, int dim, int world_size, str group, int replicas, str replica_group, "
    "ScalarType dtype, ScalarType reduce_dtype, float divisor) -> Tensor"
)


def unshard_parameter(shard: Tensor, shape: Sequence[int], dim: int, *rest: Any) -> Tensor:
    """Return a whole parameter, of which each rank holds some rows.

    Its adjoint is the sum of the gradients of all ranks over `divisor`, of which each rank gets its rows. Those of replicas are
    added up too.

    Args:
        shard: the rows of this rank along `dim`, as many on every rank: the last ones may be padding.
        shape: of the whole parameter, without padding.
        world_size, group: the ranks that share it.
        replicas, replica_group: ranks that hold the same rows; 1 and '' where there are none.
        dtype: of the result; the shard is cast before it travels.
        reduce_dtype: that gradients travel in.
    """
    return _Unshard.apply(shard, shape, dim, *rest)  # type: ignore[no-any-return, no-untyped-call]


# Composite: autograd and Inductor see what it is made of.
_LIBRARY.impl("unshard_parameter", unshard_parameter, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, shape: Sequence[int], dim: int, *sharding: Any) -> Tensor:
        _keep_sharding(ctx, shard, dim, *sharding)
        world_size, group, _, _, dtype, *_ = sharding
        rows = shard.to(dtype)
        if world_size == 1:
            return rows.clone() if rows is shard else rows
        gathered = c10d.all_gather_into_tensor(_rows_first(rows, dim), world_size, group)
        whole = c10d.wait_tensor(gathered)
        if whole.shape[0] != shape[dim]:
            whole = whole.narrow(0, 0, shape[dim])
        return _rows_back(whole, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        world_size, group, replicas, replica_group = ctx.ranks
        rows = _rows_first(grads[0].to(ctx.reduce_dtype), ctx.dim)
        if world_size > 1:
            padding = ctx.num_rows - rows.shape[0]
            if padding:
                rows = torch.constant_pad_nd(rows, [0, 0] * (rows.dim() - 1) + [0, padding])
            rows = c10d.wait_tensor(c10d.reduce_scatter_tensor(rows, "sum", world_size, group))
        if replicas > 1:
            rows = c10d.wait_tensor(c10d.all_reduce(rows, "sum", replica_group))
        if ctx.divisor != 1:
            rows = rows / ctx.divisor
        return _rows_back(rows, ctx.dim).to(ctx.dtype), *[None] * 9


def gathered_parameter(shard: Tensor, whole: Tensor, *sharding: Any) -> Tensor:
    """Return a parameter that `unshard_parameter(shard, *sharding)` has gathered already; its gradient reaches the shard."""
    return _Gathered.apply(shard, whole, *sharding)  # type: ignore[no-any-return, no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, whole: Tensor, shape: Sequence[int], dim: int, *sharding: Any) -> Tensor:
        _keep_sharding(ctx, shard, dim, *sharding)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_shard, *others = _Unshard.backward(ctx, *grads)
        return of_shard, None, *others


def _keep_sharding(
    ctx: Any,
    shard: Tensor,
    dim: int,
    world_size: int,
    group: str,
    replicas: int,
    replica_group: str,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    divisor: float,
) -> None:
    ctx.dim, ctx.num_rows, ctx.dtype = dim, world_size * shard.shape[dim], shard.dtype
    ctx.ranks = world_size, group, replicas, replica_group
    ctx.reduce_dtype, ctx.divisor = reduce_dtype, divisor


def _rows_first(x: Tensor, dim: int) -> Tensor:
    return (x.movedim(dim, 0) if dim else x).contiguous()


def _rows_back(x: Tensor, dim: int) -> Tensor:
    return x.movedim(0, dim).contiguous() if dim else x
