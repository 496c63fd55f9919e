"""Registration: transformers' attention and mask functions are replaced by ours, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.compat._axolotl_attention import substitute_attention
from cpcompile.compat._axolotl_layout import RingAttnFunc
from cpcompile.compat._axolotl_masks import substitute_mask
from cpcompile.compat._axolotl_state import Documents, State, state
from cpcompile.compat._ring_attention import eager
from cpcompile.errors import ConfigError
from cpcompile.options.mesh import axis_of

Tensor = torch.Tensor
Table = dict[str, Callable[..., Any]]

# `eager` is in no table of attention functions until it is replaced; `ring_attn` loads everywhere, as it has no "flash".
ALSO = ("eager", "ring_attn")


@dataclass(slots=True)
class _Replaced:
    """Tables of transformers that hold our functions, with what they held."""

    tables: list[tuple[Table, Table]] = field(default_factory=list)

    def replace(self) -> None:
        """Put our functions into the tables."""
        if self.tables:
            return
        try:
            from transformers import AttentionInterface, AttentionMaskInterface
        except ImportError as error:
            raise ConfigError(
                f"this replaces the attention of transformers 5, which cannot be imported ({error}): "
                "pip install 'transformers>=5'."
            ) from error
        attention, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
        names = [name for name in {*attention, *masks, *ALSO} if not name.startswith("paged|")]
        self.tables = [(table, dict(table)) for table in (attention, masks)]
        for table, function in ((attention, substitute_attention), (masks, eager(substitute_mask))):
            table.update(dict.fromkeys(names, function))

    def restore(self) -> None:
        """Put back what the tables held. Names that were registered since are kept."""
        for table, held in self.tables:
            ours = [name for name, function in table.items() if is_ours(function)]
            for name in ours:
                del table[name]
            table.update({name: function for name, function in held.items() if name in ours})
        self.tables = []


_replaced = _Replaced()


def is_ours(function: Callable[..., Any] | None) -> bool:
    """Tell whether a function of a table is one that `register_ring_attn_from_device_mesh` put there."""
    return function is substitute_attention or getattr(function, "__wrapped__", function) is substitute_mask


def get_ring_attn_group() -> dist.ProcessGroup:
    """Return the ranks that share each sequence.

    Raises:
        ConfigError: no group is registered. It is a RuntimeError too.
    """
    state.ring()
    assert state.group is not None
    return state.group


def set_ring_attn_group(ring_attn_group: dist.ProcessGroup | None) -> None:
    """Set the ranks that share each sequence; attention and `update_ring_attn_params` use them from now on."""
    state.group = ring_attn_group


def register_ring_attn_from_device_mesh(
    device_mesh: DeviceMesh,
    context_parallel_dim: str | Sequence[str],
    heads_k_stride: int | None,
    ring_attn_func: RingAttnFunc | str | None,
) -> None:
    """Let every model of transformers attend over the tokens of all ranks of a mesh dim, under each name of an implementation.

    Undone by `unregister_ring_attn`. Models are called with this rank's tokens, their positions and a causal or padding mask
    or none: `SequenceParallelContextManager` does so. Gradients are to be averaged over the ranks, as DDP and FSDP do, of a
    loss that is the mean of the ranks' losses.

    Args:
        device_mesh: the ranks.
        context_parallel_dim: the mesh dim whose ranks share each sequence; two neighbouring dims are taken as one.
        heads_k_stride: how many heads of k `VARLEN_LLAMA3` gathers at once; None: 1.
        ring_attn_func: which tokens a rank holds, and how keys travel. All keep documents apart. None: only set the group.

    Raises:
        ConfigError: no process groups, no such dim, a rank outside the mesh, or an option that is none.
    """
    if not dist.is_initialized():
        raise ConfigError("context parallelism needs process groups: call torch.distributed.init_process_group first.")
    if heads_k_stride is not None and heads_k_stride < 1:
        raise ConfigError(
            f"heads_k_stride is {heads_k_stride}: pass how many heads of k are gathered at once, or None."
        )
    known = [each.value for each in RingAttnFunc]
    if ring_attn_func is not None and ring_attn_func not in known:
        raise ConfigError(f"ring_attn_func is {ring_attn_func!r}: pass one of {', '.join(known)}, or None.")
    dims = (context_parallel_dim,) if isinstance(context_parallel_dim, str) else tuple(context_parallel_dim)
    axis = axis_of(device_mesh, dims[0] if len(dims) == 1 else dims)
    unregister_ring_attn()
    set_ring_attn_group(axis.process_group)
    if ring_attn_func is not None:
        state.function = RingAttnFunc(ring_attn_func)
        state.heads_k_stride = heads_k_stride or 1
        _replaced.replace()


def unregister_ring_attn() -> None:
    """Undo `register_ring_attn_from_device_mesh`: attention is as it was, there is no group."""
    _replaced.restore()
    blank = State()
    for name in State.__slots__:
        setattr(state, name, getattr(blank, name))


def update_ring_attn_params(position_ids: Tensor | None) -> None:
    """Set the documents of the coming forwards, on each rank alike.

    Args:
        position_ids: of the tokens of all ranks in their documents, `[batch, tokens]` or `[tokens]`, before they are padded and
            sharded: a document begins where a position is not the last one plus 1. The host reads them. None: each row is one.

    Raises:
        ConfigError: no group is registered.
        InputError: these are no positions of tokens.
    """
    get_ring_attn_group()
    state.documents = Documents.of(position_ids)
