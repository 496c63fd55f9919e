"""Constants: inputs whose values decide sizes and branches, such as the grids of images, are known while tracing.

Each combination of their values is compiled by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.errors import InputError


@dataclass(frozen=True, slots=True)
class Constant:
    """The values of an input: of a tensor as nested tuples, with what else it is."""

    name: str
    values: Any
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> torch.Tensor:
        """Return the input; while tracing, its values are numbers in the program."""
        return torch.tensor(self.values, dtype=self.dtype, device=self.device)


def constants_of(inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Constant, ...]:
    """Return the inputs of these names that are given, as values that can be compared.

    Raises:
        InputError: one of them is no tensor of integers with values.
    """
    found = []
    for name in names:
        x = inputs.get(name)
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.is_complex() or x.is_meta:
            is_tensor = isinstance(x, torch.Tensor)
            kind = f"a tensor of {x.dtype} on {x.device}" if is_tensor else f"a {type(x).__name__}"
            raise InputError(
                f"constants names {name!r}, which is {kind}: only values of integers, on a device that has them, decide sizes."
            )
        found.append(Constant(name, nested(x.tolist()), x.dtype, x.device))
    return tuple(found)


def nested(values: Any) -> Any:
    """Return lists in lists as tuples in tuples."""
    return tuple(map(nested, values)) if isinstance(values, list) else values


def fold_known(gm: fx.GraphModule) -> int:
    """Put the values of what is known in place of its nodes, in a graph of Dynamo, and return how many there are.

    What reads values (`x[mask]`, `repeat_interleave`) then has sizes that later stages know as well.
    """
    calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    known = {node: value for node in calls if (value := _torch.known_value(node)) is not None}
    for node in reversed(calls):
        if node.target in ("item", operator.getitem) and not node.users:  # the number is in the program
            gm.graph.erase_node(node)
            known.pop(node, None)
    count = 0
    for node, value in known.items():
        if all(user in known for user in node.users):
            continue
        with gm.graph.inserting_before(node):
            made: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            folded = gm.graph.call_function(torch.tensor, (value.tolist(),), made)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        count += 1
    for node in reversed(known):
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return count
