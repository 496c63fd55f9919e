"""Memory plan: what `memory='fit'` decides at the first call, alike on all ranks that compute together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from cpcompile import _torch
from cpcompile.errors import ConfigError
from cpcompile.front.rank_agreement import device_of
from cpcompile.memory.fit import GIB, Predict, fitting, wanted_bytes
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

_log = logging.getLogger("cpcompile.stages")
USABLE = 0.95  # of a GPU's memory: the rest is for buffers of NCCL and what torch's allocator cannot join
NOTHING_FITS = 1 << 40


def planned(config: Config, predict: Predict, axis: Axis, groups: Sequence[str], least: Callable[[int], int]) -> Config:
    """Return the options with which a step fits the memory of every rank. Collective.

    Args:
        config: the user's options, with `memory`.
        predict: the ledger of options, and how many blocks the model has.
        axis: the ranks that share a sequence.
        groups: names of other process groups whose ranks must decide alike: those that parameters are sharded over.
        least: of a number over the ranks of the axis.

    Raises:
        ConfigError: no plan fits, or the device has no memory of its own and none is given.
        RankFailed: another rank could not go on. Raised on every rank.
    """
    first = predict(config)
    own = wanted_bytes(config.memory) or usable_bytes(axis.device_type, first[0].resident)
    limit = smallest(own, axis, groups, least)
    error: ConfigError | None = None
    try:
        level, ledger = fitting(config, predict, first, limit)
        number = level.number
    except ConfigError as failed:
        error, number = failed, NOTHING_FITS
    # Ranks with other batches beside this one may need more.
    most = -smallest(-number, axis, groups, least)
    if error is not None:
        raise error
    if most == NOTHING_FITS:
        raise ConfigError(
            "memory='fit': no plan fits another rank that this one shares parameters with; its error says more."
        )
    adopted = level.numbered(most)
    chosen = adopted.of(config)
    if not dist.is_initialized() or dist.get_rank() == 0:
        peak = f"{ledger.peak / GIB:.3g} GiB at the peak" if most == number else "another rank needs it"
        tile = f", tile={chosen.tile}" if chosen.tile else ""
        _log.info(
            "cpcompile: memory='fit' computes %d of %d blocks again in backward%s: %s, of %.3g GiB",
            *(adopted.blocks, adopted.num_blocks, tile, peak, limit / GIB),
        )
    return chosen


def usable_bytes(device_type: str, resident: int) -> int:
    """Return what a step may hold of the current device, `resident` bytes of which may be there already.

    Raises:
        ConfigError: it is no GPU.
    """
    if device_type != "cuda":
        raise ConfigError(
            f"memory='fit' needs the size of a GPU's memory, and the mesh is of {device_type} devices: say how much there is, "
            "memory='fit:40' for 40 GiB."
        )
    free, _ = torch.cuda.mem_get_info()
    others = max(0, torch.cuda.memory_allocated() - resident)  # another model, data
    return int(USABLE * (free + torch.cuda.memory_reserved())) - others


def smallest(value: int, axis: Axis, groups: Sequence[str], least: Callable[[int], int]) -> int:
    """Return the smallest of a value over the ranks of the axis and of other groups. Collective.

    Raises:
        RankFailed: a rank of the axis has failed, and says so in the place of its value.
    """
    if axis.world_size > 1:
        value = least(value)
    found = torch.tensor(value, dtype=torch.int64, device=device_of(axis))
    # Shards, then replicas: each rank of a grid has then heard of all.
    for name in dict.fromkeys(name for name in groups if name and name not in axis.groups):
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=_torch.resolve_group(name))
    return int(found)
