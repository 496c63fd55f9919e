"""Picked rows: what is computed from the rows at the places where a mask is true, `x[idx]`, up to where it is put back.

before  idx, nth = aten.where(sel == e); rows = aten.linear(aten.index(x, [idx]), w)
        y = aten.index_add(out, 0, idx, rows)                              # sel, x, out: Sharded(0)
after   the same: each rank picks rows of its own tokens, and adds them to its own

A mixture of experts that is written as a loop does so for each expert. How many rows there are only running tells; that each
is computed from itself is for the rules to prove, as for tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.masked_rows import ASSERTS, mask_of
from cpcompile.analysis.token_rows import follow
from cpcompile.errors import NoRule
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call, is_tensor, value_of
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules import RULES

aten = torch.ops.aten

STARTS = {aten.where.default, aten.nonzero.default, aten.nonzero_numpy.default}
PUT_BACK = {aten.index_add.default, aten.index_put.default, aten.scatter_add.default}
_OF_ROWS = {aten.unsqueeze.default, aten.expand.default, aten.expand_as.default}


@dataclass(frozen=True, slots=True)
class Places:
    """Where along the dim `dim` of the mask it is true; None: along each of them, `[rows, dims]`."""

    dim: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """An operator on picked rows: what its operands from elsewhere must be, and its result if that is one of all tokens."""

    wanted: Mapping[str, Placement] = field(default_factory=dict)
    result: Placement = FULL


class Picked:
    """All that is computed from the rows that one mask picks.

    Attributes:
        steps: the operators that compute it.
    """

    def __init__(self, starts: Mapping[fx.Node, Any], at: Sharded, masks: Container[fx.Node | None] = ()) -> None:
        """Follow what nodes give: where a mask is true, of which each rank holds the tokens of `at`, or rows that it picks.

        `masks` are the nodes that hold it, where it picks rows itself.

        Raises:
            NoRule: a value of this rank's rows or places is read in a way that is not known to be one by rows.
        """
        self.at, self._masks, self.steps = at, masks, dict[fx.Node, Step]()
        self._kinds = dict(starts)
        follow(starts, self._leads_on)

    @classmethod
    def of_places(cls, start: fx.Node, at: Sharded) -> Picked:
        """Return what is computed of the places that `where` or `nonzero` gives."""
        is_table = start.target is aten.nonzero.default
        return cls({start: Places(None) if is_table else [Places(d) for d in range(len(value_of(start)))]}, at)

    @classmethod
    def of_mask(cls, start: fx.Node, at: Sharded, numbers: Mapping[fx.Node, int]) -> Picked:
        """Return what is computed of the rows that the mask of `start` picks, by it and by others that pick by the same mask.

        Nodes of one number in `numbers` have the same value.
        """
        mask = mask_of(start)
        assert mask is not None
        masks = {mask, *(node for node, number in numbers.items() if number == numbers.get(mask, -1))}
        users = (user for mask in masks for user in mask.users if user.target is aten.index.Tensor)
        return cls({user: Sharded(0) for user in users if mask_of(user) in masks}, at, masks)

    def _leads_on(self, node: fx.Node) -> bool:
        """Take a node, and tell whether it gives rows, places, or how many there are."""
        if annotation(node).region:
            raise NoRule(f"{node.target} reads them in a part that is declared")
        if node not in self._kinds:
            self.steps[node] = self._step(node)
        elif self._masks:
            self.steps[node] = Step({"self": self.at, "indices.0": self.at})
        else:
            self.steps[node] = Step()
        return node in self._kinds

    def _step(self, node: fx.Node) -> Step:
        """Take a node that reads rows, places, or how many there are."""
        if node.target is operator.getitem:
            source = self._kinds[node.args[0]]  # type: ignore[index]
            self._kinds[node] = source[node.args[1]] if isinstance(source, list | tuple) else source  # type: ignore[index]
            return Step()
        if not is_tensor(node) and (node.target is aten.sym_size.int or node.target in ASSERTS):
            self._kinds[node] = None
            return Step()
        if not isinstance(node.target, torch._ops.OpOverload):
            raise NoRule(f"{node.target} reads them")
        call = Call.of(node)
        kinds = {name: self._kinds.get(operand) for name, operand in call.operands()}
        if call.target in (aten.index.Tensor, aten.index_select.default) and kinds["self"] is None:
            return self._pick(call, kinds)
        if call.target in PUT_BACK and kinds["self"] is None:
            return self._put_back(call, kinds)
        if any(isinstance(kind, Places) for kind in kinds.values()):
            self._kinds[node] = self._of_places(call, kinds)
            return Step()
        return self._by_row(call, kinds)

    def _of_places(self, call: Call, kinds: Mapping[str, Any]) -> Any:
        """Return what an operator on places gives: those of one dim, or the same places for each column."""
        place = kinds.get("self")
        if isinstance(place, Places) and place.dim is None:
            if call.target is aten.select.int and call.dim("dim", "self") == 1:
                return Places(int(call["index"]) % call.shape("self")[1])
            if call.target is aten.unbind.int and call.dim("dim", "self") == 1:
                return [Places(dim) for dim in range(call.shape("self")[1])]
            is_squeeze = call.target in (aten.squeeze.dim, aten.squeeze.default) and call.shape("self")[1] == 1
            if is_squeeze and call.result.dim() == 1:
                return Places(0)
        elif (
            isinstance(place, Places)
            and call.target in _OF_ROWS
            and str(call.result.shape[0]) == str(call.shape("self")[0])
        ):
            return place
        raise NoRule(f"{call.target} computes with places, which are others for each rank")

    def _pick(self, call: Call, kinds: Mapping[str, Any]) -> Step:
        """Take rows of `self`, which is from elsewhere."""
        places = self._indexed(call, kinds)
        self._kinds[call.node] = Sharded(min(places))
        return Step({"self": self._held(places)})

    def _put_back(self, call: Call, kinds: Mapping[str, Any]) -> Step:
        """Put or add rows to what is from elsewhere."""
        is_by_mask = call.target is aten.index_put.default and mask_of(call.node) in self._masks
        places = {0: 0} if is_by_mask else self._indexed(call, kinds)
        held = self.at if is_by_mask else self._held(places)
        rows = next((n for n in ("source", "src", "values") if n in kinds), "values")
        is_of_rows = kinds.get(rows) == Sharded(min(places)) or (rows == "values" and call.tensor("values").dim() == 0)
        if not isinstance(held, Sharded) or not is_of_rows:
            raise NoRule(f"{call.target} puts them elsewhere than in the places of their tokens")
        others: dict[str, Placement] = {} if kinds[rows] else {rows: FULL}
        mask: dict[str, Placement] = {"indices.0": self.at} if is_by_mask else {}
        return Step({"self": held, **others, **mask}, held)

    def _indexed(self, call: Call, kinds: Mapping[str, Any]) -> dict[int, int]:
        """Return which dims are indexed by the places along which dims of the mask: vectors for dims that follow each other."""
        if "indices" in call:
            given = {dim: f"indices.{dim}" for dim, index in enumerate(call["indices"]) if index is not None}
        else:
            given = {call.dim("dim", "self"): "index"}
        places = {dim: kinds[name] for dim, name in given.items()}
        is_wide = call.target is aten.scatter_add.default
        are_known = all(isinstance(p, Places) and p.dim is not None for p in places.values())
        are_vectors = all(call.tensor(name).dim() == 1 or is_wide for name in given.values())
        if not are_known or not are_vectors or list(given) != list(range(min(given), min(given) + len(given))):
            raise NoRule(f"{call.target} indexes with more than places")
        return {dim: p.dim for dim, p in places.items()}

    def _held(self, places: Mapping[int, int]) -> Placement:
        """Return how a tensor is held that has the tokens of the mask along the dim that their places index."""
        dims = [dim for dim, of_mask in places.items() if of_mask == self.at.dim]
        if len(dims) > 1:
            raise NoRule("two dims are indexed by the places of tokens")
        return replace(self.at, dim=dims[0]) if dims else FULL

    def _by_row(self, call: Call, kinds: Mapping[str, Any]) -> Step:
        """Take an operator that computes each row from that row."""
        rows = {name: at for name, at in kinds.items() if at is not None}
        if call.target not in RULES or not rows:
            raise NoRule(f"{call.target} reads them, and there is no rule for it")
        name, at = next(iter(rows.items()))
        decision = RULES[call.target].push(call, rows, call.shape(name)[at.dim])
        draws = torch.Tag.nondeterministic_seeded in call.target.tags
        is_plain = not (decision.lower or decision.gathers or decision.exchanges or draws)
        others = {n: p for n, p in decision.operands.items() if n not in rows}
        if not is_plain or not all(isinstance(x, Sharded) for x in decision.results) or set(others.values()) - {FULL}:
            raise NoRule(f"{call.target} mixes them")
        self._kinds[call.node] = decision.results if call.is_tuple else decision.results[0]
        return Step(others)


def is_picked_by_mask(call: Call, at: Sharded) -> bool:
    """Tell whether a call picks the rows of a mask over the tokens of `at`."""
    mask = mask_of(call.node) if call.target is aten.index.Tensor else None
    return mask is not None and at.dim < value_of(mask).dim()
