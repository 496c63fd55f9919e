"""Parts: what most programs have beside what they are about. Widths are tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
HEADS = 4
VOCABULARY = 128


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """Return `[B, S, D]` as `[B, H, S, D / H]`."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return `[B, H, S, D]` as `[B, S, H * D]`."""
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


class Attention(nn.Module):
    """Attention of a sequence to itself, or to another one."""

    def __init__(self, causal: bool = False, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = (split_heads(part, self.heads) for part in (self.query(x), self.key(other), self.value(other)))
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)))


class MLP(nn.Module):
    """Two products with a nonlinear function between."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Block(nn.Module):
    """A transformer block with norms before its parts; `attention` is the part that a program is about."""

    def __init__(self, attention: nn.Module | None = None, causal: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.attention = attention or Attention(causal, width)
        self.mlp = MLP(width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.attention(self.norm_1(x), *args)
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """A language model of two blocks around a given attention; labels are those of the next token already."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return token_loss(self.head(self.norm(x)), labels)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of `[B, S, V]` and `[B, S]`."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
