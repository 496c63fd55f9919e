"""A `flash_attn` package over the FlashAttention 2 kernels that torch bundles, for peers that need one and find none.

The functions have the signatures of flash_attn 2.8. What the package writes into given buffers is copied into them here:
0.2 to 0.3 ms a GiB, which the peers would not pay. On a CPU, the formula.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attention_reference
import torch

Tensor = torch.Tensor
aten = torch.ops.aten
NAME = "flash_attn.flash_attn_interface"


def _sides(left: int, right: int, is_causal: bool) -> dict[str, int]:
    return {"window_size_left": left, "window_size_right": 0 if is_causal else right}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu: tuple[Any, ...], scale: float, is_causal: bool, left: int, right: int
) -> Any:
    if q.is_cpu:
        return _cpu_forward(q, k, v, cu, scale, is_causal, left, right)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sides = _sides(left, right, is_causal)
    out, lse, state, _, _ = aten._flash_attention_forward(q, k, v, *cu, 0.0, is_causal, False, scale=scale, **sides)
    return out, lse, None, state


def _backward(
    dout: Tensor,
    operands: tuple[Tensor, ...],
    lse: Tensor,
    buffers: tuple[Tensor, ...],
    cu: tuple[Any, ...],
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> Tensor:
    if dout.is_cpu:
        grads = _cpu_backward(dout, *operands, lse, cu, scale, is_causal, left, right)
    else:
        dout, *operands_ = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, *operands))
        unused = torch.empty(2, dtype=torch.uint64, device=dout.device)
        grads = aten._flash_attention_backward(
            *(dout, *operands_, lse.contiguous(), *cu, 0.0, is_causal, unused, unused),
            scale=scale,
            **_sides(left, right, is_causal),
        )
    for buffer, grad in zip(buffers, grads, strict=True):
        buffer.copy_(grad)
    return lse


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (None, None, q.shape[1], k.shape[1])
    return _forward(q, k, v, cu, softmax_scale, causal, window_size_left, window_size_right)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (None, None, q.shape[1], k.shape[1])
    sides = (window_size_left, window_size_right)
    return _backward(dout, (q, k, v, out), softmax_lse, (dq, dk, dv), cu, softmax_scale, causal, *sides)


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(q, k, v, cu, softmax_scale, causal, window_size_left, window_size_right)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
    zero_tensors=False,
):
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sides = (window_size_left, window_size_right)
    return _backward(dout, (q, k, v, out), softmax_lse, (dq, dk, dv), cu, softmax_scale, causal, *sides)


def _refuse(dropout_p: float, softcap: float | None, alibi_slopes: Tensor | None) -> None:
    if dropout_p or softcap or alibi_slopes is not None:
        raise NotImplementedError("the stand-in for flash_attn has no dropout, softcap or ALiBi")


class _Attention(torch.autograd.Function):
    """Attention with the arguments that both passes share."""

    @staticmethod
    def forward(ctx, q, k, v, cu, scale, is_causal, window):
        out, lse, *_ = _forward(q, k, v, cu, scale, is_causal, *window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (cu, scale, is_causal, *window)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *operands, lse = ctx.saved_tensors
        buffers = tuple(torch.empty_like(x) for x in operands[:3])
        _backward(dout, tuple(operands), lse, buffers, *ctx.rest)
        return (*buffers, None, None, None, None)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """As in flash_attn."""
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (None, None, q.shape[1], k.shape[1])
    out, lse = _Attention.apply(q, k, v, cu, softmax_scale or q.shape[-1] ** -0.5, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """As in flash_attn."""
    _refuse(dropout_p, softcap, alibi_slopes)
    cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = _Attention.apply(q, k, v, cu, softmax_scale or q.shape[-1] ** -0.5, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def _pieces(q: Tensor, k: Tensor, cu: tuple[Any, ...]) -> list[tuple[slice, slice]]:
    """Return the rows and columns of each document."""
    if cu[0] is None:
        return [(slice(0, q.shape[0]), slice(0, k.shape[0]))]
    rows, columns = cu[0].tolist(), cu[1].tolist()
    return [
        (slice(a, b), slice(c, d)) for a, b, c, d in zip(rows[:-1], rows[1:], columns[:-1], columns[1:], strict=True)
    ]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, cu: Any, scale: float, is_causal: bool, left: int, right: int) -> Any:
    if q.dim() == 4:
        out, lse, *_ = _cpu_forward(q[0], k[0], v[0], cu, scale, is_causal, left, right)
        return out[None], lse[None], None, None
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for rows, columns in _pieces(q, k, cu):
        size = rows.stop - rows.start, columns.stop - columns.start
        seen = attention_reference.visible(*size, is_causal, left, right, q.device)
        out[rows], lse[:, rows] = attention_reference.forward(q[rows], k[columns], v[columns], scale, seen)
    return out.to(dtype), lse, None, None


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Any,
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> Any:
    if q.dim() == 4:
        grads = _cpu_backward(*(x[0] for x in (dout, q, k, v, out, lse)), cu, scale, is_causal, left, right)
        return [x[None] for x in grads]
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, columns in _pieces(q, k, cu):
        size = rows.stop - rows.start, columns.stop - columns.start
        seen = attention_reference.visible(*size, is_causal, left, right, q.device)
        parts = attention_reference.backward(
            dout[rows], q[rows], k[columns], v[columns], out[rows], lse[:, rows], scale, seen
        )
        for grad, at, part in zip(grads, (rows, columns, columns), parts, strict=True):
            grad[at] = part
    return grads


def version() -> str:
    """Return the version of flash_attn, or what stands in for it."""
    try:
        return importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return f"torch {torch.__version__} in its place"


@contextmanager
def installed() -> Iterator[None]:
    """Make `flash_attn` importable inside, and only there: other systems look for the package too."""
    if importlib.util.find_spec("flash_attn"):
        yield
        return
    package, interface = types.ModuleType("flash_attn"), types.ModuleType(NAME)
    functions = [
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
        flash_attn_func,
        flash_attn_varlen_func,
    ]
    for function in functions:
        function.__module__ = NAME  # ringmaster looks the module up by it
        setattr(interface, function.__name__, function)
        setattr(package, function.__name__, function)
    package.__path__ = []
    package.flash_attn_interface = interface
    package.__version__ = "2.8.3"
    for module in (package, interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        for module in (package, interface):
            del sys.modules[module.__name__]
