"""The functions of ring-flash-attn 0.1.8 over this runtime: same names, signatures and layouts, without flash-attn.

    from cpcompile.compat.ring_flash_attn import zigzag_ring_flash_attn_func

    out = zigzag_ring_flash_attn_func(q, k, v, causal=True)     # [B, this rank's tokens, H, D]

Beside a function `f(q, k, v, ...)` there are its forms `f(q, kv, ...)` and `f(qkv, ...)`, with tensors stacked in dim -3. All
take any device and dtype that a kernel of the runtime takes, every group size, and H a multiple of the heads of k and v.
Gradients are exact. What the package has no or wrong results for is right here:

* Windows are counted by positions in the whole sequence, not within each block.
* Dropout is drawn by position from a seed of the group's first rank: the same weights are dropped on any number of ranks.
* `alibi_slopes` `[H]`, `deterministic`, and `causal=False` for zigzag and stripe.

With `return_attn_probs` they return (out, lse, None), lse `[B, H, tokens]` or `[H, tokens]`, without gradient. They run eagerly,
within `torch.compile` between its graphs.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from cpcompile.compat import _ring_transformers
from cpcompile.compat._ring_attention import Options, Place, attend, check, eager
from cpcompile.compat._ring_layouts import contiguous, documents, starts_of_all, zig_zag
from cpcompile.compat._ring_stripes import exchange, from_stripes
from cpcompile.errors import InputError

Tensor = torch.Tensor
Result = Tensor | tuple[Tensor, Tensor, None]
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
EVERYWHERE = (-1, -1)


@eager
def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend round the ring; rank r holds tokens [r * S, (r + 1) * S) of the sequence.

    Args:
        q: `[B, S, H, D]`, the tokens of this rank.
        k, v: `[B, S, K, D]`.
        dropout_p: probability of a weight being dropped; pass 0 in evaluation.
        softmax_scale: factor of the scores; None: `1 / sqrt(D)`.
        causal: keys after the query are hidden.
        window_size: keys at most this far before and after the query are visible; -1: all.
        alibi_slopes: `[H]`: adds `-slopes[h] * |i - j|` to the scores.
        deterministic: the same bits at each run, or an error where no kernel can.
        return_attn_probs: return (out, lse, None).
        group: the ranks that share the sequence; None: the default group.

    Raises:
        InputError: tensors or options do not fit.
        ConfigError: no process groups, or this rank is not in the group.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    ring = options.ring()
    return _batched(q, k, v, options, Place(contiguous(q.shape[1], ring.size), ring))


@eager
def zigzag_ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend round the ring; of 2P chunks of S / 2 tokens, rank r of P holds chunk r and then chunk 2P - 1 - r.

    All ranks have the same causal work. Arguments: see `ring_flash_attn_func`; S is even.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    ring = options.ring()
    if q.shape[1] % 2:
        raise InputError(
            f"this rank has {q.shape[1]} tokens: two chunks of one length need an even number. Pad the sequence to a "
            f"multiple of {2 * ring.size} tokens."
        )
    return _batched(q, k, v, options, Place(zig_zag(q.shape[1], ring.size), ring))


@eager
def stripe_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend round the ring; rank r of P holds the tokens r, r + P, r + 2P, ... of the sequence.

    The tokens go to the zig-zag layout and back: beside what `zigzag_ring_flash_attn_func` sends, each rank sends its q, k, v and
    out once in each pass, (P - 1) / P of them. That one is faster; this is for scripts whose data is in stripes.
    Arguments: see `ring_flash_attn_func`.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    ring = options.ring()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    check(q, k, v, options)
    way = from_stripes(q.shape[2], ring, q.device)
    q, k, v = exchange([q, k, v], way)
    out, lse = attend(q, k, v, options, Place(zig_zag(q.shape[2], ring.size), ring))
    (out,) = exchange([out], way.back)
    out = out.transpose(1, 2).contiguous()
    if not return_attn_probs:
        return out
    (lse,) = exchange([lse.unsqueeze(3)], way.back)
    return out, lse.squeeze(3).contiguous(), None


@eager
def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend within documents, each of which is cut into P parts of one length, rank r of P holds part r.

    Args:
        q: `[T, H, D]`: this rank's part of the first document, then that of the second, and so on.
        k, v: `[T, K, D]`.
        cu_seqlens: `[documents + 1]`: where the parts begin, and T; the same on all ranks. The host reads it: keep it on the CPU.
        max_seqlen: is not needed.

    The others: see `ring_flash_attn_func`.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _split_documents(q, k, v, cu_seqlens, options, is_zig_zag=False)


@eager
def zigzag_ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend within documents, each of which is cut into 2P chunks of one length; rank r of P holds chunks r and 2P - 1 - r.

    Arguments: see `ring_flash_attn_varlen_func`; the local part of a document, both of its chunks, has an even length.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _split_documents(q, k, v, cu_seqlens, options, is_zig_zag=True)


@eager
def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
) -> Result:
    """Attend within documents that lie one after the other; rank r holds tokens [r * T, (r + 1) * T) of all.

    Only the keys that some row sees are gathered, some heads while others are computed, and again in backward.

    Args:
        q: `[T, H, D]`.
        k, v: `[T, K, D]`.
        cu_seqlens_q, local_k_slice: what `llama3_flash_attn_prepare_cu_seqlens` returns for this rank. From them the ranks learn
            of each other's documents, once for each tensor `cu_seqlens_q`: pass the same one to all layers.
        cu_seqlens_k, max_seqlen_q, max_seqlen_k: are not needed.
        heads_k_stride: how many heads of k are gathered at once.

    The others: see `ring_flash_attn_func`.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    if heads_k_stride < 1:
        raise InputError(
            f"heads_k_stride is {heads_k_stride}: pass how many heads of k are gathered at once, 1 or more."
        )
    ring = options.ring()
    starts = starts_of_all(cu_seqlens_q, local_k_slice, q.shape[0], ring)
    return _packed(q, k, v, options, Place(contiguous(q.shape[0], ring.size), ring, starts, heads_k_stride))


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """Return (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice) of a rank.

    Args:
        cu_seqlens: `[documents + 1]`: where documents begin in the tokens of all ranks, and the end.
        causal: keys after the rank's last query are left out.
        rank, world_size: of the group.

    Raises:
        InputError: the tokens cannot be cut into equal parts.
    """
    ends = [int(end) for end in cu_seqlens.tolist()]
    if ends[-1] % world_size:
        raise InputError(
            f"{ends[-1]} tokens cannot be cut into {world_size} equal parts: pad the last document to "
            f"{-(-ends[-1] // world_size) * world_size} tokens in all."
        )
    size = ends[-1] // world_size
    start, stop = rank * size, (rank + 1) * size
    left, right = bisect_left(ends, start), bisect_left(ends, stop)
    left -= ends[left] != start
    of_rank = ends[left : right + 1]
    ends_q = [min(max(end - start, 0), size) for end in of_rank]
    ends_k = [(min(end, stop) if causal else end) - of_rank[0] for end in of_rank]
    longest = [max(b - a for a, b in pairwise(x)) for x in (ends_q, ends_k)]
    found_q, found_k = (torch.tensor(x, dtype=cu_seqlens.dtype, device=cu_seqlens.device) for x in (ends_q, ends_k))
    return found_q, found_k, longest[0], longest[1], slice(of_rank[0], of_rank[0] + ends_k[-1])


def substitute_hf_flash_attn(process_group: ProcessGroup, heads_k_stride: int) -> None:
    """Let transformers' models attend by `llama3_flash_attn_varlen_func`, for `attn_implementation` `flash_attention_2`.

    The same is registered as `ring_attn`, which models load with where flash-attn is not installed. Each rank calls the
    model with its tokens and their positions in the documents, one row without padding, after `update_ring_flash_attn_params`.
    What it computes over tokens beside attention, the loss included, is the script's to sum. `cpcompile.apply` does all of that.
    """
    _ring_transformers.substitute(process_group, heads_k_stride)


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: ProcessGroup) -> None:
    """Set where documents begin in the tokens of all ranks, `[documents + 1]`, before each call of the model."""
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    cu_seqlens_q, *_, local_k_slice = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, world_size)
    _ring_transformers.current[process_group.group_name] = _ring_transformers.Documents(cu_seqlens_q, local_k_slice)


def _batched(q: Tensor, k: Tensor, v: Tensor, options: Options, place: Place) -> Result:
    """Attend with `[B, S, heads, D]`."""
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), options, place)
    out = out.transpose(1, 2)
    return (out, lse, None) if options.return_attn_probs else out


def _packed(q: Tensor, k: Tensor, v: Tensor, options: Options, place: Place) -> Result:
    """Attend with `[T, heads, D]`."""
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, options, place)
    out = out.transpose(1, 2).squeeze(0)
    return (out, lse.squeeze(0), None) if options.return_attn_probs else out


def _split_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options, is_zig_zag: bool) -> Result:
    ring = options.ring()
    spans, starts = documents(cu_seqlens, q.shape[0], ring.size, is_zig_zag)
    return _packed(q, k, v, options, Place(spans, ring, starts))


def _kvpacked(
    function: Callable[Concatenate[Tensor, Tensor, Tensor, Arguments], Returned],
) -> Callable[Concatenate[Tensor, Tensor, Arguments], Returned]:
    """Return the form that takes (q, kv)."""

    def packed(q: Tensor, kv: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        k, v = kv.unbind(-3)
        return function(q, k, v, *args, **kwargs)

    form: Callable[Concatenate[Tensor, Tensor, Arguments], Returned] = _named(packed, function, "kvpacked", 2)
    return form


def _qkvpacked(
    function: Callable[Concatenate[Tensor, Tensor, Tensor, Arguments], Returned],
) -> Callable[Concatenate[Tensor, Arguments], Returned]:
    """Return the form that takes qkv."""

    def packed(qkv: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        q, k, v = qkv.unbind(-3)
        return function(q, k, v, *args, **kwargs)

    form: Callable[Concatenate[Tensor, Arguments], Returned] = _named(packed, function, "qkvpacked", 1)
    return form


def _named(packed: Any, function: Callable[..., object], form: str, num_tensors: int) -> Any:
    """Give a packed form its name, signature and docstring."""
    own, others = (list(inspect.signature(x).parameters.values()) for x in (packed, function))
    name = function.__name__.removesuffix("func") + f"{form}_func"
    packed.__name__ = packed.__qualname__ = name
    packed.__doc__ = f"`{function.__name__}` with {' and '.join(p.name for p in own[:num_tensors])} stacked in dim -3."
    packed.__signature__ = inspect.Signature(own[:num_tensors] + others[3:])
    return packed


ring_flash_attn_kvpacked_func = _kvpacked(ring_flash_attn_func)
ring_flash_attn_qkvpacked_func = _qkvpacked(ring_flash_attn_func)
zigzag_ring_flash_attn_kvpacked_func = _kvpacked(zigzag_ring_flash_attn_func)
zigzag_ring_flash_attn_qkvpacked_func = _qkvpacked(zigzag_ring_flash_attn_func)
stripe_flash_attn_kvpacked_func = _kvpacked(stripe_flash_attn_func)
stripe_flash_attn_qkvpacked_func = _qkvpacked(stripe_flash_attn_func)
ring_flash_attn_varlen_kvpacked_func = _kvpacked(ring_flash_attn_varlen_func)
ring_flash_attn_varlen_qkvpacked_func = _qkvpacked(ring_flash_attn_varlen_func)
zigzag_ring_flash_attn_varlen_kvpacked_func = _kvpacked(zigzag_ring_flash_attn_varlen_func)
zigzag_ring_flash_attn_varlen_qkvpacked_func = _qkvpacked(zigzag_ring_flash_attn_varlen_func)
llama3_flash_attn_varlen_kvpacked_func = _kvpacked(llama3_flash_attn_varlen_func)
llama3_flash_attn_varlen_qkvpacked_func = _qkvpacked(llama3_flash_attn_varlen_func)
