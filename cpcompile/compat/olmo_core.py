"""OLMo-core's load balancers and context-parallel styles, over `cpcompile.balance`.

Names, arguments and results are those of `olmo_core.nn.attention.ring`, without ring-flash-attn. What `length_multiple` counts
is what it counts there, and differs between methods: each says it. Different on purpose:

- `llama3` by document pads to the next multiple, as its documentation says;
- a document of padding is added only where there is padding;
- `seq_dims` may be negative, and documents may be empty;
- tokens after the last boundary are dropped with a warning (`llama3` refuses them, as there).
"""

from __future__ import annotations

import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.balance import Contiguous, Llama3Bounds, Sharding, ZigZag, ZigZagByDocument

Number = int | float


class RingAttentionLoadBalancerType(str, Enum):
    """The load balancers by name."""

    zig_zag = "zig_zag"
    llama3 = "llama3"
    ulysses = "ulysses"

    def __str__(self) -> str:
        return self.value

    def build(self, cp_mesh: DeviceMesh) -> RingAttentionLoadBalancer:
        """Return the load balancer of this rank on a mesh of one dim."""
        return _BALANCERS[self](cp_rank=cp_mesh.get_local_rank(), cp_world_size=cp_mesh.size())


class RingAttentionLoadBalancer(metaclass=ABCMeta):
    """Shards inputs on their sequence dim for one rank."""

    def __init__(self, *, cp_rank: int, cp_world_size: int) -> None:
        self.cp_rank = cp_rank
        self.cp_world_size = cp_world_size

    @abstractmethod
    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """Return this rank's part of each input, each cut and padded at the end of its sequence dim.

        Raises:
            RuntimeError: padding is needed and there is no value for it, or `length_multiple` does not fit.
            ValueError: the inputs do not have one length, or there is not one dim and one value for each.
        """

    @abstractmethod
    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Return this rank's part of each input, and what its attention needs to stay within documents.

        `cu_doc_lens` is a 1-D tensor on the CPU: 0 and the end of each document.

        Raises:
            RuntimeError: as for `batch_shard`, or the boundaries do not fit.
            ValueError: as for `batch_shard`.
        """


class RingAttentionZigZagLoadBalancer(RingAttentionLoadBalancer):
    """Two chunks for each rank, one from either end of the sequence or of each document."""

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """As the base class. The *whole* length becomes a multiple of `length_multiple`, itself one of 2 x CP degree."""
        length = _length(inputs, seq_dims, pad_values)
        multiple = _whole_multiple(length_multiple, 2 * self.cp_world_size, "2 x CP degree")
        padded = _padded(length, multiple, "sequence dimension size", pad_values)
        sharding = ZigZag().shard(padded, self.cp_world_size)
        return _shards(
            inputs, seq_dims, pad_values, lambda x, d, value: self._part(_extend(x, d, padded, value), d, sharding)
        )

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """As the base class. The *local* length becomes a multiple of `length_multiple`, by one more document of padding.

        Each document is first padded to a multiple of 2 x CP degree. Returns `cu_doc_lens` and `max_doc_len` of this rank.
        """
        length = _length(inputs, seq_dims, pad_values)
        _check_boundaries(cu_doc_lens)
        _drop_rest(length, int(cu_doc_lens[-1]))
        chunks = 2 * self.cp_world_size
        bounds = cu_doc_lens.tolist()
        sizes = [_padded(end - start, chunks, "document length", pad_values) for start, end in pairwise(bounds)]
        padded = torch.tensor([0, *sizes]).cumsum(0).to(cu_doc_lens.dtype)
        sharding = ZigZagByDocument().shard(int(padded[-1]), self.cp_world_size, padded)
        local = padded // self.cp_world_size
        held = int(local[-1])
        total = held if length_multiple is None else _padded(held, length_multiple, "local length", pad_values)
        if total > held:
            local = torch.cat([local, local.new_tensor([total])])

        def part(x: Tensor, dim: int, value: Number) -> Tensor:
            pieces = (x.narrow(dim, start, end - start) for start, end in pairwise(bounds))
            whole = torch.cat([_extend(p, dim, n, value) for p, n in zip(pieces, sizes, strict=True)], dim)
            return _extend(self._part(whole, dim, sharding), dim, total, value)

        return _shards(inputs, seq_dims, pad_values, part), _document_lengths(local)

    def pad(self, x: Tensor, seq_dim: int, value: Number, length_multiple: int | None = None) -> tuple[Tensor, int]:
        """Return `x` padded to a multiple of `length_multiple`, by default 2 x CP degree, and how much was added."""
        return _pad(x, seq_dim, value, length_multiple or 2 * self.cp_world_size)

    def _part(self, x: Tensor, dim: int, sharding: Sharding) -> Tensor:
        runs = [x.narrow(dim, span.position, span.size) for span in sharding.spans(self.cp_rank)]
        return torch.cat(runs, dim)


class RingAttentionLlama3LoadBalancer(RingAttentionLoadBalancer):
    """One contiguous slice for each rank, and the slice of keys that its documents need. By document only."""

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """Refuse: this balancer is for documents.

        Raises:
            NotImplementedError: always.
        """
        del inputs, seq_dims, pad_values, length_multiple
        raise NotImplementedError(
            f"{type(self).__name__} is for attention within documents: call batch_shard_by_document() instead"
        )

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """As the base class. The *local* length becomes a multiple of `length_multiple`, by default 1.

        The padding is one more document. Returns `cu_doc_lens_q`, `cu_doc_lens_k`, `max_doc_len_q`, `max_doc_len_k` and
        `local_k_slice`, what `llama3_flash_attn_prepare_cu_seqlens` of ring-flash-attn returns for causal attention.
        """
        length = _length(inputs, seq_dims, pad_values)
        _check_boundaries(cu_doc_lens)
        total = int(cu_doc_lens[-1])
        if length != total:
            raise RuntimeError(
                f"expected inputs of size {total} on the sequence dimension, the last boundary, got {length}"
            )
        padded = _padded(total, (length_multiple or 1) * self.cp_world_size, "the last boundary", pad_values)
        size = padded // self.cp_world_size
        start = self.cp_rank * size
        bounds = Llama3Bounds.of(_with_padding(cu_doc_lens, padded), start, start + size)
        parts = _shards(
            inputs, seq_dims, pad_values, lambda x, d, value: _extend(x, d, padded, value).narrow(d, start, size)
        )
        return parts, {
            "cu_doc_lens_q": bounds.cu_seqlens_q,
            "cu_doc_lens_k": bounds.cu_seqlens_k,
            "max_doc_len_q": bounds.max_seqlen_q,
            "max_doc_len_k": bounds.max_seqlen_k,
            "local_k_slice": bounds.keys,
        }

    def pad(self, x: Tensor, seq_dim: int, padding_to_add: int, value: Number) -> tuple[Tensor, int]:
        """Return `x` with `padding_to_add` more tokens, and how much was added."""
        return _extend(x, seq_dim, x.shape[seq_dim] + padding_to_add, value), padding_to_add


class UlyssesLoadBalancer(RingAttentionLoadBalancer):
    """One contiguous slice for each rank; attention sees the whole sequence, for some of the heads."""

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """As the base class. The *whole* length becomes a multiple of `length_multiple`, itself one of the CP degree."""
        return self._shard(_length(inputs, seq_dims, pad_values), inputs, seq_dims, pad_values, length_multiple)[0]

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Number] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """As the base class. The *whole* length becomes a multiple of `length_multiple`, itself one of the CP degree.

        The padding is one more document. Returns `cu_doc_lens` and `max_doc_len` of the whole sequence.
        """
        length = _length(inputs, seq_dims, pad_values)
        _check_boundaries(cu_doc_lens)
        total = int(cu_doc_lens[-1])
        _drop_rest(length, total)
        parts, padded = self._shard(total, inputs, seq_dims, pad_values, length_multiple)
        return parts, _document_lengths(_with_padding(cu_doc_lens, padded))

    def pad(self, x: Tensor, seq_dim: int, value: Number, length_multiple: int | None = None) -> tuple[Tensor, int]:
        """Return `x` padded to a multiple of `length_multiple`, by default the CP degree, and how much was added."""
        return _pad(x, seq_dim, value, length_multiple or self.cp_world_size)

    def _shard(
        self,
        length: int,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Number] | None,
        length_multiple: int | None,
    ) -> tuple[list[Tensor], int]:
        """Return this rank's part of the first `length` tokens of each input, and the padded length."""
        multiple = _whole_multiple(length_multiple, self.cp_world_size, "CP degree")
        padded = _padded(length, multiple, "sequence dimension size", pad_values)
        (span,) = Contiguous().shard(padded, self.cp_world_size).spans(self.cp_rank)

        def part(x: Tensor, dim: int, value: Number) -> Tensor:
            return _extend(x.narrow(dim, 0, length), dim, padded, value).narrow(dim, span.position, span.size)

        return _shards(inputs, seq_dims, pad_values, part), padded


_BALANCERS: dict[RingAttentionLoadBalancerType, type[RingAttentionLoadBalancer]] = {
    RingAttentionLoadBalancerType.zig_zag: RingAttentionZigZagLoadBalancer,
    RingAttentionLoadBalancerType.llama3: RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancerType.ulysses: UlyssesLoadBalancer,
}


# Not frozen: users of OLMo-core set the fields of its configs from the command line.
@dataclass
class UlyssesContextParallelStyle:
    """Context parallelism by heads."""

    @property
    def load_balancer(self) -> RingAttentionLoadBalancerType:
        """Always `ulysses`."""
        return RingAttentionLoadBalancerType.ulysses


@dataclass
class RingContextParallelStyle:
    """Context parallelism by ring attention.

    Attributes:
        load_balancer: which rank holds which tokens.
        head_stride: how many key heads travel at once.
    """

    load_balancer: RingAttentionLoadBalancerType = RingAttentionLoadBalancerType.zig_zag
    head_stride: int = 1


def _length(inputs: Sequence[Tensor], seq_dims: Sequence[int], pad_values: Sequence[Number] | None) -> int:
    """Return the one length of the inputs."""
    if len(inputs) != len(seq_dims) or (pad_values is not None and len(pad_values) != len(inputs)):
        values = "no" if pad_values is None else len(pad_values)
        raise ValueError(f"{len(inputs)} inputs need as many seq_dims and pad_values, got {len(seq_dims)} and {values}")
    lengths = sorted({x.shape[dim] for x, dim in zip(inputs, seq_dims, strict=True)})
    if len(lengths) != 1:
        raise ValueError(f"inputs must have one length on their sequence dimension, got {lengths}")
    return lengths[0]


def _check_boundaries(cu_doc_lens: Tensor) -> None:
    if cu_doc_lens.device.type != "cpu":
        raise RuntimeError(f"expected 'cu_doc_lens' to be on CPU, got {cu_doc_lens.device}")
    if cu_doc_lens.ndim != 1:
        raise RuntimeError(f"expected 'cu_doc_lens' to be a 1D tensor, got the shape {list(cu_doc_lens.shape)}")
    if not len(cu_doc_lens) or cu_doc_lens[0] != 0:
        raise RuntimeError(f"expected 'cu_doc_lens' to start with a 0, got {cu_doc_lens[:1].tolist()}")
    if cu_doc_lens[-1] == 0 or (cu_doc_lens.diff() < 0).any():
        raise RuntimeError(f"expected 'cu_doc_lens' to ascend, got {cu_doc_lens[:8].tolist()}")


def _drop_rest(length: int, total: int) -> None:
    if total > length:
        raise RuntimeError(f"the last boundary of 'cu_doc_lens' is {total}, but the inputs have {length} tokens")
    if total < length:
        warnings.warn(
            f"{length - total} tokens after the last boundary of 'cu_doc_lens' ({total}) are dropped: "
            f"end it with {length} to keep them",
            stacklevel=3,
        )


def _whole_multiple(length_multiple: int | None, divisor: int, name: str) -> int:
    if length_multiple is None:
        return divisor
    if length_multiple % divisor:
        raise RuntimeError(f"length multiple ({length_multiple}) must be divisible by {name} ({divisor})")
    return length_multiple


def _padded(length: int, multiple: int, what: str, pad_values: Sequence[Number] | None) -> int:
    """Return the next multiple; without `pad_values` it must be `length`."""
    padded = -(-length // multiple) * multiple
    if padded != length and pad_values is None:
        raise RuntimeError(f"{what} ({length}) must be divisible by {multiple}, otherwise provide 'pad_values'")
    return padded


def _pad(x: Tensor, dim: int, value: Number, multiple: int) -> tuple[Tensor, int]:
    length = x.shape[dim]
    padded = -(-length // multiple) * multiple
    return _extend(x, dim, padded, value), padded - length


def _extend(x: Tensor, dim: int, length: int, value: Number) -> Tensor:
    """Return `x` with `value` at the end of `dim`, up to `length`."""
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim) if shape[dim] else x


def _shards(
    inputs: Sequence[Tensor],
    seq_dims: Sequence[int],
    pad_values: Sequence[Number] | None,
    part: Callable[[Tensor, int, Number], Tensor],
) -> list[Tensor]:
    """Return `part(x, dim, pad value)` of each input, contiguous."""
    values = [0] * len(inputs) if pad_values is None else pad_values  # without values nothing is padded
    return [part(x, dim, value).contiguous() for x, dim, value in zip(inputs, seq_dims, values, strict=True)]


def _with_padding(cu_doc_lens: Tensor, padded: int) -> Tensor:
    """Return the boundaries with one more document up to `padded`, if there are tokens for it."""
    return torch.cat([cu_doc_lens, cu_doc_lens.new_tensor([padded])]) if padded > cu_doc_lens[-1] else cu_doc_lens


def _document_lengths(bounds: Tensor) -> dict[str, Any]:
    return {"cu_doc_lens": bounds, "max_doc_len": int(bounds.diff().max())}
