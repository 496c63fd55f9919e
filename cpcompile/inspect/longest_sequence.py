"""Longest: the longest sequence of which a training step fits a device, found from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.errors import ConfigError, CPError
from cpcompile.inspect.explain import explain
from cpcompile.memory.ledger import Ledger

STEP = 1024  # lengths are multiples of it for each rank
MOST = 1 << 24  # tokens; of a small model nobody asks for more


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest sequence that fits.

    Attributes:
        tokens: its length, a multiple of 1024 for each rank; 0 where not even that fits, and at least `MOST` where so many do.
        ledger: what a step of it holds; of 1024 tokens a rank where nothing fits.
    """

    tokens: int
    ledger: Ledger


def longest_sequence(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, device_bytes: int, world_size: int, **options: Any
) -> Longest:
    """Return the longest sequence of which a training step holds at most `device_bytes` on a rank.

    Memory grows linearly with the tokens, so that two lengths tell a third, which is then looked at itself.

    Args:
        model, inputs, world_size, options: of `explain`. Inputs that hold tokens are made longer.
        device_bytes: what the device has for it.

    Raises:
        ConfigError: the model does not take longer sequences.
    """
    unit = STEP * world_size
    options.pop("memory", None)
    plan = explain(model, inputs, world_size=world_size, **options)
    length, named = plan.tokens, plan.token_inputs
    along = set(named.values())
    if not length:
        raise ConfigError("no attention says how many tokens this model has: name them by token_dims={'name': dim}.")

    def ledger(tokens: int) -> Ledger:
        long = {name: stretched(x, length, tokens, named.get(name), along) for name, x in inputs.items()}
        try:
            found = explain(model, long, world_size=world_size, memory=True, **options).memory
        except CPError as error:
            raise ConfigError(
                f"the model takes {length} tokens, but not {tokens}, so that no longest sequence is known (a table of positions "
                f"may end before): {error}"
            ) from error
        assert found is not None
        return found

    units, ledgers = 16, {1: ledger(unit)}
    if ledgers[1].peak > device_bytes:
        return Longest(0, ledgers[1])
    span = 0
    while True:
        ledgers[units] = ledger(units * unit)
        fitting = max(n for n, of in ledgers.items() if of.peak <= device_bytes)
        above = min((n for n, of in ledgers.items() if of.peak > device_bytes), default=None)
        if above is None and fitting * unit >= MOST:
            return Longest(fitting * unit, ledgers[fitting])
        if above is None:
            units = min(16 * fitting, -(-MOST // unit))
            continue
        before, span = span, above - fitting
        if span <= max(1, fitting // 64):
            return Longest(fitting * unit, ledgers[fitting])
        slope = max(1, ledgers[above].peak - ledgers[fitting].peak) / span
        guess = fitting + int((device_bytes - ledgers[fitting].peak) / slope)
        is_slow = before and span > before // 2  # a peak that is flat and then steep
        units = (fitting + above) // 2 if is_slow else min(max(guess, fitting + 1), above - 1)


def stretched(value: Any, length: int, tokens: int, named: int | None, along: set[int]) -> Any:
    """Return a tensor with more tokens, its values over again.

    They are along the dim that is `named`. Labels and masks, which are not, have them where other inputs do, or in all dims of
    their length.
    """
    if not isinstance(value, torch.Tensor) or (named is None and value.is_floating_point()):
        return value
    long = [dim for dim, size in enumerate(value.shape) if size == length]
    dims = [named] if named is not None else [dim for dim in long if dim in along] or long
    for dim in dims:
        value = value.index_select(dim, torch.arange(tokens, device=value.device) % length)
    return value
