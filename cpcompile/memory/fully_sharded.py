"""Fully sharded: parameters as `fully_shard` would shard them, for a plan that is made before any process runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile.capture.lowering import placeholders
from cpcompile.compile.transform import Transformed
from cpcompile.errors import ConfigError
from cpcompile.ir.parameter_shard import ParameterShard


@dataclass(frozen=True, slots=True)
class FullySharded:
    """How FSDP2 shards a model: each block and the root over so many ranks, those of context parallelism among them.

    Attributes:
        ranks: that share each parameter.
        stored_dtype: of parameters, gradients and optimizer state; None for that of the model's parameters.
        reduce_dtype: that gradients travel in; None for that which the model computes with. The model's own is what it
            computes with.
    """

    ranks: int
    stored_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"FullySharded(ranks={self.ranks}): there is at least one rank.")

    def shards_of(self, inputs: Sequence[Any]) -> dict[int, ParameterShard]:
        """Return the shard of each input of a graph that is a parameter."""
        return {i: self.shard_of(x) for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter) and x.dim()}

    def shard_of(self, parameter: torch.Tensor) -> ParameterShard:
        """Return how a parameter is sharded."""
        return ParameterShard(
            shape=tuple(parameter.shape),
            dim=0,
            world_size=self.ranks,
            group="",
            replicas=1,
            replica_group="",
            dtype=parameter.dtype,
            stored_dtype=self.stored_dtype or parameter.dtype,
            reduce_dtype=self.reduce_dtype or parameter.dtype,
            divisor=1.0,
            stays_whole=False,
            sums_axis=True,
        )


def in_blocks(transformed: Transformed, shards: Mapping[int, ParameterShard]) -> dict[int, ParameterShard]:
    """Return the shards with the block of a list that each is of: its parameters travel together."""
    nodes = placeholders(transformed.graph)
    blocks = {i: re.match(r".*?_modules_\d+_", nodes[i].name) for i in shards}
    return {i: replace(shard, unit=block.group() if (block := blocks[i]) else "") for i, shard in shards.items()}


def largest_block(shards: Mapping[int, ParameterShard]) -> int:
    """Return the bytes of the largest block that is gathered at once, 0 where nothing is sharded."""
    sizes = Counter[str]()
    for shard in shards.values():
        if shard.unit and shard.world_size > 1:
            sizes[shard.unit] += shard.num_bytes
    return max(sizes.values(), default=0)
