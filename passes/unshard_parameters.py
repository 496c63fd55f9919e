"""Unshard parameters: one that FSDP shards enters as this rank's rows, and is gathered before it is used.

before  y = aten.linear(x, weight)                                                   # weight: [out, in]
after   whole = cp.unshard_parameter(weight, [out, in], 0, ...); y = aten.linear(x, whole)     # weight: [out / ranks, in]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate
from cpcompile.ir.insertion import keep_source
from cpcompile.ir.parameter_shard import ParameterShard

# Behind the numbers of all activation checkpoints: the partitioner keeps what one of a lower number leaves to a higher one.
REGION = 1 << 30


def unshard_parameters(gm: fx.GraphModule, *, shards: Mapping[str, ParameterShard]) -> int:
    """Return how many parameters are gathered. `shards` has those that are sharded, by the name of their placeholder.

    One that is to be sharded again after forward is tagged to be gathered again in backward, whatever else is kept.

    Needs: a graph of all ranks with whole parameters (`finish_outputs`), and a model that `fully_shard` wrapped.
    Gives: placeholders that hold the rows of one rank.

    Raises:
        NoRule: the model writes to a parameter, of which no rank has all rows.
    """
    count = 0
    for node in gm.graph.find_nodes(op="placeholder"):
        shard = shards.get(node.name)
        if shard is None or not node.users:
            continue
        for user in node.users:
            if user.target is torch.ops.aten.copy_.default and user.args[0] is node:
                raise NoRule(
                    f"the model writes to a parameter that FSDP shards, and what is gathered is given up afterwards.\n\n"
                    f"{where(user)}\n\nWrite to it behind the step of the optimizer (torch.no_grad(), out of the model), or "
                    "leave it whole on every rank: fully_shard(..., ignored_params={parameter})."
                )
        # At the first use: memory is held from there.
        first = min(node.users)
        with gm.graph.inserting_before(first):
            whole = gm.graph.call_function(torch.ops.cpcompile.unshard_parameter.default, arguments(node, shard))
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
        keep_source(whole, first)
        whole.meta["val"] = node.meta["val"]
        policy = CheckpointPolicy.MUST_SAVE if shard.stays_whole else CheckpointPolicy.MUST_RECOMPUTE
        whole.meta.update(recompute=policy, ac_graph_id=REGION)
        node.meta["val"] = node.meta["val"].new_empty(shard.local_shape)
        annotate(whole, origin=node.name)
        count += 1
    return count


def arguments(node: fx.Node, shard: ParameterShard) -> tuple[Any, ...]:
    """Return the arguments of the operator that gathers a parameter."""
    ranks = shard.world_size, shard.group, shard.replicas, shard.replica_group
    return node, list(shard.shape), shard.dim, *ranks, shard.dtype, shard.reduce_dtype, shard.divisor
