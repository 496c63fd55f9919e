"""Packed sequences: a model that reads them, mixes of documents, and what the documents give one by one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from tests.models import VOCABULARY

# What asks `varlen_attn` for fewer heads of keys than of queries. In torch 2.11 it takes them unasked and has no such argument.
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

WIDTH, HEADS, KV_HEADS, LAYERS, IGNORED = 32, 4, 2, 2, -100

# Lengths of documents; boundaries lie on the edges of shards and off them.
MIXES: dict[str, tuple[int, ...]] = {
    "whole": (53,),
    "on_edges": (16, 16, 32),
    "off_edges": (5, 20, 1, 17),
    "single_tokens": (*(1,) * 9, 3),
    "giant": (1, 2, 60, 1, 3),
    "fifty": tuple(1 + (7 * i) % 5 for i in range(50)),
}


class PackedLM(nn.Module):
    """A decoder of packed documents: `position_ids` restart at each, and nothing casts, so that float64 agrees to 1e-12."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, 64), nn.Linear(WIDTH, WIDTH)]) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=False)
        documents = starts.cumsum(1)
        index = torch.arange(length, device=input_ids.device)
        mask = (documents[:, None, :, None] == documents[:, None, None, :]) & (index[:, None] >= index)
        x = self.embed(input_ids)
        rates = 100.0 ** (-torch.arange(4, device=x.device, dtype=x.dtype) / 4)
        angles = position_ids[:, None, :, None] * rates
        for qkv, out in self.layers:
            q, k, v = (
                part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in qkv(self.norm(x)).split([32, 16, 16], dim=-1)
            )
            q, k = (rotate(part, angles) for part in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + out(y.transpose(1, 2).flatten(2)).tanh()
        logits = self.head(self.norm(x))
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORED),
            "logits": logits,
        }


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return `x` `[B, H, S, 8]` with each pair of features turned by the angles `[B, 1, S, 4]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def packed_batch(mix: str, batch_size: int, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of the documents of a mix, in another order in each row. No label crosses from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    rows = [MIXES[mix][row:] + MIXES[mix][:row] for row in range(batch_size)]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in rows])
    ids, labels = (torch.randint(VOCABULARY, positions.shape, generator=generator) for _ in range(2))
    return {"input_ids": ids, "labels": labels.masked_fill(positions == 0, IGNORED), "position_ids": positions}


def one_by_one(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Return the loss over all labels, from each document in a call of its own."""
    total, count = 0.0, 0
    for row in range(len(inputs["input_ids"])):
        starts = (inputs["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], inputs["input_ids"].shape[1]], strict=True):
            document = {name: x[row : row + 1, start:end] for name, x in inputs.items()}
            labels = int((document["labels"][:, 1:] != IGNORED).sum())
            if labels:
                total, count = total + model(**document)["loss"] * labels, count + labels
    return total / count
