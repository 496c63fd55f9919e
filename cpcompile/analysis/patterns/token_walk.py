"""Token walk: which values of a program hold one thing for each token, computed from that token or by attention only.

An operator that runs on the tokens of one rank without those of others runs on those of one document too, so that the rules
prove both. What mixes tokens otherwise is refused; labels may be shifted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.labels import LOSSES
from cpcompile.analysis.patterns.tables import depends, numbers
from cpcompile.errors import NoRule, where
from cpcompile.ir.operator_call import Call, is_tensor, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.rules import KEEPS_OUTSIDE, RULES, Decision

aten, cp = torch.ops.aten, torch.ops.cpcompile

# Operators that look the scores of labels up.
PICKS = {aten.gather.default, aten.take_along_dim.default}
REMEDY = "Leave documents='' and let the model keep them apart, or change this line so that each token is computed by itself."


@dataclass(frozen=True, slots=True)
class Mixed:
    """A value that depends on more tokens than those of one document: a loss, or something that nobody may read by token."""


MIXED = Mixed()


@dataclass(slots=True)
class TokenWalk:
    """Walks the program of one device in order.

    Attributes:
        length: the number of tokens.
        at: where the tokens of a value are, for all values that inputs with tokens determine.
        losses: the losses that ignore labels, with how many tokens after the one that predicts it a label stands.
        of_losses: what is computed from scores and labels.
        shifts: by how many tokens labels were shifted.
    """

    length: torch.SymInt
    at: dict[fx.Node, Any] = field(default_factory=dict)
    losses: list[tuple[fx.Node, int]] = field(default_factory=list)
    of_losses: set[fx.Node] = field(default_factory=set)
    shifts: dict[fx.Node, int] = field(default_factory=dict)

    def attend(self, call: Call) -> Sharded:
        """Return where the tokens of an attention are."""
        raise NotImplementedError

    def meet(self, call: Call, name: str, table: fx.Node, at: Sharded) -> None:
        """Called for an operand that no input determines, with elements along the tokens of the others."""
        raise NotImplementedError

    def enter(self, node: fx.Node) -> None:
        """Find the tokens of an input."""
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            dims = [dim for dim, size in enumerate(value.shape) if str(size) == str(self.length)]
            if dims:
                self.at[node] = Sharded(dims[0]) if len(dims) == 1 else MIXED

    def visit(self, node: fx.Node) -> None:
        """Find the tokens of what an operator computes.

        Raises:
            NoRule: it mixes tokens, or knows how many there are.
        """
        known = {operand: self.at[operand] for operand in node.all_input_nodes if operand in self.at}
        if not known or not is_value(node):
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            (source,) = known.values()
            of_item = source[int(node.args[1])] if isinstance(source, tuple) else source  # type: ignore[arg-type]
            if of_item is not None:
                self.at[node] = of_item
            return
        if node.target is cp.incoming_gradient.default:
            (at,) = known.values()
            if at != MIXED:  # that of a loss is for all tokens
                self.at[node] = at
            return
        if node.target is cp.own_gradient.default:
            self.at[node] = tuple(self.at.get(result) for result in node.args[0])  # type: ignore[union-attr, arg-type]
            return
        call = Call.of(node)
        mixed = [operand for operand, at in known.items() if at == MIXED]
        if node.target is cp.attention.default:
            self.at[node] = self.attend(call)
        elif not mixed:
            operands = {n: at for n, o in call.operands() if isinstance(at := known.get(o), Sharded)}
            self.at[node] = self.result(call, operands)
        elif len(mixed) < len(known) and any(is_float(operand) for operand in (*known, node)):
            raise self.refusal(node, f"what it reads of {mixed[0].name} depends on the tokens of other documents")
        else:
            self.at[node] = MIXED

    def result(self, call: Call, operands: dict[str, Sharded]) -> Any:
        """Return the placement of a result, as the rule of the operator says."""
        floating = any(call.tensor(name).is_floating_point() for name in operands)
        try:
            decision = self.decide(call, self.aligned(call, self.fitted(call, operands)))
        except NoRule as error:
            if floating or is_float(call.node):
                raise self.refusal(call.node, str(error).partition(".\n")[0].partition(": ")[2]) from None
            return MIXED
        is_moved = decision.lower is not None and call.target not in KEEPS_OUTSIDE
        if (
            is_moved
            or decision.gathers
            or decision.exchanges
            or not all(isinstance(x, Sharded) for x in decision.results)
        ):
            if floating:
                self.check_reduction(call, operands, decision)
            return MIXED
        for name, operand in call.operands():
            at = decision.operands.get(name)
            if name not in operands and isinstance(at, Sharded):
                self.meet(call, name, operand, at)
            elif name not in operands and floating and depends(operand, self.length):
                raise self.refusal(call.node, f"{operand.name} depends on the length of the row")
        if floating and any(depends(number, self.length) for number in numbers(call)):
            raise self.refusal(call.node, "it computes with the length of the row")
        results = tuple(replace(x, outside=None) for x in decision.results if isinstance(x, Sharded))
        return results if call.is_tuple else results[0]

    def decide(self, call: Call, operands: dict[str, Sharded]) -> Decision:
        """Return what the rule of an operator says."""
        if call.target not in RULES:
            raise NoRule(f"{call.target}: there is no rule that says which tokens it reads.\n")
        return RULES[call.target].push(call, operands, self.length)

    def check_reduction(self, call: Call, operands: dict[str, Sharded], decision: Decision) -> None:
        """Refuse what mixes tokens, but for statistics of the whole batch: a loss, a mean over all tokens."""
        is_statistic = decision.lower is None or call.target in LOSSES or is_scalar(call.result)
        if not is_statistic or decision.gathers or decision.exchanges:
            raise self.refusal(call.node, "it mixes the tokens of the whole row")
        shape = call.result.shape if isinstance(call.result, torch.Tensor) else ()
        if any(shape and at.dim > 0 and str(shape[0]) == str(call.shape(name)[0]) for name, at in operands.items()):
            raise self.refusal(call.node, "it pools all tokens of a row")

    def fitted(self, call: Call, operands: dict[str, Sharded]) -> dict[str, Sharded]:
        """Return the operands with shifted labels put where every token has a slot; by how many they are shifted is kept.

        Raises:
            NoRule: numbers of different tokens meet.
        """
        found, shifts = dict(operands), set()
        for name, node in call.operands():
            at = operands.get(name)
            if at is None or is_float(node):
                continue
            shift = self.shifts.get(node, 0)
            if at.reaches_outside and at.front + at.back >= 0 and call.target not in KEEPS_OUTSIDE:
                found[name], shift = at.with_range(0, at.front + at.back), shift + at.front
            shifts.add(shift)
        if len(shifts) > 1 or (shifts - {0} and not self.may_shift(call)):
            raise NoRule(f"{call.target}: it reads the numbers of other tokens.\n")
        self.shifts[call.node] = max(shifts, default=0)
        return found

    def may_shift(self, call: Call) -> bool:
        """Tell whether an operator may read labels of other tokens: as labels, or to make labels."""
        given = [operand for _, operand in call.operands()]
        is_loss = call.target in LOSSES or call.target in PICKS or any(o in self.of_losses for o in given)
        return is_loss or not any(is_float(x) for x in (*given, call.node))

    def aligned(self, call: Call, operands: dict[str, Sharded]) -> dict[str, Sharded]:
        """Return the operands with labels that are shifted put where the tokens are that predict them."""
        scores = [at for name, at in operands.items() if call.tensor(name).is_floating_point()]
        labels = {name: at for name, at in operands.items() if not call.tensor(name).is_floating_point()}
        if not scores or not labels or not self.may_shift(call):
            return operands
        at, label = scores[0], next(iter(labels.values()))
        self.of_losses.add(call.node)
        if call.target in LOSSES:
            self.losses.append((call.node, self.shifts.get(call.node, 0) + label.front - at.front))
        return operands | {name: replace(x, front=at.front, back=at.back) for name, x in labels.items()}

    def refusal(self, node: fx.Node, reason: str) -> NoRule:
        """Return the error for an operator that cannot keep documents apart."""
        return NoRule(f"{node.target} cannot keep documents apart: {reason}.\n\n{where(node)}\n\n{REMEDY}")


def is_value(node: fx.Node) -> bool:
    """Tell whether a node computes tensors."""
    value = value_of(node)
    return is_tensor(node) or (isinstance(value, tuple | list) and any(isinstance(x, torch.Tensor) for x in value))


def is_float(node: fx.Node) -> bool:
    """Tell whether a node computes floating-point numbers."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_scalar(value: Any) -> bool:
    """Tell whether a result is one number."""
    return isinstance(value, torch.Tensor) and value.dim() == 0
