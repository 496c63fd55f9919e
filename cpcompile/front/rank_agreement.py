"""Rank agreement: every rank of the axis must be given the same batch.

Each rank passes the whole batch; ranks whose data loaders differ would train on a sequence that nobody has.
One fingerprint of names, shapes, dtypes and values is compared in one small all-reduce; only when it differs
do the ranks say what they hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set

import torch
import torch.distributed as dist

from cpcompile.errors import InputError
from cpcompile.options.mesh import Axis

# The step and the first multiplier of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)
_SCRAMBLE = 0xBF58476D1CE4E5B9 - (1 << 64)


def value_fingerprint(x: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar on the device of `x` that depends on every element and its place."""
    flat = x.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}[flat.element_size()])
    places = torch.arange(flat.numel(), device=x.device, dtype=torch.int64)
    # Not linear in the values: a sum of products with the places is the same for 0 1 1 0 and 1 0 0 1.
    mixed = places.add_(1).mul_(_MIX).add_(flat.to(torch.int64))
    mixed = mixed.bitwise_xor_(mixed >> 30).mul_(_SCRAMBLE)
    return mixed.bitwise_xor_(mixed >> 27).sum()


def describe(name: str, x: torch.Tensor) -> str:
    """Return name, dtype and shape, which must agree before values can."""
    return f"{name}: {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def check_same_inputs(inputs: Mapping[str, torch.Tensor], axis: Axis) -> None:
    """Compare the inputs of all ranks of the axis.

    Raises:
        InputError: they differ; the message names the first input that does, and the ranks. Raised on every
            rank.
    """
    inputs = dict(sorted(inputs.items()))  # the order of keyword arguments means nothing
    if not are_same(inputs, axis):
        raise InputError(
            difference({name: (describe(name, x), int(value_fingerprint(x))) for name, x in inputs.items()}, axis)
        )


def check_same_generators(device_types: Set[str], axis: Axis) -> None:
    """Compare the states of the ranks' default generators, from which ranks draw what all must hold alike.

    Raises:
        InputError: they differ. Raised on every rank.
    """
    if not device_types:
        return
    states = {"cpu": torch.get_rng_state, "cuda": torch.cuda.get_rng_state}
    if not are_same({kind: states[kind]() for kind in sorted(device_types)}, axis):
        raise InputError(
            "the random generators of the ranks are in different states, but this model draws numbers that all ranks must "
            "draw alike (dropout with exact_dropout=True, or another random operator on values that every rank holds whole). "
            "Call torch.manual_seed with the same seed on every rank of the context-parallel axis, and draw nothing on some "
            "ranks only (shuffle data by a torch.Generator of its own), or leave exact_dropout off."
        )


def are_same(inputs: Mapping[str, torch.Tensor], axis: Axis) -> bool:
    """Tell whether the named tensors of all ranks are the same. Collective; the same answer on every rank."""
    if axis.world_size == 1:
        return True
    device = torch.device("cuda", torch.cuda.current_device()) if axis.device_type == "cuda" else torch.device("cpu")
    header = zlib.crc32(";".join(describe(name, x) for name, x in inputs.items()).encode())
    values = [value_fingerprint(x).to(device) for x in inputs.values()]
    total = torch.stack([torch.tensor(header, device=device), *values]).mul(_MIX).cumsum(0).sum()
    low_and_high = torch.stack([total, ~total])  # the minimum of ~x is that of the complement of the maximum
    dist.all_reduce(low_and_high, op=dist.ReduceOp.MIN, group=axis.process_group)
    return bool(low_and_high[0] == ~low_and_high[1])


def difference(own: Mapping[str, tuple[str, int]], axis: Axis) -> str:
    """Return the text that says which input differs, and on which ranks. Collective."""
    held: list[Mapping[str, tuple[str, int]]] = [{} for _ in range(axis.world_size)]
    dist.all_gather_object(held, own, group=axis.process_group)
    remedy = "Every rank of the context-parallel axis must be given the same whole batch: shard data over the other axes only."
    for name in sorted({name for inputs in held for name in inputs}):
        of_rank = [inputs.get(name) for inputs in held]
        if len(set(of_rank)) > 1:
            shapes = {str(entry[0]) if entry else f"{name}: not given" for entry in of_rank}
            others = [rank for rank, entry in enumerate(of_rank) if entry != of_rank[0]]
            what = "; ".join(sorted(shapes)) if len(shapes) > 1 else f"{shapes.pop()}, in its values"
            return f"the input {name!r} differs between rank 0 and rank(s) {', '.join(map(str, others))} ({what}). {remedy}"
    return f"the inputs differ between the ranks. {remedy}"
