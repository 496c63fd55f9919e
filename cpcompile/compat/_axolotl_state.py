"""What axolotl's functions remember between calls: the group, how it attends, and the documents of the coming forward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpcompile.balance.token_spans import Starts
from cpcompile.compat._axolotl_layout import RingAttnFunc, Shards
from cpcompile.errors import ConfigError, InputError
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor


class NotRegisteredError(ConfigError, RuntimeError):
    """No group is registered. Axolotl raises a RuntimeError."""

    def __init__(self, *message: object) -> None:
        """Make an error with a message."""
        super().__init__(*message, page="compat.md#axolotl")


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """The sequences of a forward.

    Attributes:
        length: tokens of a row, of all ranks, without padding; None: what the ranks hold.
        starts: where documents begin, for each row of the batch or for all; None: each row is one.
    """

    length: int | None = None
    starts: tuple[Starts, ...] | None = None

    @classmethod
    def of(cls, position_ids: Tensor | None) -> Documents:
        """Return the documents of positions `[B, S]` or `[S]`: one begins where a position is not the last one plus 1."""
        if position_ids is None:
            return cls()
        if position_ids.dim() not in (1, 2) or position_ids.is_floating_point():
            raise InputError(
                f"position_ids is {position_ids.dtype} {list(position_ids.shape)}: pass the positions of the tokens of all ranks "
                "in their documents, integers [batch, tokens]."
            )
        ids = position_ids.view(-1, position_ids.shape[-1])
        jumps = torch.nn.functional.pad(ids.diff(dim=1) != 1, (1, 0), value=True).cpu()
        rows = tuple(tuple(row.nonzero().flatten().tolist()) for row in jumps)
        rows = rows[:1] if len(set(rows)) == 1 else rows
        return cls(ids.shape[1], None if rows == ((0,),) else rows)

    def rows(self, chunk: int, length: int) -> tuple[Starts, ...] | None:
        """Return where what tokens see begins: documents, cut into chunks of `chunk` tokens; 0: not cut."""
        if not chunk:
            return self.starts
        return tuple(tuple(_chunked(row, chunk, length)) for row in self.starts or ((0,),))


ONE_DOCUMENT = Documents()


def _chunked(starts: Starts, chunk: int, length: int) -> Iterable[int]:
    for start, end in zip(starts, (*starts[1:], length), strict=True):
        yield from range(start, end, chunk)


@dataclass(slots=True)
class State:
    """What is registered.

    Attributes:
        group: the ranks that share each sequence.
        function: how they attend; None: attention is as it was.
        heads_k_stride: how many heads of k are gathered at once.
        documents: of the coming forward.
        num_calls: of the attention function so far.
    """

    group: dist.ProcessGroup | None = None
    function: RingAttnFunc | None = None
    heads_k_stride: int = 1
    documents: Documents = ONE_DOCUMENT
    num_calls: int = 0

    def ring(self) -> Ring:
        """Return the ranks of the group."""
        if self.group is None:
            raise NotRegisteredError(
                "no ring attention group: call register_ring_attn_from_device_mesh(device_mesh, ...) first."
            )
        rank = dist.get_rank(self.group)
        if rank < 0:
            raise ConfigError(f"rank {dist.get_rank()} is not in the group: set the group that this rank is in.")
        return Ring(self.group.group_name, dist.get_world_size(self.group), rank)

    def shards(self, num_slots: int, documents: Documents) -> Shards:
        """Return which tokens the ranks hold, with `num_slots` each."""
        if self.function is None:
            raise NotRegisteredError("no ring_attn_func: pass one to register_ring_attn_from_device_mesh.")
        num_ranks = self.ring().size
        shards = Shards(self.function, num_slots, num_ranks, documents.length or num_ranks * num_slots)
        expected = Shards.of(self.function, shards.length, num_ranks)
        if expected != shards:
            raise InputError(
                f"attention over {num_slots} tokens on each of {num_ranks} ranks, but the sequence has {shards.length}, of "
                f"which a rank holds {expected.num_slots} ({self.function.value}, padding included): shard the batch by "
                "apply_sequence_parallelism, after update_ring_attn_params with the position_ids of the same batch. Attention "
                "over other tokens, as of images, cannot be shared by the ranks."
            )
        return shards


state = State()
