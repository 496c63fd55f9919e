"""The kernels that torch ships, brought to the block signature: FlashAttention on CPU and CUDA, cuDNN, memory-efficient."""

from __future__ import annotations

import torch

aten = torch.ops.aten
_EFFICIENT_ALIGNMENT = 16  # elements; the kernel reads rows of the bias in vectors


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a bool mask as one that is added to the scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _without_empty_rows(lse: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Set lse to -inf where the mask hides every key: the kernels return finite numbers there."""
    return lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)


def _safe(lse: torch.Tensor) -> torch.Tensor:
    """Return lse with +inf for rows without a key, so that exp(score - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def cpu_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    return out, _without_empty_rows(lse, mask)


def cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, _safe(lse), 0.0, is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    return out, lse


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Dense attention without dropout reads neither cumulative lengths nor random state. lse is read as if it were contiguous.
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        is_causal,
        unused,
        unused,
        scale=scale,
    )


def cudnn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    return out, lse.view(q.shape[:3])


def cudnn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse = lse.contiguous().unsqueeze(-1)
    sizes = (None, None, q.shape[2], k.shape[2])
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, lse, unused, unused, None, *sizes, 0.0, is_causal, scale=scale
    )


def _efficient_bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return the mask as an expanded bias whose rows start at aligned addresses."""
    if mask is None:
        return None
    columns = k.shape[2]
    aligned = -(-columns // _EFFICIENT_ALIGNMENT) * _EFFICIENT_ALIGNMENT
    bias = q.new_zeros(*mask.shape[:-1], aligned)[..., :columns]
    return bias.masked_fill_(~mask, -torch.inf).expand(q.shape[0], q.shape[1], q.shape[2], columns)


def _repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def efficient_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[1]
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q,
        _repeat_heads(k, group),
        _repeat_heads(v, group),
        _efficient_bias(mask, q, k),
        True,
        0.0,
        is_causal,
        scale=scale,
    )
    empty_out = out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return empty_out, _without_empty_rows(lse[..., : q.shape[2]], mask)


def _sequence_major(x: torch.Tensor) -> torch.Tensor:
    """Return `[B, H, S, D]` over contiguous `[B, S, H, D]` memory: in half precision the kernel reads out by fixed strides."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def efficient_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group, rows = q.shape[1] // k.shape[1], q.shape[2]
    # The kernel reads lse in tiles of 32 rows; +inf makes the rows that do not exist weigh nothing.
    padded = torch.nn.functional.pad(_safe(lse), (0, -rows % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        _sequence_major(dout),
        q,
        _repeat_heads(k, group),
        _repeat_heads(v, group),
        _efficient_bias(mask, q, k),
        _sequence_major(out),
        padded,
        unused,
        unused,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv
