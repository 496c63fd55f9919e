"""Place tokens: give every value its placement, and shard what meets the sharded stream.

before  h = aten.embedding(wte, input_ids); x = aten.mul(h, cos)
after   ids = cp.shard_tokens(input_ids, 1); h = aten.embedding(wte, ids)          # h: Sharded(1)
        cos_l = aten.cos(cp.shard_tokens(position, 0)); x = aten.mul(h, cos_l)     # x: Sharded(1)
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import value_numbers
from cpcompile.analysis.regions import STARTS, Picked, Step, is_picked_by_mask, place_region, regions_of, replace_inputs
from cpcompile.errors import LengthDependent, NoChunks, NoRule, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.exchanging import Exchanger
from cpcompile.ir.joining import Joiner
from cpcompile.ir.operator_call import Call, depends_on_length, is_tensor, value_of
from cpcompile.ir.placement import CHANNELS, Full, Partial, Placement, Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.ir.resharding import Resharder, Writer, whole_placement
from cpcompile.rules import KEEPS_OUTSIDE, RULES, Decision, is_whole_dim, no_rule
from cpcompile.rules.channels import channels_of
from cpcompile.rules.convolution import CONVOLUTIONS
from cpcompile.rules.joined import JoinedTokens
from cpcompile.rules.localisation import Localiser
from cpcompile.rules.loops import READS_A_FEW, is_loop, is_of_single_tokens, placement_in_loop, reads_of
from cpcompile.rules.own_backward import place_incoming, place_own_gradient
from cpcompile.rules.partial import stays_partial
from cpcompile.rules.push import push
from cpcompile.rules.refusals import DECLARE, first_of
from cpcompile.rules.scan import SCANS

aten, cp = torch.ops.aten, torch.ops.cpcompile

# The first operators that are worth sharding: whole index arithmetic before them is cheap.
HEAVY = {
    *CONVOLUTIONS,
    aten.embedding.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
}
CONDITION_REMEDY = "Write torch.where(condition, a, b), which computes both sides and stays sharded"


def place_tokens(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many `shard_tokens` were inserted; every node has its placement then.

    Needs: regions, strategies and the bounds of the layout (`find_token_local`, `choose_strategies`, `follow_documents`).
    Gives: the annotation `placement` of every node, and operands as the rules of `cpcompile.rules` want them.
    """
    placer = Placer(gm, plan, Lengths.insert(gm, plan))
    try:
        for node in list(gm.graph.nodes):
            placer.place(node)
    except Exception:
        if not placer.refused:  # what comes behind a refusal may fail for its sake
            raise
    placer.refuse()
    if not placer.resharder.num_shards and placer.joined.regrouper.unknown is not None:
        raise placer.joined.regrouper.unknown
    return placer.resharder.num_shards


class Placer:
    """Walks the graph once in order; every node before the current one has its placement.

    Methods follow the way of a node. A call of whole operands stays whole, until a heavy one meets tokens and starts the sharded
    stream (`_place_whole`). A call of sharded operands follows its rule: *push* (`_place_sharded`, `_decide`). A whole operand
    that meets sharded ones is localised: *pull* (`_localise_call`, `_as_wanted`). Where no rule covers the operands as they are,
    they are moved, joined or exchanged (`_place_on_others`), or gathered (`_gather_operands`). Loops and rows that masks pick
    have ways of their own (`_enter_loop`, `_pick_rows`). Sizes stay those of the whole (`_place_size`).
    """

    def __init__(self, gm: fx.GraphModule, plan: Plan, sequences: Mapping[str, int]) -> None:
        self.gm, self.plan, self.sequences = gm, plan, sequences
        self.resharder = Resharder(gm, plan)
        self.localiser = Localiser(self.resharder)
        self.joined = JoinedTokens(Joiner(self.resharder), self.localiser)
        self.exchanger = Exchanger(self.resharder)
        self.num_given = len(Lengths.all_of(gm))  # sequences of inputs; those that come are made of them
        self.refused: list[NoRule] = []  # the walk goes on behind them, on whole operands, to find all
        self.replaced: set[fx.Node] = set()
        self.picked: dict[fx.Node, Step] = {}  # operators on rows that masks pick
        self.regions = {region.nodes[0]: region for region in regions_of(gm)}

    def refuse(self) -> None:
        """Refuse what could not stay sharded.

        Raises:
            NoRule: the first of it, with a note of the others.
        """
        if self.refused:
            raise first_of(self.refused)

    def place(self, node: fx.Node) -> None:
        """Give `node` its placement; localise what it needs."""
        if node in self.replaced:
            return
        if node.op == "placeholder" and node.name in self.sequences:
            at = Sharded(self.plan.token_dims[node.name], sequence=self.sequences[node.name])
            annotate(node, placement=Full(at))
        elif node in self.picked:
            self._place_picked(node, self.picked[node])
        elif annotation(node).region:
            if node in self.regions:
                for operand in self.regions[node].inputs:
                    replace_inputs(self.regions[node], {operand: self.exchanger.to_tokens(operand)})
                place_region(self.regions[node], self.resharder, self.localiser.localise, self.plan.strict)
        elif node.op == "call_function":
            if node.target is operator.getitem:
                self._place_item(node)
            elif node.target is cp.incoming_gradient.default:
                place_incoming(node, self.resharder)
            elif node.target is cp.own_gradient.default:
                place_own_gradient(node, self.localiser)
            elif isinstance(node.target, torch._ops.OpOverload):
                self._place_call(node)
            else:
                self._require_whole(node)
        elif node.op == "output":
            node.args = fx.map_arg(node.args, self._output)

    def _output(self, value: fx.Node) -> fx.Node:
        """Return an output of the graph: by tokens, or whole on every rank, as what a loop over the tokens leaves."""
        is_of_channels = self.exchanger.is_of_channels
        lengths = {str(x.value) for x in Lengths.all_of(self.gm) if not x.is_of_channels}
        if is_of_channels(annotation(value).placement) and is_of_single_tokens(value, is_of_channels, lengths):
            return self.exchanger.gather(value, "the model returns what a loop over the tokens leaves")
        return self.joined.output(self.exchanger.to_tokens(value))

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
            self._replace_operands(
                node, call, {n: self.resharder.reduce for n, p in operands.items() if p == Partial()}
            )
            call = Call.of(node)
            operands = {name: placement_of(operand) for name, operand in call.operands()}
        if any(isinstance(p, Sharded) for p in operands.values()):
            if annotation(node).stays_whole:
                self._gather_operands(node, f"{call.target}: every rank needs it of all tokens")
            else:
                self._place_sharded(node, call)
        else:
            self._place_whole(node, call, hints_of(call))

    def _place_whole(self, node: fx.Node, call: Call, hints: Mapping[str, Sharded]) -> None:
        """Place a call of whole operands: a heavy one that meets tokens starts the sharded stream."""
        annotate(node, placement=whole_placement(node))
        if annotation(node).stays_whole:
            return
        by_size = HEAVY if self.plan.num_tokens or not self.plan.strict else {aten.embedding.default}
        if not hints and node.target in by_size:
            hints = self._hint_by_size(call)
        hints = self.joined.regrouper.stem(node, call, hints) if hints else hints
        if not hints or node.target not in RULES:
            return
        decision = self._decide_by_hints(call, hints)
        if decision is None or decision.exchanges or (decision.gathers and node.target not in HEAVY):
            return
        if node.target in HEAVY and decision.lower is None and any(isinstance(p, Sharded) for p in decision.results):
            self._localise_call(node, call, decision)
        else:
            hinted = tuple(
                Full(at if isinstance(at, Sharded) and not at.reaches_outside else None) for at in decision.results
            )
            annotate(node, placement=hinted if call.is_tuple else hinted[0])

    def _decide_by_hints(self, call: Call, hints: Mapping[str, Sharded]) -> Decision | None:
        """Return what happens if operands hold tokens where they may: all of them, or else one, which the others then follow."""
        for given in (hints, *({name: at} for name, at in hints.items() if len(hints) > 1)):
            with contextlib.suppress(NoRule):
                return self._push(call, given)
        return None

    def _hint_by_size(self, call: Call) -> Mapping[str, Sharded]:
        """Return where an operand may hold tokens, by its sizes: any dim of a whole value is right to shard."""
        name = "indices" if "indices" in call else next(name for name, _ in call.operands())
        sizes = call.shape(name)[: None if name == "indices" else -1]
        for sequence, lengths in enumerate(Lengths.all_of(self.gm)[: self.num_given]):
            dims = [dim for dim, size in enumerate(sizes) if str(size) == str(lengths.value)]
            if dims:
                return {name: Sharded(dims[-1], sequence=sequence)}
        return {}

    def _place_sharded(self, node: fx.Node, call: Call) -> None:
        """Place a call of sharded operands: by its rule, by its rule on other operands, or on whole operands."""
        made = self.joined.replace(node, call)
        if made is not None:
            self._drop([*node.users, node])  # items of what is split
            for new in made:
                self.place(new)
            return
        self._enter_loop(Call.of(node))
        call = Call.of(node)
        if not sharded_operands(call):
            self._place_whole(node, call, hints_of(call))
            return
        try:
            self._place_by_rule(node, call)
        except NoChunks:
            if node.target in SCANS and self._run_by_channels(node, Call.of(node)):
                return
            if not self.joined.chunk(node, Call.of(node)):
                raise
            self._place_call(node)
        except LengthDependent:
            raise
        except NoRule as error:
            if depends_on_length(node):
                raise LengthDependent(str(error)) from None
            if self.plan.strict:
                self.refused.append(error)
            self._gather_operands(node, str(error).partition(".\n")[0])

    def _place_by_rule(self, node: fx.Node, call: Call) -> None:
        """Run a call on local tokens as its rule says, if need be on operands that are sharded otherwise.

        Raises:
            NoRule: no rule covers any of that.
        """
        if node.target in STARTS or is_picked_by_mask(call, next(iter(sharded_operands(call).values()))):
            self._pick_rows(node, call)
            return
        self._fit_operands(node, call)
        try:
            self._localise_call(node, Call.of(node), self._decide(node))
        except NoChunks:
            raise
        except NoRule:
            if not self._place_on_others(node):
                raise

    def _decide(self, node: fx.Node) -> Decision:
        """Return what happens to a call of sharded operands, which are sharded along the dims that it needs.

        Raises:
            NoRule: no rule covers this, nor one with operands that were sharded along channels and are so by tokens again.
        """
        call = Call.of(node)
        sharded = sharded_operands(call)
        of_channels = [name for name, at in sharded.items() if self.exchanger.is_of_channels(at)]
        try:
            decision = self._push(call, sharded)
        except NoRule:
            if not of_channels:
                raise
            decision = Decision({}, ())
        changes = dict.fromkeys(of_channels, self.exchanger.to_tokens)
        if decision.exchanges and not any(at.sequence == CHANNELS for at in decision.exchanges.values() if of_channels):
            changes = {name: partial(self.exchanger.exchange, to=at) for name, at in decision.exchanges.items()}
        elif not of_channels or self._stays_along_channels(call, decision):
            return decision
        try:
            self._replace_operands(node, call, changes)
        except NoRule:
            if decision.results:
                return decision
            raise
        return self._decide(node)

    def _stays_along_channels(self, call: Call, decision: Decision) -> bool:
        """Tell whether an operator on channels of this rank gives results that have these channels as a dim of their own."""
        if not decision.results or decision.lower is not None:
            return False
        return all(
            isinstance(at, Sharded) and self.exchanger.is_of_channels(at) and self._is_dim(at, result.shape)
            for at, result in zip(decision.results, call.results, strict=True)
        )

    def _is_dim(self, at: Sharded, shape: Sequence[Any]) -> bool:
        return is_whole_dim(at) and shape[at.dim] == self.resharder.lengths(at).value

    def _push(self, call: Call, sharded: Mapping[str, Sharded]) -> Decision:
        decision = push(call, sharded, lambda at: self.resharder.lengths(at).value)
        if any(map(self.joined.is_joined, sharded.values())) and not self.joined.takes(call, decision):
            raise no_rule(call, sharded, "the operator needs the tokens as one sequence")
        return decision

    def _localise_call(self, node: fx.Node, call: Call, decision: Decision) -> None:
        """Make `node` run on local tokens as decided."""
        changes: dict[str, Any] = dict(decision.arguments)
        for name, operand in call.operands():
            wanted = decision.operands.get(name)
            if wanted is not None:
                changes[name] = self._as_wanted(call, name, operand, wanted, name in decision.gathers)
            if name in decision.padding and isinstance(wanted, Sharded):
                changes[name] = self.resharder.fill_padding(changes[name], wanted, decision.padding[name], node)
        annotate(node, placement=decision.results if call.is_tuple else decision.results[0])
        if decision.lower is None:
            self.localiser.apply(node, call, changes)
        else:
            node.args, node.kwargs = call.rebound(changes)
            at = next(iter(sharded_operands(Call.of(node)).values()))
            results = decision.lower(Writer(self.resharder, Call.of(node), at))
            self._replace_by(node, results, decision.results)

    def _as_wanted(self, call: Call, name: str, operand: fx.Node, wanted: Placement, may_gather: bool) -> fx.Node:
        have = placement_of(operand)
        match have, wanted:
            case Full(), Full():
                return operand
            case Full(), Sharded():
                return self.localiser.localise(operand, wanted)
            case Sharded(), Full() if may_gather:
                reason = annotation(call.node).reason or f"{call.target}: its {name} is needed whole"
                return self.resharder.gather(operand, reason)
            case _ if have == wanted:
                return operand
            case Sharded(), Sharded() if have.is_shift_of(wanted):
                return self.resharder.move(operand, wanted)
            case Sharded(), Sharded() if is_whole_dim(have) and is_whole_dim(wanted) and have.dim != wanted.dim:
                return self.exchanger.exchange(operand, wanted)
        operands = {n: placement_of(o) for n, o in call.operands()}
        raise no_rule(call, operands, f"{name} is {have} but must be {wanted}", RULES[call.target].notation)

    def _replace_by(self, node: fx.Node, results: Sequence[fx.Node], placements: Sequence[Placement]) -> None:
        """Put the nodes of a lowering in the place of `node`, or of the items that are taken of it."""
        by_item = {u.args[1]: u for u in node.users} if isinstance(value_of(node), tuple | list) else {0: node}
        for i, (new, placement) in enumerate(zip(results, placements, strict=True)):
            old = by_item.get(i)
            if old is None:
                continue
            assert annotation(new).is_local or new.op != "call_function", "a lowering returns nodes of its own"
            assert new.meta["val"].dtype == old.meta["val"].dtype, f"{node.target} becomes {new.meta['val'].dtype}"
            new.meta["val"] = old.meta["val"]
            annotate(new, placement=placement, origin=annotation(old).origin or old.name, is_local=False)
            old.replace_all_uses_with(new)
        self._drop([*(item for item in by_item.values() if item is not node), node])

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        """Take calls out of the graph that nobody reads, users first."""
        self.replaced.update(nodes)
        for node in nodes:
            self.gm.graph.erase_node(node)

    def _fit_operands(self, node: fx.Node, call: Call) -> None:
        """Move operands that reach outside the sequence to where every token has a slot, if that is possible."""
        if call.target in KEEPS_OUTSIDE:
            return
        outside = [n for n, at in sharded_operands(call).items() if at.reaches_outside and at.front + at.back >= 0]
        self._replace_operands(node, call, dict.fromkeys(outside, self.resharder.fit))

    def _place_on_others(self, node: fx.Node) -> bool:
        """Place a call on operands in the slots of each other, joined or regrouped, or along channels; tells whether it can."""
        if self._align_operands(node, Call.of(node)):
            self._localise_call(node, Call.of(node), self._decide(node))
            return True
        if self.joined.join(node, Call.of(node)):
            return True
        if any(change(node, Call.of(node)) for change in self.joined.changes):
            self._place_call(node)
            return True
        return self._run_by_channels(node, Call.of(node))

    def _align_operands(self, node: fx.Node, call: Call) -> bool:
        """Move operands that hold as many tokens in other slots; tells whether there were any."""
        ranges = {name: (at.sequence, at.front, at.back) for name, at in sharded_operands(call).items()}
        counts = {(sequence, front + back) for sequence, front, back in ranges.values()}
        if len(set(ranges.values())) < 2 or len(counts) > 1:
            return False
        _, front, back = min(ranges.values(), key=lambda r: (abs(r[1]) + abs(r[2]), r))

        def align(operand: fx.Node) -> fx.Node:
            at = placement_of(operand)
            assert isinstance(at, Sharded)
            return self.resharder.move(operand, at.with_range(front, back))

        self._replace_operands(node, call, dict.fromkeys(ranges, align))
        return True

    def _run_by_channels(self, node: fx.Node, call: Call) -> bool:
        """Place an operator that mixes tokens: a rank has all tokens of some channels; tells whether it can."""
        wanted = channels_of(call, sharded_operands(call))
        if not wanted:
            return False
        for name, at in sharded_operands(call).items():
            self.joined.regrouper.number_results(node, call, call.shape(name), at.dim)
        changes = {name: partial(self.exchanger.exchange, to=at) for name, at in wanted.items()}
        self._replace_operands(node, call, changes)
        self._localise_call(node, Call.of(node), self._decide(node))
        return True

    def _gather_operands(self, node: fx.Node, reason: str) -> None:
        """Place a call that no rule covers on whole operands."""
        call = Call.of(node)
        gather = {name: lambda operand: self.resharder.gather(operand, reason) for name in sharded_operands(call)}
        self._replace_operands(node, call, gather)
        call = Call.of(node)
        self._place_whole(node, call, hints_of(call))

    def _replace_operands(self, node: fx.Node, call: Call, changes: Mapping[str, Any]) -> None:
        """Put what `changes` makes of them in the place of these operands."""
        new = {name: changes[name](operand) for name, operand in call.operands() if name in changes}
        if new:
            node.args, node.kwargs = call.rebound(new)

    def _enter_loop(self, call: Call) -> None:
        """Let what reads the tokens of a value one by one read all of them, of some channels or of all, as the loop wants it."""
        if call.target not in READS_A_FEW or not isinstance(at := placement_of(call["self"]), Sharded):
            return
        x = call["self"]
        if self.exchanger.is_of_channels(at) or call.dim("dim", "self") != at.dim:
            return
        if not is_loop(x, at, self.resharder.lengths(at).value):
            return
        wanted = placement_in_loop(x, at, self.exchanger.is_of_channels)
        if wanted is None:
            return
        reads = reads_of(x, at.dim)
        if isinstance(wanted, Sharded):
            new = self.exchanger.exchange(x, wanted)
        else:
            new = self.resharder.gather(x, "a loop over the tokens reads it beside channels that it does not have")
        for read in reads:
            read.replace_input_with(x, new)

    def _pick_rows(self, node: fx.Node, call: Call) -> None:
        """Let each rank pick rows of its own tokens.

        Raises:
            NoRule: what is computed from them is not known to be computed row by row.
        """
        sharded = sharded_operands(call)
        at = next(iter(sharded.values()))
        try:
            if at.reaches_outside or self.exchanger.is_of_channels(at) or {*sharded.values()} != {at}:
                raise NoRule("the mask is one of other than these tokens")
            is_by_mask = node.target not in STARTS
            picked = Picked.of_mask(node, at, self._numbers) if is_by_mask else Picked.of_places(node, at)
            steps = picked.steps
            shared = [step for step in steps if step in self.picked and is_tensor(step)]
            if shared:
                raise NoRule(f"{shared[0].target} reads them together with rows that another mask picks")
        except NoRule as error:
            reason = str(error).partition(".\n")[0]
            raise NoRule(
                f"{call.target}: the rows that it picks cannot be those of this rank's tokens: {reason}.\n\n{where(node)}\n\n"
                f"{DECLARE}"
            ) from None
        self.picked |= steps
        self._place_picked(node, steps[node])

    def _place_picked(self, node: fx.Node, step: Step) -> None:
        """Let an operator compute the rows that this rank picked, or put them back."""
        if step.wanted:
            call = Call.of(node)
            changes = {name: operand for name, operand in call.operands() if name in step.wanted}
            changes |= {n: self.resharder.reduce(o) for n, o in changes.items() if placement_of(o) == Partial()}
            wanted = {n: self._as_wanted(call, n, o, step.wanted[n], not self.plan.strict) for n, o in changes.items()}
            node.args, node.kwargs = call.rebound(wanted)
        is_whole = isinstance(step.result, Full)
        annotate(node, placement=whole_placement(node) if is_whole else step.result)
        if is_whole:
            annotate(node, origin="")  # ranks have other rows

    @cached_property
    def _numbers(self) -> dict[fx.Node, int]:
        """The same number for nodes of the same value."""
        return value_numbers(self.gm.graph)

    def _place_size(self, node: fx.Node, call: Call) -> None:
        """Keep sizes those of the whole: what needs a local size asks for it."""
        at = placement_of(node.args[0])  # type: ignore[arg-type]
        if not isinstance(at, Sharded) or call.dim("dim", "self") != at.dim:
            return
        lengths = self.resharder.lengths(at)
        if not isinstance(lengths.total, fx.Node):
            return
        if str(node.meta["val"]) == str(lengths.value):
            node.replace_all_uses_with(lengths.total)
            return
        with self.gm.graph.inserting_after(node):
            outer = self.gm.graph.call_function(operator.floordiv, (node, lengths.local))
        with self.gm.graph.inserting_before(outer):
            count = lengths.count(self.gm, at)
        with self.gm.graph.inserting_after(outer):
            whole = self.gm.graph.call_function(operator.mul, (outer, count))
        whole.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not outer)

    def _place_item(self, node: fx.Node) -> None:
        source = annotation(node.args[0]).placement  # type: ignore[arg-type]
        annotate(node, placement=source[node.args[1]] if isinstance(source, tuple) else source)  # type: ignore[index]

    def _require_whole(self, node: fx.Node) -> None:
        """Give an operator that is no ATen operator whole operands."""
        for operand in node.all_input_nodes:
            placement = annotation(operand).placement
            if not is_tensor(operand) or isinstance(placement, Full):
                continue
            if isinstance(placement, Partial):
                node.replace_input_with(operand, self.resharder.reduce(operand))
            else:
                node.replace_input_with(operand, self.resharder.gather(operand, f"{node.target}"))
            if isinstance(placement, Sharded) and self.plan.strict:
                remedy = CONDITION_REMEDY if node.target is torch.ops.higher_order.cond else "Move it out of the model"
                self.refused.append(
                    NoRule(
                        f"no rule for {node.target} on an operand that is {placement}.\n\n{where(node)}\n\n"
                        f"{remedy}, or pass strict=False to gather its operands."
                    )
                )


def sharded_operands(call: Call) -> dict[str, Sharded]:
    """Return the placements of the operands that are sharded."""
    return {name: p for name, operand in call.operands() if isinstance(p := placement_of(operand), Sharded)}


def hints_of(call: Call) -> dict[str, Sharded]:
    """Return where the whole operands are known to hold tokens."""
    placements = {name: placement_of(operand) for name, operand in call.operands()}
    return {name: p.tokens for name, p in placements.items() if isinstance(p, Full) and p.tokens is not None}
