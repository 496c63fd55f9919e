"""Fit: the plan that computes least again in backward and fits a device, or a refusal that says what is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

from cpcompile.errors import ConfigError
from cpcompile.memory.ledger import Ledger
from cpcompile.options.config import Config

Predict = Callable[[Config], tuple[Ledger, int]]
GIB = 2**30
TILE = 4096
REMEDY = (
    "Use more ranks, fully_shard (parameters, gradients and optimizer state over all of them), a shorter sequence or an "
    "optimizer with less state; memory='' runs it as it is."
)


def wanted_bytes(memory: str) -> int:
    """Return the bytes of `fit:40` (GiB); 0 for `fit`, which takes what the device has."""
    given = re.fullmatch(r"fit(?::(\d+(?:\.\d+)?))?", memory)
    assert given is not None, memory
    return int(float(given.group(1) or 0) * GIB)


def fitting(config: Config, predict: Predict, limit: int) -> tuple[Config, Ledger]:
    """Return the first plan that fits: as few blocks computed again as possible, then all of them and MLPs by tiles.

    Args:
        config: the user's options, of which `memory_budget` and `tile` may be changed.
        predict: the ledger of a plan, and how many blocks the model has.
        limit: bytes that a step may hold.

    Raises:
        ConfigError: no plan fits.
    """
    first, num_blocks = predict(config)
    if first.peak <= limit:
        return config, first
    least = first
    if num_blocks and config.memory_budget > 0:
        all_again = replace(config, memory_budget=0.0)
        least, _ = predict(all_again)
        if least.peak <= limit:
            return fewest_blocks(config, predict, limit, num_blocks, (first, least))
        config = all_again
    if not config.tile:
        tiled = replace(config, tile=TILE)
        by_tiles, _ = predict(tiled)
        if by_tiles.peak <= limit:
            return tiled, by_tiles
        least = min(least, by_tiles, key=lambda ledger: ledger.peak)
    largest = max(least.phases, key=lambda phase: phase.total)
    most = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in sorted(largest.held.items(), key=lambda x: -x[1])[:3])
    raise ConfigError(
        f"memory='fit': a step needs {least.peak / GIB:.1f} GiB on a rank with all that can be computed again in backward, and "
        f"there are {limit / GIB:.1f} GiB. It is most in {largest.name} (GiB: {most}).\n\n{REMEDY}"
    )


def fewest_blocks(
    config: Config, predict: Predict, limit: int, num_blocks: int, known: tuple[Ledger, Ledger]
) -> tuple[Config, Ledger]:
    """Return the plan that computes the fewest blocks again; `known` are the ledgers of none and of all."""
    before, after = math.floor((1 - config.memory_budget) * num_blocks + 1e-9), num_blocks
    peak = known[0].peak
    plan, found = replace(config, memory_budget=0.0), known[1]
    # Each block saves about as much as the next: the first guess is right or nearly so.
    while after - before > 1:
        saved = (peak - found.peak) / (after - before)
        guess = before + math.ceil((peak - limit) / max(saved, 1.0))
        guess = min(max(guess, before + 1), after - 1)
        tried = replace(config, memory_budget=1 - guess / num_blocks)
        ledger, _ = predict(tried)
        if ledger.peak <= limit:
            after, plan, found = guess, tried, ledger
        else:
            before, peak = guess, ledger.peak
    return plan, found
