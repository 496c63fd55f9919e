"""The math kernel: attention as the formula says. It takes every case and is the truth the other kernels are tested against.

B batch, H query heads, K key heads, G = H / K, S tokens, D head dim; query head h reads key head h // G.
"""

from __future__ import annotations

import torch

from cpcompile.runtime.merge import accumulation_dtype


def grouped(x_BHSD: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """Return `[B, H, ...]` as `[B, K, G, ...]` in the accumulation dtype; a broadcast head dim stays broadcast."""
    heads = x_BHSD.shape[1]
    sizes = (1, 1) if heads == 1 and num_key_heads > 1 else (num_key_heads, heads // num_key_heads)
    x = torch.unflatten(x_BHSD, 1, sizes)
    return x if x.dtype == torch.bool else x.to(accumulation_dtype(x.dtype))


def scores(
    q_BKGSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (masked scores, d scores / d products), the second without `scale`."""
    s = (q_BKGSD @ k_BKSD.unsqueeze(2).transpose(-1, -2)) * scale
    slope = torch.ones((), dtype=s.dtype, device=s.device)
    if softcap > 0:
        saturation = torch.tanh(s / softcap)
        s, slope = softcap * saturation, 1 - saturation * saturation
    if is_causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(), -torch.inf)
    if mask is not None:
        mask = grouped(mask, k_BKSD.shape[1])
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    return s, slope


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[B, H, Sq, Dv]`, lse `[B, H, Sq]`); a row that sees no key gives 0 and -inf."""
    k_BKSD, v_BKSD = (x.to(accumulation_dtype(x.dtype)) for x in (k, v))
    s, _ = scores(grouped(q, k.shape[1]), k_BKSD, mask, scale, is_causal, softcap)
    lse = torch.logsumexp(s, -1)
    p = torch.softmax(s, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return (p @ v_BKSD.unsqueeze(2)).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def backward(
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
    """Return (dq, dk, dv) of these keys, for `out` and `lse` over all keys."""
    heads = k.shape[1]
    q_, dout_, out_ = grouped(q, heads), grouped(dout, heads), grouped(out, heads)
    k_, v_ = (x.to(accumulation_dtype(x.dtype)) for x in (k, v))
    s, slope = scores(q_, k_, mask, scale, is_causal, softcap)
    p = probabilities(s, torch.unflatten(lse, 1, (heads, -1)), mask)
    dv = (p.transpose(-1, -2) @ dout_).sum(2)
    dp = dout_ @ v_.unsqueeze(2).transpose(-1, -2)
    ds = p * (dp - (dout_ * out_).sum(-1, keepdim=True)) * slope * scale
    dq = ds @ k_.unsqueeze(2)
    dk = (ds.transpose(-1, -2) @ q_).sum(2)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def probabilities(s: torch.Tensor, lse: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax weights of masked scores; 0 where the row sees no key."""
    if mask is not None and mask.dtype != torch.bool:
        # A float mask may hold finfo.min: then lse = min + log(n) rounds to min and exp(s - lse) is 1 instead of 1/n.
        # Float masks come with whole rows, so the softmax can be taken afresh.
        return torch.softmax(s, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
