"""Fit: the plan that computes least again in backward and fits a device, or a refusal that says what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cpcompile.errors import ConfigError
from cpcompile.memory.ledger import Ledger
from cpcompile.options.config import MEMORY, Config
from cpcompile.passes.recompute_blocks import num_again

Predict = Callable[[Config], tuple[Ledger, int]]
GIB = 2**30
TILE = 4096
REMEDY = (
    "Use more ranks, fully_shard (parameters, gradients and optimizer state over all of them), a shorter sequence or an "
    "optimizer with less state; memory='' runs it as it is."
)


def wanted_bytes(memory: str) -> int:
    """Return the bytes of `fit:40` (GiB); 0 for `fit`, which takes what the device has."""
    given = MEMORY.fullmatch(memory)
    assert given is not None, memory
    return int(float(given.group(1) or 0) * GIB)


@dataclass(frozen=True, slots=True)
class Level:
    """How much is computed again: so many of the model's blocks, and MLPs by tiles."""

    blocks: int
    is_tiled: bool
    num_blocks: int

    def of(self, config: Config) -> Config:
        """Return the options of this level: at least what the user asks for."""
        budget = 1 - self.blocks / self.num_blocks if self.num_blocks else config.memory_budget
        tile = config.tile or (TILE if self.is_tiled else 0)
        return replace(config, memory_budget=min(config.memory_budget, budget), tile=tile)

    @property
    def number(self) -> int:
        """A number that grows with what is computed again, the same on ranks of one model."""
        return 2 * self.blocks + self.is_tiled

    def numbered(self, number: int) -> Level:
        """Return the level of a number."""
        return replace(self, blocks=number // 2, is_tiled=bool(number % 2))


def fitting(config: Config, predict: Predict, first: tuple[Ledger, int], limit: int) -> tuple[Level, Ledger]:
    """Return the first plan that fits: as few blocks computed again as possible, then all of them and MLPs by tiles.

    Args:
        config: the user's options.
        predict: the ledger of a plan, and how many blocks the model has.
        first: what it predicts for these options.
        limit: bytes that a step may hold.

    Raises:
        ConfigError: no plan fits.
    """
    least, num_blocks = first
    level = Level(num_again(config.memory_budget, num_blocks), False, num_blocks)
    if least.peak <= limit:
        return level, least
    if level.blocks < num_blocks:
        every = replace(level, blocks=num_blocks)
        found, _ = predict(every.of(config))
        if found.peak <= limit:
            return fewest_blocks(config, predict, limit, (level, least), (every, found))
        if found.peak < least.peak:  # a block that holds nearly all of the model saves nothing
            level, least = every, found
    if not config.tile:
        tiled = replace(level, is_tiled=True)
        found, _ = predict(tiled.of(config))
        if found.peak <= limit:
            return tiled, found
        least = min(least, found, key=lambda ledger: ledger.peak)
    largest = max(least.phases, key=lambda phase: phase.total)
    most = ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in sorted(largest.held.items(), key=lambda x: -x[1])[:3])
    blocks = f"its {num_blocks} blocks" if num_blocks else "what can be (the model has no list of blocks)"
    raise ConfigError(
        f"memory='fit': a step needs {least.peak / GIB:.3g} GiB on a rank with {blocks} computed again in backward, and "
        f"there are {limit / GIB:.3g} GiB. It is most in {largest.name} (GiB: {most}).\n\n{REMEDY}"
    )


def fewest_blocks(
    config: Config, predict: Predict, limit: int, above: tuple[Level, Ledger], fits: tuple[Level, Ledger]
) -> tuple[Level, Ledger]:
    """Return the plan that computes the fewest blocks again, between one that does not fit and one that does."""
    while (span := fits[0].blocks - above[0].blocks) > 1:
        # Each block saves about as much as the next: the first guess is right or nearly so.
        saved = max((above[1].peak - fits[1].peak) / span, 1.0)
        guess = above[0].blocks + math.ceil((above[1].peak - limit) / saved)
        level = replace(fits[0], blocks=min(max(guess, above[0].blocks + 1), fits[0].blocks - 1))
        found, _ = predict(level.of(config))
        if found.peak <= limit:
            fits = level, found
        else:
            above = level, found
    return fits
