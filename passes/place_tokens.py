"""Place tokens: give every value its placement, and shard what meets the sharded stream.

before  h = aten.embedding(wte, input_ids); x = aten.mul(h, cos)
after   ids = cp.shard_tokens(input_ids, 1); h = aten.embedding(wte, ids)          # h: Sharded(1)
        cos_l = aten.cos(cp.shard_tokens(position, 0)); x = aten.mul(h, cos_l)     # x: Sharded(1)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from cpcompile.annotation import annotate, annotation, placement_of
from cpcompile.call import Call, is_tensor
from cpcompile.emit import emit_copy
from cpcompile.errors import InputError, NoRule, where
from cpcompile.placement import FULL, Full, Partial, Placement, Sharded
from cpcompile.plan import Lengths, Plan
from cpcompile.rules import REASONS, RULES, Decision, Local, no_rule

aten, cp = torch.ops.aten, torch.ops.cpcompile

# The first operators that are worth sharding: whole index arithmetic before them is cheap.
HEAVY = {
    aten.embedding.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
}

# A partial sum may stay one under a linear operator; it is reduced before any other.
LINEAR = {
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
}
LINEAR_IN_FIRST = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
}  # the others must be Full or numbers

# A reshape works on local tokens whatever the strides; a view of an operand that a collective made may not.
COPYING = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def place_tokens(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Place every node and return how many `shard_tokens` were inserted."""
    tokens = {node.name: node for node in gm.graph.nodes if node.op == "placeholder" and node.name in plan.token_dims}
    if not tokens:
        raise InputError("no input with tokens: name it and the dim of its tokens, e.g. token_dims={'input_ids': 1}.")
    sizes = {name: node.meta["val"].shape[plan.token_dims[name]] for name, node in tokens.items()}
    if len({str(size) for size in sizes.values()}) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InputError(f"the token inputs have different lengths: {listed}.")
    first, node = next(iter(tokens.items()))
    placer = Placer(gm, plan, Lengths.insert(gm, plan, node, plan.token_dims[first]))
    for node in list(gm.graph.nodes):
        placer.place(node)
    return placer.num_shards


class Placer:
    """Walks the graph once in order; every node before the current one has its placement."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, lengths: Lengths) -> None:
        self.gm, self.plan, self.lengths = gm, plan, lengths
        self.localised: dict[tuple[fx.Node, Sharded], fx.Node] = {}
        self.reduced: dict[fx.Node, fx.Node] = {}
        self.written = written_values(gm)
        self.num_shards = 0

    def place(self, node: fx.Node) -> None:
        """Give `node` its placement; localise what it needs."""
        if node.op == "placeholder" and node.name in self.plan.token_dims:
            annotate(node, placement=Full(Sharded(self.plan.token_dims[node.name])))
        elif node.op == "call_function":
            if node.target is operator.getitem:
                self._place_item(node)
            elif isinstance(node.target, torch._ops.OpOverload):
                self._place_call(node)
            else:
                self._require_whole(node)

    def _place_item(self, node: fx.Node) -> None:
        source = annotation(node.args[0]).placement  # type: ignore[arg-type]
        annotate(node, placement=source[node.args[1]] if isinstance(source, tuple) else source)  # type: ignore[index]

    def _require_whole(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            placement = annotation(operand).placement
            if is_tensor(operand) and not isinstance(placement, Full):
                raise NoRule(f"{node.format_node()}: no rule for {node.target} on an operand that is {placement}.")

    def _place_call(self, node: fx.Node) -> None:
        call = Call.of(node)
        if node.target is aten.sym_size.int:
            self._place_size(node, call)
            return
        operands = {name: placement_of(operand) for name, operand in call.operands()}
        if any(isinstance(p, Partial) for p in operands.values()):
            if stays_partial(call, operands):
                annotate(node, placement=Partial())
                return
            self._reduce_operands(node, call, operands)
            call = Call.of(node)
            operands = {name: placement_of(operand) for name, operand in call.operands()}
        sharded = {name: p for name, p in operands.items() if isinstance(p, Sharded)}
        if sharded:
            self._localise_call(node, call, self._push(call, sharded))
            return
        hints = {name: p.tokens for name, p in operands.items() if isinstance(p, Full) and p.tokens is not None}
        self._place_whole(node, call, hints)

    def _place_whole(self, node: fx.Node, call: Call, hints: Mapping[str, Sharded]) -> None:
        """Place a call of whole operands: a heavy one that meets tokens starts the sharded stream."""
        annotate(node, placement=whole_results(call))
        if not hints or node.target not in RULES:
            return
        try:
            decision = self._push(call, hints)
        except NoRule:
            return
        if node.target in HEAVY and any(isinstance(p, Sharded) for p in decision.results):
            self._localise_call(node, call, decision)
        elif (
            len(decision.results) == 1 and isinstance(decision.results[0], Sharded) and covers_all(decision.results[0])
        ):
            annotate(node, placement=Full(decision.results[0]))

    def _place_size(self, node: fx.Node, call: Call) -> None:
        """Keep sizes those of the whole: what needs a local size asks for it."""
        placement = placement_of(node.args[0])  # type: ignore[arg-type]
        if not isinstance(placement, Sharded) or call.dim("dim", "self") != placement.dim:
            return
        if placement.inner != 1 or str(node.meta["val"]) != str(self.lengths.value):
            raise no_rule(call, {"self": placement}, "the size of merged dims is read")
        if isinstance(self.lengths.total, fx.Node):
            node.replace_all_uses_with(self.lengths.total)

    def _push(self, call: Call, sharded: Mapping[str, Sharded]) -> Decision:
        if call.target not in RULES:
            reason = REASONS.get(call.target)
            missing = "there is no rule for this operator, so its operands cannot stay sharded"
            raise no_rule(call, sharded, reason(call) if reason else missing)
        return RULES[call.target].push(call, sharded, self.lengths.value)

    def _localise_call(self, node: fx.Node, call: Call, decision: Decision) -> None:
        """Make `node` run on local tokens as decided."""
        changes: dict[str, Any] = dict(decision.arguments)
        for name, operand in call.operands():
            wanted = decision.operands.get(name)
            if wanted is not None:
                changes[name] = self._as_wanted(call, name, operand, wanted)
            if name in decision.padding and isinstance(wanted, Sharded):
                changes[name] = self._fill_padding(changes[name], wanted, decision.padding[name], node)
        self._apply(node, call, changes)
        annotate(node, placement=decision.results if is_tuple(call) else decision.results[0])

    def _as_wanted(self, call: Call, name: str, operand: fx.Node, wanted: Placement) -> fx.Node:
        have = placement_of(operand)
        match have, wanted:
            case Full(), Full():
                return operand
            case Full(), Sharded() if not (call.target._schema.is_mutable and name == "self"):
                return self.localise(operand, wanted, before=call.node)
            case _ if have == wanted:
                return operand
        operands = {n: placement_of(o) for n, o in call.operands()}
        raise no_rule(call, operands, f"{name} is {have} but must be {wanted}", RULES[call.target].notation)

    def _apply(self, node: fx.Node, call: Call, changes: Mapping[str, Any]) -> None:
        changes = {name: self._localise_sizes(value, node) for name, value in changes.items()}
        target = COPYING.get(call.target)
        if target is not None and "size" in changes:
            node.target, node.args, node.kwargs = target, (changes["self"], changes["size"]), {}
        else:
            node.args, node.kwargs = call.rebound(changes)

    def _localise_sizes(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, Local):
            return self.lengths.localise(self.gm, value.size, value.at, node)
        return [self._localise_sizes(item, node) for item in value] if isinstance(value, list) else value

    def _fill_padding(self, operand: fx.Node, at: Sharded, value: float, before: fx.Node) -> fx.Node:
        if not self.plan.has_padding(self.lengths.value) and not (at.front or at.back):
            return operand
        with self.gm.graph.inserting_before(before):
            range_and_length = (at.front, at.back, self.lengths.total)
            arguments = (operand, at.dim, at.inner, value, *range_and_length, *self.plan.axis_arguments)
            return emit_copy(self.gm.graph, cp.fill_padding.default, arguments, operand, at)

    def _reduce_operands(self, node: fx.Node, call: Call, operands: Mapping[str, Placement]) -> None:
        """Add up the partial operands of a call that is not linear in them."""
        changes = {}
        for name, operand in call.operands():
            if isinstance(operands[name], Partial):
                changes[name] = self.reduce(operand)
        node.args, node.kwargs = call.rebound(changes)

    def reduce(self, node: fx.Node) -> fx.Node:
        """Return the sum over the ranks of the partial `node`."""
        if node not in self.reduced:
            with self.gm.graph.inserting_after(node):
                arguments = (node, self.plan.world_size, self.plan.group)
                self.reduced[node] = emit_copy(self.gm.graph, cp.all_reduce.default, arguments, node, FULL)
        return self.reduced[node]

    def localise(self, node: fx.Node, wanted: Sharded, *, before: fx.Node) -> fx.Node:
        """Return this rank's tokens of the whole value `node`: recomputed from local operands as far up as rules allow."""
        key = (node, wanted)
        if key not in self.localised:
            decision = None if node in self.written else self._pull(node, wanted)
            if decision is None:
                self.localised[key] = self._shard(node, wanted, before)
            else:
                self.localised[key] = self._copy_locally(node, decision)
        return self.localised[key]

    def _pull(self, node: fx.Node, wanted: Sharded) -> Decision | None:
        if node.op != "call_function" or node.target not in RULES:
            return None
        call = Call.of(node)
        is_random = torch.Tag.nondeterministic_seeded in call.target.tags
        if is_tuple(call) or is_random or call.target._schema.is_mutable:
            return None
        if not all(isinstance(placement_of(operand), Full) for _, operand in call.operands()):
            return None
        return RULES[call.target].pull(call, wanted, self.lengths.value)

    def _copy_locally(self, node: fx.Node, decision: Decision) -> fx.Node:
        call = Call.of(node)
        changes: dict[str, Any] = dict(decision.arguments)
        for name, operand in call.operands():
            wanted = decision.operands.get(name)
            if isinstance(wanted, Sharded):
                changes[name] = self.localise(operand, wanted, before=node)
        with self.gm.graph.inserting_after(node):
            copy = self.gm.graph.node_copy(node)
        copy.meta = dict(node.meta)
        self._apply(copy, call, changes)
        annotate(copy, placement=decision.results[0], origin=annotation(node).origin)
        return copy

    def _shard(self, node: fx.Node, at: Sharded, before: fx.Node) -> fx.Node:
        self.num_shards += 1
        with self._behind(node, before):
            whole = node if covers_all(at) else self._extend(node, at)
        with self._behind(whole, before):
            arguments = (whole, at.dim, at.inner, self.lengths.total, *self.plan.axis_arguments)
            return emit_copy(self.gm.graph, cp.shard_tokens.default, arguments, node, at)

    def _behind(self, node: fx.Node, before: fx.Node) -> AbstractContextManager[Any]:
        """Return the insertion point for what reads `node`, as early as it can be."""
        if node in self.written:
            return self.gm.graph.inserting_before(before)  # later writes must not be missed
        if node.op == "placeholder":
            return self.gm.graph.inserting_before(self._first_call())
        return self.gm.graph.inserting_after(node)

    def _extend(self, node: fx.Node, at: Sharded) -> fx.Node:
        """Return `node` with the tokens that its range leaves out filled in, so that it has one element for each token."""
        value = node.meta["val"]
        if at.inner != 1 or str(value.shape[at.dim]) != str(at.count(self.lengths.value)):
            raise NoRule(f"a range of tokens inside merged dims cannot be sharded.\n\n{where(node)}")
        pads = [0, 0] * (value.dim() - at.dim - 1) + [at.front, at.back]
        whole = emit_copy(self.gm.graph, aten.constant_pad_nd.default, (node, pads), node)
        annotate(whole, origin="")  # no value of the captured graph has this shape
        return whole

    def _first_call(self) -> fx.Node:
        """Return the node behind the placeholders and the lengths."""
        last = self.lengths.local
        if isinstance(last, fx.Node):
            return last.next
        first: fx.Node = next(node for node in self.gm.graph.nodes if node.op != "placeholder")
        return first


def stays_partial(call: Call, operands: Mapping[str, Placement]) -> bool:
    """Tell whether the call is linear in its partial operands, so that its result is a partial sum too."""
    partial = [name for name, p in operands.items() if isinstance(p, Partial)]
    if call.target in LINEAR:
        return True
    if call.target in LINEAR_IN_FIRST:
        return partial == ["self"] and all(isinstance(p, Full) for n, p in operands.items() if n != "self")
    if call.target in (aten.add.Tensor, aten.sub.Tensor):
        return len(partial) == 2
    floating = is_tensor(call.node) and call.result.is_floating_point() and call.tensor(partial[0]).is_floating_point()
    return call.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device) and floating


def covers_all(at: Sharded) -> bool:
    """Tell whether a placement is of all tokens, not of a range."""
    return at.front == at.back == 0


def is_tuple(call: Call) -> bool:
    """Tell whether an operator has several results."""
    return isinstance(call.result, tuple | list)


def whole_results(call: Call) -> Placement | tuple[Placement, ...]:
    """Return the placement of the results of a call whose operands every rank holds whole."""
    return (FULL,) * len(call.result) if is_tuple(call) else FULL


def written_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that share memory with a tensor that some operator writes: their value depends on when it is read."""
    storages: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        call = Call.of(node)
        for schema in target._schema.arguments:
            operand = call[schema.name]
            if schema.alias_info is not None and isinstance(operand, fx.Node):
                root = storages.get(operand, operand)
                storages[node] = root
                if schema.alias_info.is_write:
                    written.add(root)
    return {node for node in gm.graph.nodes if storages.get(node, node) in written}
