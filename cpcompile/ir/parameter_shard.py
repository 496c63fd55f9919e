"""Parameter shard: how a parameter that FSDP shards is held by the ranks, and how it becomes whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """The rows of a parameter that each rank holds.

    Attributes:
        shape: of the whole parameter.
        dim: along which its rows are dealt, as many to every rank; those of the last ranks may be padding.
        world_size, group: the ranks that share it, and the process group in which it is gathered.
        replicas, replica_group: the ranks that hold the same rows; 1 and '' where there are none.
        dtype: that the model computes with.
        stored_dtype: of the rows, and of their gradient.
        reduce_dtype: that gradients are added up in.
        divisor: of the sum of the gradients of all ranks and replicas.
        stays_whole: the whole parameter is kept from forward to backward, in place of gathering it again.
        sums_axis: the ranks and replicas contain the context-parallel axis, whose gradients their sum adds up.
        unit: the path of the module that `fully_shard` wrapped, whose parameters travel together; '' where each travels alone.
    """

    shape: tuple[int, ...]
    dim: int
    world_size: int
    group: str
    replicas: int
    replica_group: str
    dtype: torch.dtype
    stored_dtype: torch.dtype
    reduce_dtype: torch.dtype
    divisor: float
    stays_whole: bool
    sums_axis: bool
    unit: str = ""

    @property
    def num_rows(self) -> int:
        """The rows of each rank, padding included."""
        return -(-self.shape[self.dim] // self.world_size)

    @property
    def num_bytes(self) -> int:
        """The bytes of the whole parameter, as the model computes with it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what a rank holds, padding included."""
        return (*self.shape[: self.dim], self.num_rows, *self.shape[self.dim + 1 :])
