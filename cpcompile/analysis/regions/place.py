"""Place: a token-local region runs on local tokens.

before  rows = aten.reshape(h, [B * S, D]); order = aten.sort(route); ...; y = aten.view(z, [B * S, k, D])
after   the same, with `B * local` in the place of `B * S`                       # y: Sharded(0), as rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.regions.find import Region
from cpcompile.analysis.regions.probe import chosen_numbers, readings, renumbered
from cpcompile.analysis.regions.rows import locate_rows
from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.operator_call import Call, expression, is_tensor, value_of
from cpcompile.ir.placement import FULL, Full, Partial, Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.ir.resharding import Resharder, whole_placement
from cpcompile.rules.views import quotient

cp = torch.ops.cpcompile
Localise = Callable[[fx.Node, Sharded], fx.Node]


def place_region(region: Region, resharder: Resharder, localise: Localise, strict: bool) -> None:
    """Give the nodes of `region` their placements, and make them work on local tokens where an operand is sharded.

    `localise` returns the local tokens of a whole value.

    Raises:
        NoRule: the region is not one of rows, as far as that can be told.
    """
    for operand in region.inputs:
        if annotation(operand).placement == Partial():
            replace_inputs(region, {operand: resharder.reduce(operand)})
    operands = {operand: placement_of(operand) for operand in region.inputs if is_tensor(operand)}
    is_sharded = any(isinstance(at, Sharded) for at in operands.values())
    try:
        if is_sharded or any(at.tokens for at in operands.values() if isinstance(at, Full)):
            RegionPlacer(region, resharder, operands).place(localise)
            return
    except NoRule as error:
        if is_sharded and strict:
            raise
        reason = str(error).partition(".\n")[0]
    for operand, at in operands.items():
        if isinstance(at, Sharded):
            replace_inputs(region, {operand: resharder.gather(operand, reason)})
    for node in region.nodes:
        annotate(node, placement=whole_placement(node), region="")


def replace_inputs(region: Region, new: Mapping[fx.Node, fx.Node | int]) -> None:
    """Let the nodes of the region read other values."""
    for node in region.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: new.get(operand, operand))


class RegionPlacer:
    """Places one region that meets sharded operands."""

    def __init__(self, region: Region, resharder: Resharder, operands: Mapping[fx.Node, Placement]) -> None:
        self.region, self.gm, self.resharder, self.operands = region, resharder.gm, resharder, operands
        self.sharded = {operand: at for operand, at in operands.items() if isinstance(at, Sharded)}
        hints = {o: at.tokens for o, at in operands.items() if isinstance(at, Full) and at.tokens}
        self.rows = self.sharded or hints
        self.at = next(iter(self.rows.values()))
        self.lengths: Lengths = resharder.lengths(self.at)
        self.tokens = self.at.count(self.lengths.value)

    def place(self, localise: Localise) -> None:
        """Edit the region; nothing is changed when this raises."""
        self._check()
        results = {node: self._result(node) for node in self.region.results}
        wanted = {operand: self._wanted(operand) for operand in self.operands}
        numbers = None
        if isinstance(self.lengths.value, int):
            wanted, numbers = self._read(wanted, results)
        new: dict[fx.Node, fx.Node | int] = {size: self._local_size(size) for size in self._sizes()}
        for operand, (at, *_) in wanted.items():
            if operand not in self.sharded and isinstance(at, Sharded):
                new[operand] = localise(operand, at)
        if numbers is not None:
            for node, args, kwargs in list(renumbered(self.region, numbers)):
                node.args, node.kwargs = args, kwargs
        replace_inputs(self.region, new)
        for node in self.region.nodes:
            annotate(
                node, placement=results.get(node, whole_placement(node)), **({} if node in results else {"origin": ""})
            )

    def _check(self) -> None:
        """Refuse what contradicts that the region is one of rows."""
        self._check_backwards()
        if len({(at.sequence, at.front, at.back) for at in self.rows.values()}) > 1:
            raise self._refusal(self.region.nodes[0], "its operands hold tokens of different ranges or sequences")
        if any(at.reaches_outside for at in self.rows.values()):
            raise self._refusal(self.region.nodes[0], "an operand holds tokens outside the sequence")
        for node in self.region.nodes:
            if node.target is cp.attention.default:
                raise self._refusal(node, "it holds an attention, which looks at other tokens")
            if draws(node):
                raise self._refusal(node, "it draws random numbers, which would depend on the rank")

    def _check_backwards(self) -> None:
        """Refuse a backward of the model's own for what every rank computes alike: it would see what one rank's tokens give."""
        of_rows = set(self.rows)
        for node in self.region.nodes:
            if not of_rows.isdisjoint(node.all_input_nodes):
                of_rows.add(node)
            elif node.target is cp.own_gradient.default:
                reason = "a torch.autograd.Function in it reads no tokens, and its backward would get the gradient of one rank's"
                raise self._refusal(node, reason)

    def _result(self, node: fx.Node) -> Sharded:
        """Return the placement of a result: it has the rows of an operand."""
        if not is_tensor(node):
            raise self._refusal(node, "the rest of the model reads a value of it that is no tensor")
        shape = value_of(node).shape
        for operand, at in self.rows.items():
            found = locate_rows(value_of(operand).shape, shape, at, self.lengths.value)
            if found is not None:
                return found
        raise self._refusal(node, f"a result of shape {list(shape)} does not have the rows of its operands")

    def _wanted(self, operand: fx.Node) -> list[Placement]:
        """Return what the placement of an operand on local tokens may be."""
        at, shape = self.operands[operand], value_of(operand).shape
        if isinstance(at, Sharded):
            return [at]
        if isinstance(at, Full) and at.tokens and at.tokens.sequence == self.at.sequence:
            return [replace(at.tokens, front=self.at.front, back=self.at.back)]
        if not any(map(self._counts_tokens, shape)):
            return [FULL]
        rows = [locate_rows(value_of(o).shape, shape, p, self.lengths.value) for o, p in self.rows.items()]
        found = [place for place in dict.fromkeys(rows) if place is not None]
        if isinstance(self.lengths.value, int):
            return [FULL, *found]
        if not found:
            raise self._refusal(
                operand, f"it reads {operand.name} of shape {list(shape)}, which holds tokens elsewhere"
            )
        return [found[0]]

    def _counts_tokens(self, size: Any) -> bool:
        """Tell whether a size is one that tokens, perhaps among other things, may make up."""
        symbols = expression(self.lengths.value).free_symbols
        if symbols:
            return not symbols.isdisjoint(expression(size).free_symbols)
        return quotient(expression(size), expression(self.tokens)) is not None

    def _read(
        self, wanted: Mapping[fx.Node, list[Placement]], results: Mapping[fx.Node, Sharded]
    ) -> tuple[dict[fx.Node, list[Placement]], list[int]]:
        """Return the placements of the operands and the integers for local tokens, where the length is a number."""
        found = readings(self.region, wanted, results, self.tokens)
        if len(found) != 1:
            raise self._refusal(
                self.region.nodes[0],
                f"with the fixed length {self.tokens} it cannot be told which of its sizes count tokens",
                "Let the length be dynamic (dynamic=True), so that sizes say so themselves. ",
            )
        ((operands, counts),) = found
        assert isinstance(self.lengths.local, int)
        numbers = chosen_numbers(self.region, counts, self.tokens, self.lengths.local)
        return {operand: [at] for operand, at in operands.items()}, numbers

    def _sizes(self) -> list[fx.Node]:
        """Return the sizes outside that count tokens."""
        sizes = []
        symbols = expression(self.lengths.value).free_symbols
        for operand in self.region.inputs:
            value = value_of(operand)
            if not isinstance(value, torch.SymInt):
                continue
            outer = quotient(expression(value), expression(self.tokens))
            if outer is not None and symbols and symbols.isdisjoint(outer.free_symbols):
                sizes.append(operand)
            elif outer is not None or not symbols.isdisjoint(expression(value).free_symbols):
                reason = f"it cannot be told how many tokens the size {value} counts"
                raise self._refusal(self.region.nodes[0], reason)
        return sizes

    def _local_size(self, size: fx.Node) -> fx.Node | int:
        before = next(node for node in self.region.nodes if size in node.all_input_nodes)
        return self.lengths.localise(self.gm, size, self.at, before)

    def _refusal(self, node: fx.Node, reason: str, remedy: str = "") -> NoRule:
        lines = "\n".join(
            f"  {operand.name}: {at} of {list(value_of(operand).shape)}" for operand, at in self.rows.items()
        )
        return NoRule(
            f"{self.region.name} is declared token-local, but {reason}.\n\n{where(node)}\n{lines}\n\n{remedy or _REMEDY}"
        )


_REMEDY = (
    "Declare a smaller module or function, whose inputs and results are rows of tokens, "
    "or pass strict=False to compute it whole on every rank."
)


def draws(node: fx.Node) -> bool:
    """Tell whether a node draws random numbers."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    call = Call.of(node)
    is_off = call.arguments.get("train", True) is False or call.arguments.get("training", True) is False
    return not (is_off or call.arguments.get("p") == 0)
