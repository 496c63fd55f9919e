"""The context in which models take whole batches and compute with this rank's part."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.compat import _axolotl_models as models_of
from cpcompile.compat._axolotl_batch import REMEDY, apply_sequence_parallelism
from cpcompile.compat._axolotl_layout import RingAttnFunc, Shards, gather, mean_over_ranks
from cpcompile.compat._axolotl_register import (
    get_ring_attn_group,
    register_ring_attn_from_device_mesh,
    unregister_ring_attn,
)
from cpcompile.compat._axolotl_state import state
from cpcompile.errors import ConfigError, InputError
from cpcompile.front.rank_agreement import check_same_inputs
from cpcompile.options.mesh import Axis

Tensor = torch.Tensor
OF_LOSS = ("shift_labels", "num_items_in_batch")


class SequenceParallelContextManager:
    """Within it, models of transformers are called with whole batches, and each rank computes with its part.

    The loss is that of the whole sequence, on every rank. Gradients are averaged over the ranks by whoever averages them over
    data parallel ranks (DDP, FSDP over all ranks of both). Attention is substituted until the context is left.

    Attributes:
        process_group, local_rank, local_world_size: of the group.
        original_seq_len, pad_len: tokens of a row, and of its padding, in the last forward.
    """

    def __init__(
        self,
        models: list[nn.Module],
        context_parallel_size: int,
        gradient_accumulation_steps: int,
        ring_attn_func: RingAttnFunc,
        heads_k_stride: int | None,
        gather_outputs: bool,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        """Register the group.

        Args:
            models: of transformers, or around one (PEFT); not yet wrapped by DDP.
            context_parallel_size: ranks that share each sequence.
            gradient_accumulation_steps: is not needed: pass `num_items_in_batch` where batches differ in labels.
            ring_attn_func: which tokens a rank holds, and how keys travel.
            heads_k_stride: how many heads of k `VARLEN_LLAMA3` gathers at once; None: 1.
            gather_outputs: return logits of the whole sequence, not of this rank's tokens. A loss of them is the same on all
                ranks.
            device_mesh: has a dim `cp`; None: the mesh of accelerate.

        Raises:
            ConfigError: no such mesh, or another number of ranks.
        """
        self.models = models
        self.context_parallel_size = context_parallel_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.ring_attn_func = ring_attn_func
        self.heads_k_stride = heads_k_stride
        self.gather_outputs = gather_outputs
        self.device_mesh = _mesh_of_accelerate() if device_mesh is None else device_mesh
        self.original_seq_len, self.pad_len = 0, 0
        self._hooked: list[_Hooked] = []
        self._register()
        self.process_group = get_ring_attn_group()
        self.local_rank = dist.get_rank(self.process_group)
        self.local_world_size = dist.get_world_size(self.process_group)
        if self.local_world_size != context_parallel_size:
            unregister_ring_attn()
            raise ConfigError(
                f"context_parallel_size is {context_parallel_size}, but the dim 'cp' of the mesh has "
                f"{self.local_world_size} ranks."
            )

    def _register(self) -> None:
        register_ring_attn_from_device_mesh(self.device_mesh, ("cp",), self.heads_k_stride, self.ring_attn_func)

    def __enter__(self) -> SequenceParallelContextManager:
        """Take over the models' arguments, losses and outputs.

        Raises:
            ConfigError: a model to which a part of the sequence is not enough.
        """
        if state.group is None or state.function is None:
            self._register()
        try:
            self._hooked = [_Hooked(model, self) for model in self.models]
        except ConfigError:
            unregister_ring_attn()
            raise
        for hooked in self._hooked:
            hooked.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave models and attention as they were."""
        for hooked in self._hooked:
            hooked.stop()
        self._hooked = []
        unregister_ring_attn()


class _Hooked:
    """A model whose batches are cut, whose loss is that of all ranks, and whose outputs are gathered."""

    def __init__(self, model: nn.Module, manager: SequenceParallelContextManager) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self.model, self.manager = model, manager
        self.inner = models_of.transformers_model(model)
        self.causal_loss, self.own_loss = ForCausalLMLoss, self.inner.loss_function
        self.had_loss = "_loss_function" in self.inner.__dict__
        self.of_loss: dict[str, Any] = {}
        self.shards: Shards | None = None
        self.num_losses, self.num_calls, self.num_kept = 0, 0, 0

    def start(self) -> None:
        """Add the hooks."""
        self.inner.loss_function = self._loss
        self.handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]

    def stop(self) -> None:
        """Remove them."""
        for handle in self.handles:
            handle.remove()
        if self.had_loss:
            self.inner.loss_function = self.own_loss
        else:
            del self.inner._loss_function

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        manager = self.manager
        names = [
            p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if len(args) > len(names):
            raise InputError(f"{len(args)} arguments without names: pass them to {type(module).__name__} by name.")
        batch = dict(zip(names, args, strict=False)) | kwargs
        self.num_kept = self._logits_to_keep(batch)
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        check_same_inputs(tensors, self._axis(tensors))
        batch, manager.original_seq_len, manager.pad_len = apply_sequence_parallelism(
            batch, manager.local_rank, manager.local_world_size, 1, manager.ring_attn_func
        )
        function = RingAttnFunc(manager.ring_attn_func)
        self.shards = Shards.of(function, manager.original_seq_len, manager.local_world_size)
        # The loss function is given these, also in models that would not hand them on.
        self.of_loss = {name: batch.pop(name) for name in OF_LOSS if name in batch}
        if "use_cache" in inspect.signature(self.inner.forward).parameters:
            batch["use_cache"] = False
        self.num_losses, self.num_calls = 0, state.num_calls
        return (), batch

    def _logits_to_keep(self, batch: dict[str, Any]) -> int:
        """Return how many of the last logits are wanted, 0: all. They are taken from those of all ranks."""
        wanted = batch.get("logits_to_keep")
        if isinstance(wanted, int) and self.manager.gather_outputs:
            del batch["logits_to_keep"]
            return wanted
        return 0

    def _axis(self, tensors: Mapping[str, Tensor]) -> Axis:
        device_type = next((x.device.type for x in tensors.values()), "cpu")
        group = self.manager.process_group.group_name
        return Axis(self.manager.local_world_size, self.manager.local_rank, group, device_type)

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean over the ranks of their losses, which is that of one device."""
        if self.own_loss is not self.causal_loss:
            name = getattr(self.own_loss, "__name__", repr(self.own_loss))
            raise InputError(f"the loss {name} is not the one for causal language models. {self._without_labels()}")
        self.num_losses += 1
        return mean_over_ranks(self.own_loss(*args, **(kwargs | self.of_loss)), state.ring())

    def _without_labels(self) -> str:
        return f"Call the model without labels in gather_outputs=True, and compute the loss of its logits. {REMEDY}"

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        calls, expected = state.num_calls - self.num_calls, models_of.num_layers(self.inner)
        name = type(self.inner).__name__
        if calls < expected:
            raise InputError(
                f"{calls} of {expected} layers of {name} attend by transformers' attention interface: the others saw this rank's "
                f"tokens only. {REMEDY}"
            )
        if not isinstance(output, dict):
            raise InputError(f"{name} returned a {type(output).__name__}: call it with return_dict=True.")
        if output.get("loss") is not None and self.num_losses != 1:
            raise InputError(f"{name} has computed its loss without its loss_function. {self._without_labels()}")
        for key, value in output.items():
            if key != "loss" and value is not None:
                output[key] = self._gathered(key, value)
        return output

    def _gathered(self, key: str, value: Any) -> Any:
        """Return an output of all ranks, or the same if outputs are not gathered."""
        shards = self.shards
        assert shards is not None
        if isinstance(value, (tuple, list)):
            return type(value)(self._gathered(key, each) for each in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != shards.num_slots:
            what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"the output {key} ({what}) does not hold this rank's {shards.num_slots} tokens. {REMEDY}")
        if not self.manager.gather_outputs:
            return value
        whole = gather(value, shards, state.ring())
        return whole[:, -self.num_kept :] if key == "logits" else whole


def _mesh_of_accelerate() -> DeviceMesh:
    """Return the mesh of accelerate's state."""
    try:
        from accelerate.state import AcceleratorState

        mesh = AcceleratorState._shared_state.get("device_mesh")
    except ImportError:
        mesh = None
    if mesh is None:
        raise ConfigError(
            "no device_mesh: pass one with a dim 'cp', or make an Accelerator(parallelism_config=ParallelismConfig(cp_size=...))."
        )
    return mesh  # type: ignore[no-any-return]
