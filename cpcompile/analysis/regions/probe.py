"""Probe: which numbers in a region that was traced with a fixed length count tokens.

With a symbolic length every size says so itself. With a fixed one a 64 may be the tokens or the width. The region is
run on fake values of another length with each reading of the numbers: where just one reading gives results of the
shapes that another length must give, that one is meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile._torch import trial_on_fake_tensors
from cpcompile.analysis.regions.find import Region
from cpcompile.analysis.regions.rows import with_tokens
from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.ir.placement import FULL, Placement, Sharded

aten = torch.ops.aten

# A length that no size of a model has.
_PROBE = 10007
_LONGEST = 10


def numbers(region: Region) -> Iterator[int]:
    """Yield every integer argument in the region, in a fixed order."""
    for node in region.nodes:
        for value in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            if type(value) is int:
                yield value


def renumbered(region: Region, values: Sequence[int]) -> Iterator[tuple[fx.Node, Any, Any]]:
    """Yield each node with the arguments that it has when the integers of the region are `values`."""
    left = iter(values)
    for node in region.nodes:
        args, kwargs = torch.utils._pytree.tree_map_only(
            int, lambda old: next(left) if type(old) is int else old, (node.args, node.kwargs)
        )
        yield node, args, kwargs


def counted(number: int, tokens: int, local: int) -> int | None:
    """Return the number for `local` tokens where `number` may count `tokens`: a multiple, or one more or less."""
    for off in (0, 1, -1):
        multiple = number - off
        if multiple > 0 and multiple % tokens == 0:
            return multiple // tokens * local + off
    return None


def readings(
    region: Region, placements: Mapping[fx.Node, Sequence[Placement]], results: Mapping[fx.Node, Sharded], tokens: int
) -> list[tuple[dict[fx.Node, Placement], tuple[bool, ...]]]:
    """Return the readings under which the region works for any length.

    A reading is one of the possible placements of each operand, and for each integer whether it counts tokens.
    More undecided places than `_LONGEST` give no reading.
    """
    choices = [[False, True] if counted(n, tokens, 1) is not None else [False] for n in numbers(region)]
    operands = list(placements)
    undecided = [options for options in (*placements.values(), *choices) if len(options) > 1]
    if len(undecided) > _LONGEST:
        return []
    found = []
    for given in itertools.product(*placements.values()):
        for counts in itertools.product(*choices):
            placed = dict(zip(operands, given, strict=True))
            if works(region, placed, results, tokens, counts):
                found.append((placed, counts))
    return found


def works(
    region: Region,
    placed: Mapping[fx.Node, Placement],
    results: Mapping[fx.Node, Sharded],
    tokens: int,
    counts: Sequence[bool],
) -> bool:
    """Tell whether the region, read so, turns operands of another length into results of that length."""
    values = chosen_numbers(region, counts, tokens, _PROBE)
    with trial_on_fake_tensors():
        known: dict[fx.Node, Any] = {}
        for operand in region.inputs:
            known[operand] = example(operand, placed.get(operand, FULL), tokens)
        try:
            for node, args, kwargs in renumbered(region, values):
                args, kwargs = fx.map_arg((args, kwargs), known.get)
                if node.target is aten.index_put.default:  # its fake does not look at the values
                    args[2].expand(aten.index(args[0], args[1]).shape)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever an operator raises when shapes do not fit
            return False
    return all(
        list(known[node].shape) == with_tokens(value_of(node).shape, at, tokens, _PROBE) for node, at in results.items()
    )


def chosen_numbers(region: Region, counts: Sequence[bool], tokens: int, local: int) -> list[int]:
    """Return the integers of the region, those that count tokens for `local` ones."""
    new = []
    for number, is_count in zip(numbers(region), counts, strict=True):
        value = counted(number, tokens, local) if is_count else number
        assert value is not None
        new.append(value)
    return new


def example(operand: fx.Node, at: Placement, tokens: int) -> Any:
    """Return a fake value of an operand at the length of the probe."""
    value = value_of(operand)
    if not is_tensor(operand):
        return value
    shape = with_tokens(value.shape, at, tokens, _PROBE) if isinstance(at, Sharded) else list(value.shape)
    return torch.empty(shape, dtype=value.dtype, device=value.device)
