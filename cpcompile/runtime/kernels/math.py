"""The math kernel: attention as the formula says. It takes every case and is the truth the other kernels are tested against.

B batch, H query heads, K key heads, G = H / K, S tokens, D head dim; query head h reads key head h // G.
"""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FEATURES, Kernel
from cpcompile.runtime.kernels.merge import accumulation_dtype

Tensor = torch.Tensor


def grouped(x_BHSD: Tensor, num_key_heads: int) -> Tensor:
    """Return `[B, H, ...]` as `[B, K, G, ...]` in the accumulation dtype; a broadcast head dim stays broadcast."""
    heads = x_BHSD.shape[1]
    sizes = (1, 1) if heads == 1 and num_key_heads > 1 else (num_key_heads, heads // num_key_heads)
    x = torch.unflatten(x_BHSD, 1, sizes)
    return x if x.dtype == torch.bool else x.to(accumulation_dtype(x.dtype))


def scores(q_BKGSD: Tensor, k_BKSD: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return (scores with -inf where a key is hidden, d scores / d products), the second without `scale`."""
    rows, columns, num_key_heads = q_BKGSD.shape[-2], k_BKSD.shape[-2], k_BKSD.shape[1]
    s = (q_BKGSD @ k_BKSD.unsqueeze(2).transpose(-1, -2)) * block.scale
    slope = torch.ones((), dtype=s.dtype, device=s.device)
    if block.softcap > 0:
        saturation = torch.tanh(s / block.softcap)
        s, slope = block.softcap * saturation, 1 - saturation * saturation
    bias = block.bias(rows, columns, s.device)
    if bias is not None:
        s = s + grouped(bias, num_key_heads).to(s.dtype)
    visible = block.visible(rows, columns, s.device)
    if visible is not None:
        s = s.masked_fill(~grouped(visible, num_key_heads), -torch.inf)
    return s, slope


def keep_factors(s_BKGST: Tensor, block: Block) -> Tensor | None:
    """Return what dropout multiplies the softmax weights with: 0 where dropped, else `1 / (1 - p)`; None without dropout."""
    if block.dropout is None:
        return None
    batch, num_key_heads, group, rows, columns = s_BKGST.shape
    kept = block.dropout.kept(batch, num_key_heads * group, rows, columns)
    return grouped(kept, num_key_heads).to(s_BKGST.dtype) / (1 - block.dropout.p)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return (out `[B, H, Sq, Dv]`, lse `[B, H, Sq]`); a row that sees no key gives 0 and -inf."""
    k_BKSD, v_BKSD = (x.to(accumulation_dtype(x.dtype)) for x in (k, v))
    s, _ = scores(grouped(q, k.shape[1]), k_BKSD, block)
    lse = torch.logsumexp(s, -1)
    p = torch.softmax(s, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    factors = keep_factors(s, block)
    p = p if factors is None else p * factors
    return (p @ v_BKSD.unsqueeze(2)).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of these keys, for `out` and `lse` over all keys."""
    heads = k.shape[1]
    q_, dout_, out_ = grouped(q, heads), grouped(dout, heads), grouped(out, heads)
    k_, v_ = (x.to(accumulation_dtype(x.dtype)) for x in (k, v))
    s, slope = scores(q_, k_, block)
    p = probabilities(s, torch.unflatten(lse, 1, (heads, -1)), block)
    dp = dout_ @ v_.unsqueeze(2).transpose(-1, -2)
    factors = keep_factors(s, block)
    kept_p, dp = (p, dp) if factors is None else (p * factors, dp * factors)
    dv = (kept_p.transpose(-1, -2) @ dout_).sum(2)
    ds = p * (dp - (dout_ * out_).sum(-1, keepdim=True)) * slope * block.scale
    dq = ds @ k_.unsqueeze(2)
    dk = (ds.transpose(-1, -2) @ q_).sum(2)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def probabilities(s: Tensor, lse: Tensor, block: Block) -> Tensor:
    """Return the softmax weights of masked scores among all keys; 0 where the row sees no key."""
    if block.mask is None or block.mask.dtype == torch.bool:
        return torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    # A float mask may hold finfo.min: then lse = min + log(n) rounds to min and exp(s - lse) is 1 instead of 1/n. A
    # softmax taken afresh is right, times the share of these keys, which is 1 for whole rows.
    of_block = torch.logsumexp(s, -1)
    share = torch.exp(of_block - lse.masked_fill(lse == -torch.inf, torch.inf))
    weights = torch.softmax(s, -1) * share.unsqueeze(-1)
    return weights.masked_fill((of_block == -torch.inf).unsqueeze(-1), 0.0)


# A document at a time needs less memory than the mask that keeps them apart.
KERNEL = Kernel("math", forward, backward, lambda case: "", FEATURES - {"lengths", "rectangles"})
