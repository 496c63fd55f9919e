"""State: what a checkpoint holds of a run, gathered from the ranks and given back to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from cpcompile.errors import InputError
from cpcompile.train.checkpoint import Checkpoint


def to_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, random: list[list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return everything that steps change, by name; `random` has the generators of each rank."""
    names = [name for name, _ in model.named_parameters()]
    found = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{key}.{names[index]}": tensor for key, tensor in entries.items()}
    for rank, states in enumerate(random):
        found |= {f"random.{rank}.{index}": state for index, state in enumerate(states)}
    return found


def from_tensors(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `to_tensors` found. Raises `InputError` when the names are not those of the model."""
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    odd = sorted(set(weights) ^ set(model.state_dict()))
    if odd:
        raise InputError(f"the checkpoint is of another model: {', '.join(odd[:3])} is in one of them only.")
    indices = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            _, key, name = full_name.split(".", 2)
            entries.setdefault(indices[name], {})[key] = tensor
    model.load_state_dict(weights)
    # The groups hold what the options say, and they are those of the saved run.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def share_checkpoint(loaded: Checkpoint | None) -> Checkpoint:
    """Give rank 0's checkpoint to all ranks: one copy is read and checked, so no two ranks go on from different ones."""
    heads: list[Any] = [None]
    if loaded is not None:
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.tensors.items()}
        heads = [(loaded.step, loaded.path, loaded.record, loaded.damaged, kinds)]
    dist.broadcast_object_list(heads, src=0)
    step, path, record, damaged, kinds = heads[0]
    tensors = (
        {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        if loaded is None
        else loaded.tensors
    )
    for name in kinds:
        if tensors[name].numel():
            # As bytes: not every backend knows every dtype.
            dist.broadcast(tensors[name].reshape(-1).view(torch.uint8), src=0)
    return Checkpoint(step, path, tensors, record, damaged)


def random_states(tensors: Mapping[str, torch.Tensor], rank: int) -> list[torch.Tensor]:
    """Return the states of one rank's generators."""
    prefix = f"random.{rank}."
    return [tensors[name] for name in sorted(tensors) if name.startswith(prefix)]


def get_random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the state of the generators that dropout uses: the CPU's, then the GPU's."""
    gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Go on from what `get_random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
