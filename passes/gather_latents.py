"""Gather latents: what keys and values are computed from is made whole on every rank, in place of keys and values.

before  k, v = aten.split(aten.linear(c, up)...)                         # strategy: latent
        o = cp.attention(q, k, v, ...)
after   w = cp.whole_tokens(c)                                           # gathered, once it is placed
        k, v = aten.split(aten.linear(w, up)...)                         # of all tokens, again in backward
        o = cp.attention(q, k, v, ...)

        # with strategy latent_heads
        part = cp.shard_tokens(up, 0, width of a head, heads, ...)       # the rows of this rank's heads
        k, v = aten.split(aten.linear(w, part)...)                       # of all tokens, and this rank's heads
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.analysis.patterns.latent import Latent, find_latent
from cpcompile.analysis.patterns.latent_heads import HeadPlan, plan_heads
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.errors import module_path
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.insertion import fake_result, keep_source
from cpcompile.ir.operator_call import Call, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Plan
from cpcompile.rules import Local

aten, cp = torch.ops.aten, torch.ops.cpcompile


def gather_latents(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many attentions get their keys and values from a latent that travels.

    Needs: the annotation `strategy` (`choose_strategies`).
    Gives: `cp.whole_tokens` where a value is needed of all tokens, for strategies that gather a latent.
    """
    count = 0
    for number, node in enumerate(attention_nodes(gm)):
        if annotation(node).strategy not in ("latent", "latent_heads"):
            continue
        latent = find_latent(node, plan.token_dims)
        if latent is None or all(value.target is cp.whole_tokens.default for value in latent.cut):
            continue
        heads = plan_heads(node, latent) if annotation(node).strategy == "latent_heads" else None
        Expander(node, latent, number, plan).expand(heads)
        count += 1
    return count


class Expander:
    """Lets one attention take keys and values that are computed from whole values; other users keep the sharded ones.

    Whole keys and values would fill the memory if all layers kept them for backward: they are computed there again.
    """

    def __init__(self, attention: fx.Node, latent: Latent, number: int, plan: Plan) -> None:
        self.attention, self.latent, self.number, self.plan = attention, latent, number, plan
        self.new = {value: self._whole(value) for value in latent.cut}

    def expand(self, heads: HeadPlan | None) -> None:
        """Compute all heads, or those of each rank."""
        for value, at in heads.parts.items() if heads else ():
            assert heads is not None
            self.new[value] = self._part(value, at, heads.num_heads)
        for old in self.latent.expansion:
            self.new[old] = self._copy(old) if heads is None else self._copy_of_heads(old, heads)
        call = Call.of(self.attention)
        keys = {name: self.new.get(call[name], call[name]) for name in ("k", "v")}
        self.attention.args, self.attention.kwargs = call.rebound(keys)
        for old in reversed(self.latent.expansion):
            if not old.users:
                old.graph.erase_node(old)

    def _whole(self, value: fx.Node) -> fx.Node:
        """Return `value`, to be made whole."""
        node = self._emit(value, cp.whole_tokens.default, (value,))
        node.meta["val"] = value_of(value)
        reason = f"keys and values of {module_path(self.attention) or 'an attention'} are computed from it"
        annotate(node, site=self.attention.name, reason=reason)
        return node

    def _part(self, value: fx.Node, at: Sharded, num_heads: int) -> fx.Node:
        """Return this rank's heads of a value that every rank has."""
        arguments = (value, at.dim, at.inner, num_heads, "contiguous", self.plan.world_size, self.plan.group)
        node = self._emit(value, cp.shard_tokens.default, arguments)
        node.meta["val"] = fake_result(cp.shard_tokens.default, (value_of(value), *arguments[1:]), {})
        annotate(node, is_local=True)
        self._recompute(node)
        return node

    def _emit(self, value: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
        last = value if value.op == "call_function" else value.graph.find_nodes(op="placeholder")[-1]
        with value.graph.inserting_after(last):
            node = value.graph.call_function(target, arguments)
        keep_source(node, value)
        return node

    def _copy(self, old: fx.Node) -> fx.Node:
        with old.graph.inserting_after(old):
            copy = old.graph.node_copy(old, lambda operand: self.new.get(operand, operand))
        copy.meta = dict(old.meta)
        annotate(copy, origin=annotation(old).origin or old.name, stays_whole=True)
        self._recompute(copy)
        return copy

    def _copy_of_heads(self, old: fx.Node, heads: HeadPlan) -> fx.Node:
        """Copy an operator so that it computes this rank's heads; its value has another shape then."""
        copy, decision = self._copy(old), heads.decisions.get(old)
        if decision is not None:
            changes = {name: self._local(value, heads.num_heads) for name, value in decision.arguments.items()}
            copy.args, copy.kwargs = Call.of(copy).rebound(changes)
            if copy.target is aten.view.default:  # of strides that may be others
                copy.target = aten.reshape.default
                copy.args, copy.kwargs = (copy.args[0], copy.args[1]), {}
        values = fx.map_arg((copy.args, copy.kwargs), value_of)
        copy.meta["val"] = fake_result(copy.target, *values)  # type: ignore[arg-type]
        annotate(copy, origin="", is_local=True)
        return copy

    def _local(self, value: Any, num_heads: int) -> Any:
        """Return a size of all heads as one of this rank's."""
        if isinstance(value, Local):
            assert isinstance(value.size, int), "heads are numbers"
            return value.size // num_heads * (num_heads // self.plan.world_size)
        return [self._local(item, num_heads) for item in value] if isinstance(value, list) else value

    def _recompute(self, node: fx.Node) -> None:
        if "recompute" not in node.meta:
            node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": self.number}
