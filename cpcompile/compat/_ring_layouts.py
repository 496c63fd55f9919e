"""Which tokens each rank holds, for the layouts of ring_flash_attn. 8 tokens on 2 ranks:

ring, llama3   rank 0: 0 1 2 3   rank 1: 4 5 6 7
zigzag         rank 0: 0 1 6 7   rank 1: 2 3 4 5
stripe         rank 0: 0 2 4 6   rank 1: 1 3 5 7
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cpcompile.balance.token_spans import Span, Spans, Starts
from cpcompile.errors import InputError
from cpcompile.runtime.transport import process_group
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor


def contiguous(size: int, num_ranks: int) -> tuple[Spans, ...]:
    """Return the spans of ranks with `size` tokens each, one after the other."""
    return _of_documents([size], num_ranks, is_zig_zag=False)


def zig_zag(size: int, num_ranks: int) -> tuple[Spans, ...]:
    """Return the spans of ranks with `size` tokens each: the sequence is cut into two chunks a rank, rank r has r and -1 - r.

    With an odd size, chunks are one token longer than the one before them, or one shorter, in turn.
    """
    return _of_documents([size], num_ranks, is_zig_zag=True)


def documents(
    cu_seqlens: Tensor, num_tokens: int, num_ranks: int, is_zig_zag: bool
) -> tuple[tuple[Spans, ...], Starts]:
    """Return the spans of the ranks, and where documents begin, for documents that are each split over all ranks.

    Args:
        cu_seqlens: `[documents + 1]`: where the parts of the documents that a rank holds begin, and their end, on all ranks.
        num_tokens: of a rank.
        num_ranks: that share the documents.
        is_zig_zag: each rank has two chunks of each document, not one.
    """
    ends = [int(end) for end in cu_seqlens.tolist()]
    sizes = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or min(sizes, default=-1) < 0 or ends[-1] != num_tokens:
        raise InputError(
            f"cu_seqlens {_shown(ends)} does not cover the {num_tokens} tokens of this rank: it begins with 0, does not fall, "
            f"and ends with {num_tokens}. Pass where the local parts of the documents begin."
        )
    odd = [size for size in sizes if size % 2]
    if is_zig_zag and odd:
        raise InputError(
            f"the local part of a document has {odd[0]} tokens, in cu_seqlens {_shown(ends)}: two chunks of one length need "
            f"an even number. Pad documents to a multiple of {2 * num_ranks} tokens."
        )
    starts = tuple(num_ranks * start for start, size in zip(ends, sizes, strict=False) if size)
    return _of_documents(sizes, num_ranks, is_zig_zag), starts


def _of_documents(sizes: list[int], num_ranks: int, is_zig_zag: bool) -> tuple[Spans, ...]:
    found: list[list[Span]] = [[] for _ in range(num_ranks)]
    slot = 0
    for size in sizes:
        for rank, spans in enumerate(found):
            chunks = (rank, 2 * num_ranks - 1 - rank) if is_zig_zag else (rank,)
            at, within = num_ranks * slot, slot
            for chunk in chunks:
                start, end = (i * size // len(chunks) for i in (chunk, chunk + 1))
                if start < end:
                    spans.append(Span(within, at + start, end - start))
                within += end - start
        slot += size
    return tuple(map(tuple, found))


_known_starts = WeakTensorKeyDictionary()


def starts_of_all(cu_seqlens_q: Tensor, local_k_slice: slice, num_tokens: int, ring: Ring) -> Starts:
    """Return where documents begin in the tokens of all ranks, each of which knows those that its own tokens are in.

    The ranks tell each other once for each `cu_seqlens_q`, a byte a token, and their hosts wait; all of them ask with the same
    tensor again, or with another one.
    """
    version = 0 if cu_seqlens_q.is_inference() else cu_seqlens_q._version
    key = (version, local_k_slice.start, num_tokens, ring)
    known: dict[object, Starts] = _known_starts.get(cu_seqlens_q, {})  # type: ignore[no-untyped-call]
    if key not in known:
        # Earlier versions of the tensor will not come back.
        known = {key: _gathered_starts(cu_seqlens_q, local_k_slice, num_tokens, ring)}
        _known_starts[cu_seqlens_q] = known
    return known[key]


def _gathered_starts(cu_seqlens_q: Tensor, local_k_slice: slice, num_tokens: int, ring: Ring) -> Starts:
    ends = [int(end) for end in cu_seqlens_q.tolist()]
    first = ring.rank * num_tokens
    if ends[0] != 0 or ends[-1] != num_tokens or sorted(ends) != ends or not 0 <= local_k_slice.start <= first:
        raise InputError(
            f"cu_seqlens_q {_shown(ends)} and local_k_slice {local_k_slice} are not those of rank {ring.rank} of {ring.size} "
            f"with {num_tokens} tokens: pass what llama3_flash_attn_prepare_cu_seqlens returns for this rank."
        )
    begins = torch.zeros(num_tokens, dtype=torch.uint8, device=cu_seqlens_q.device)
    begins[[end for end in ends[1:-1] if end < num_tokens]] = 1
    if local_k_slice.start == first:
        begins[0] = 1
    stacked = process_group.all_gather(begins, ring.size, ring.group)
    return tuple(stacked.flatten().nonzero().flatten().tolist())


def _shown(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:7]))}, ..., {ends[-1]}]"
