"""Rewrite dropout: what is dropped no longer depends on the rank that holds it, nor on how the ranks are seeded.

before  y = aten.dropout(x, 0.1, True)                                       # x, y: Sharded(1)
after   seed = cp.shared_seed(device)                                        # once in a graph
        y = cp.dropout_tokens(x, seed, site, 0.1, 1)                         # x, y: Sharded(1)
        o = cp.attention(q, k, v, ..., dropout=0.1, seed=seed, site=site)    # an attention stays what it is

        # with exact_dropout=True
        kept = cp.draw_kept(x, kept of the previous site, ..., 0.1, 1)       # draws for the whole tensor, keeps its tokens
        y = aten.mul(x, aten.div(aten.type_as(kept, x), 0.9))

Other random numbers for tokens, `aten.rand_like(x)`, become `cp.noise_tokens` and `cp.draw_noise` in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_copy, replace_uses
from cpcompile.ir.operator_call import Call, size_hint
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.ir.resharding import times

aten, cp = torch.ops.aten, torch.ops.cpcompile

# What each operator draws, and the names of its two numbers, see `runtime.tokens.noise`.
NOISE: dict[Any, tuple[str, tuple[str, str]]] = {
    aten.bernoulli.p: ("bernoulli", ("p", "")),
    aten.normal_functional.default: ("normal", ("mean", "std")),
    aten.rand_like.default: ("uniform", ("", "")),
    aten.randn_like.default: ("normal", ("", "")),
    aten.uniform.default: ("uniform", ("from", "to")),
}
# Each element, each feature or each weight is dropped by itself; one that is dropped in place stays a random operator like
# others.
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, cp.attention.default)


def rewrite_dropout(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many dropouts were rewritten.

    Needs: the placement of every value (`place_tokens`).
    Gives: dropout that does not depend on the rank; seeds and sites as arguments of attentions.

    Raises:
        NoRule: another operator draws random numbers for local tokens.
    """
    drawing = drawing_nodes(gm)
    sites = [node for node in drawing if node.target in DROPOUTS or is_noise(node, plan)]
    for node in drawing:
        if node not in sites:
            refuse_drawing(node, plan)
    if not sites:
        return 0
    Rewriter(gm, plan).rewrite(sites)
    return len(sites)


def is_noise(node: fx.Node, plan: Plan) -> bool:
    """Tell whether a node draws numbers by place, or as one device draws them: those for whole values need neither."""
    return node.target in NOISE and (plan.exact_dropout or isinstance(placement_of(node), Sharded))


def noise_of(call: Call) -> tuple[str, float, float]:
    """Return the kind of noise that a call draws, and its numbers, see `runtime.tokens.noise`."""
    kind, names = NOISE[call.target]
    a, b = (float(call[name]) if name else default for name, default in zip(names, (0.0, 1.0), strict=True))
    return kind, a, b


def drawing_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that draw from the default generator of the rank; those that this pass makes are left out."""
    return [
        node
        for node in gm.graph.nodes
        if draws(node) and node.target not in (cp.shared_seed.default, cp.draw_kept.default, cp.draw_noise.default)
    ]


def drawing_devices(gm: fx.GraphModule) -> set[str]:
    """Return the kinds of devices whose generators must agree between the ranks for this graph to be right."""
    nodes = [node for node in gm.graph.nodes if draws(node) and node.target is not cp.shared_seed.default]
    values = [value for node in nodes for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))]
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


def draws(node: fx.Node) -> bool:
    """Tell whether a node draws random numbers: dropout that is not training, or of rate 0 or 1, draws none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    call = Call.of(node)
    if node.target is cp.attention.default:
        return bool(call["dropout"]) and call["seed"] is None
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if "training" in call:
        return bool(call["training"])
    return "train" not in call or (call["train"] is not False and 0 < call["p"] < 1)


def refuse_drawing(node: fx.Node, plan: Plan) -> None:
    """Refuse random numbers for local tokens, and those that no compiler repeats as one device draws them."""
    placements = annotation(node).placement
    if all(isinstance(p, Full) for p in (placements if isinstance(placements, tuple) else (placements,))):
        if not plan.exact_dropout:
            return  # the ranks' generators are compared when the program runs
        reason = "is no dropout: with exact_dropout, nothing else may draw random numbers"
        remedy = "Draw them outside the model and pass them as an input, or leave exact_dropout off."
    else:
        reason = "draws random numbers for this rank's tokens, which would depend on the rank"
        remedy = (
            "Draw them outside the model for all tokens and pass them as an input, or use torch.nn.functional.dropout."
        )
    raise NoRule(f"{node.target}: {reason}.\n\n{where(node)}\n\n{remedy}")


class Rewriter:
    """Rewrites the dropouts of one graph in their order."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm, self.plan = gm, plan
        self.seeds: dict[torch.device, fx.Node] = {}
        self.previous: fx.Node | None = None

    def rewrite(self, sites: list[fx.Node]) -> None:
        """Replace each site by its operator."""
        for number, node in enumerate(sites):
            if node.target is cp.attention.default:
                seeded = {"seed": self._seed(node.meta["val"]), "site": number}
                node.args, node.kwargs = Call.of(node).rebound(seeded)
                continue
            with self.gm.graph.inserting_before(node):
                if node.target in NOISE:
                    result = self._noise(node, number)
                else:
                    result = self._exact(node) if self.plan.exact_dropout else self._seeded(node, number)
            replace_uses(node, result)
            self.gm.graph.erase_node(node)

    def _seeded(self, node: fx.Node, number: int) -> fx.Node:
        call, (dim, inner, _, _, *axis) = Call.of(node), self._axis(node)
        x = call["input"]
        settings = (self._seed(node.meta["val"]), number, call["p"], dim, inner, *axis)
        if node.target is aten.dropout.default:
            return self._emit(node, cp.dropout_tokens.default, x, *settings)
        for d in range(2, node.meta["val"].dim()):
            x = self._emit(node, aten.slice.Tensor, x, d, 0, 1)
        noise = self._emit(node, cp.dropout_tokens.default, self._emit(node, aten.ones_like.default, x), *settings)
        return self._emit(node, aten.mul.Tensor, call["input"], noise)

    def _seed(self, like: torch.Tensor) -> fx.Node:
        """Return the shared seed on the device of `like`; drawn first, outside of what a checkpoint recomputes."""
        if like.device not in self.seeds:
            last = self.gm.graph.find_nodes(op="placeholder")[-1]
            with self.gm.graph.inserting_after(last):
                seed = self.gm.graph.call_function(
                    cp.shared_seed.default, (like.device, self.plan.world_size, self.plan.group)
                )
            seed.meta |= {"val": like.new_empty((), dtype=torch.int64), "recompute": CheckpointPolicy.MUST_SAVE}
            self.seeds[like.device] = seed
        return self.seeds[like.device]

    def _exact(self, node: fx.Node) -> fx.Node:
        """Compute as torch does: one rounded factor for all, but for the fused kernel of GPUs."""
        call, value, of_features = Call.of(node), node.meta["val"], node.target is not aten.dropout.default
        x, p = call["input"], call["p"]
        settings = (self.previous, of_features, p, memory_order(value), *self._axis(node))
        kept = self._emit(node, cp.draw_kept.default, x, *settings)
        kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        kept.meta.pop("ac_graph_id", None)
        kept.meta["val"] = value.new_empty(value.shape, dtype=torch.bool)
        self.previous = kept
        if value.device.type == "cpu" or of_features:
            noise = self._emit(node, aten.div.Tensor, self._emit(node, aten.type_as.default, kept, x), 1 - p)
            return self._emit(node, aten.mul.Tensor, x, noise)
        return self._emit(node, aten.mul.Tensor, self._emit(node, aten.mul.Tensor, x, 1 / (1 - p)), kept)

    def _noise(self, node: fx.Node, number: int) -> fx.Node:
        """Draw numbers for tokens that are not what to drop."""
        call, value = Call.of(node), node.meta["val"]
        x = self._emit(node, aten.detach.default, call["self"])
        if value.dtype != call.tensor("self").dtype:
            x = self._emit(node, aten.to.dtype, x, value.dtype)
        dim, inner, front, back, *axis = self._axis(node)
        kind = noise_of(call)
        if not self.plan.exact_dropout:
            return self._emit(node, cp.noise_tokens.default, x, self._seed(value), number, *kind, dim, inner, *axis)
        places = (memory_order(value), dim, inner, front, back, *axis)
        noise = self._emit(node, cp.draw_noise.default, x, self.previous, *kind, *places)
        noise.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        noise.meta.pop("ac_graph_id", None)
        self.previous = noise
        return noise

    def _axis(self, node: fx.Node) -> tuple[Any, ...]:
        """Return dim, inner, front, back, length, layout, world size, group and perhaps bounds; dim -1 for a whole value."""
        at = placement_of(node)
        if not isinstance(at, Sharded):
            return -1, 1, 0, 0, 1, self.plan.layout, self.plan.world_size, self.plan.group
        lengths = Lengths.of(self.gm, at.sequence)
        if lengths.parts:  # by the slots of all ranks, laid end to end: joined tokens have no common order
            assert not self.plan.exact_dropout, "what one device draws is drawn for one sequence"
            slots = times(self.gm.graph, lengths.local, self.plan.world_size)
            return at.dim, at.inner, 0, 0, slots, "contiguous", self.plan.world_size, self.plan.group
        return at.dim, at.inner, at.front, at.back, lengths.total, *lengths.axis(self.plan)

    def _emit(self, node: fx.Node, target: Any, *arguments: Any) -> fx.Node:
        """Insert a call that holds a part of what `node` computes."""
        part = insert_copy(self.gm.graph, target, arguments, node, placement_of(node))
        annotate(part, origin="")
        return part


def memory_order(x: torch.Tensor) -> list[int]:
    """Return the dims of a tensor like `x`, largest stride first."""
    strides = [size_hint(stride) for stride in torch.empty_like(x).stride()]
    return sorted(range(x.dim()), key=lambda d: -strides[d])
