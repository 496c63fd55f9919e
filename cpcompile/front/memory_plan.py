"""Memory plan: what `memory='fit'` decides at the first call, alike on all ranks that compute together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from cpcompile import _torch
from cpcompile.errors import ConfigError
from cpcompile.memory.fit import GIB, Predict, fitting, wanted_bytes
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

_log = logging.getLogger("cpcompile.stages")
USABLE = 0.95  # of a GPU's memory: the rest is for buffers of NCCL and what torch's allocator cannot join


def planned(config: Config, predict: Predict, axis: Axis, groups: Iterable[str]) -> Config:
    """Return the options with which a step fits the memory of every rank.

    Args:
        config: the user's options, with `memory`.
        predict: the ledger of options, and how many blocks the model has.
        axis: the ranks that share a sequence.
        groups: names of other process groups whose ranks must decide alike: those that parameters are sharded over.

    Raises:
        ConfigError: no plan fits, or the device has no memory of its own and none is given.
    """
    together = [name for name in dict.fromkeys((axis.group, *groups)) if name]
    limit = smallest(wanted_bytes(config.memory) or usable_bytes(axis.device_type), together, axis)
    error, chosen = None, config
    try:
        chosen, ledger = fitting(config, predict, limit)
        fits = chosen.memory_budget
    except ConfigError as failed:
        error, fits = failed, -1.0
    # Ranks with other batches beside this one may need more.
    budget = smallest(round(fits * 1_000_000), together, axis) / 1_000_000
    if error is not None:
        raise error
    if budget < 0:
        raise ConfigError(
            "memory='fit': no plan fits another rank that this one computes together with; its error says more."
        )
    if abs(budget - chosen.memory_budget) > 1e-6:
        chosen = replace(chosen, memory_budget=budget)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        tiles = f", tile={chosen.tile}" if chosen.tile != config.tile else ""
        _log.info(
            "cpcompile: memory='fit' takes memory_budget=%.3g%s: %.1f GiB at the peak are predicted, of %.1f GiB",
            *(chosen.memory_budget, tiles, ledger.peak / GIB, limit / GIB),
        )
    return chosen


def usable_bytes(device_type: str) -> int:
    """Return what this process may hold of the current device.

    Raises:
        ConfigError: it is no GPU.
    """
    if device_type != "cuda":
        raise ConfigError(
            f"memory='fit' needs the size of a GPU's memory, and the mesh is of {device_type} devices: say how much there is, "
            "memory='fit:40' for 40 GiB."
        )
    free, _ = torch.cuda.mem_get_info()
    return int(USABLE * (free + torch.cuda.memory_reserved()))


def smallest(value: int, groups: Sequence[str], axis: Axis) -> int:
    """Return the smallest of a value over the ranks of all groups."""
    device = torch.device(axis.device_type, torch.cuda.current_device()) if axis.device_type == "cuda" else "cpu"
    found = torch.tensor(value, dtype=torch.int64, device=device)
    for name in groups:
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=_torch.resolve_group(name))
    return int(found)
