"""Masks that are computed from hidden states: each rank has the rows of its own queries."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH, HEADS = 16, 4


class Chooses(nn.Module):
    """Each query sees the keys that a score of its own lets through, and no key whose token is closed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(19, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.gate, self.index, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        chosen = self.index(x) @ x.transpose(1, 2) > 0
        is_open = self.gate(x)[..., 0] > -1
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = (chosen & causal)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out + F.scaled_dot_product_attention(q, k, v, attn_mask=is_open[:, None, None, :])
        return self.head(out.transpose(1, 2).flatten(2)).pow(2).sum()


@pytest.mark.parametrize("strategy", ["auto", "ulysses", "ring", "gather"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_exact(strategy: str, world_size: int) -> None:
    ids = torch.randint(19, (2, 13), generator=torch.Generator().manual_seed(0))
    is_other = strategy == "ulysses"
    with pytest.warns(UserWarning, match="in place of ulysses") if is_other else contextlib.nullcontext():
        found = cpcompile.verify(
            Chooses().double(), {"input_ids": ids}, world_size=world_size, dtype=torch.float64, strategy=strategy
        )
    found.raise_if_wrong()


@pytest.mark.parametrize("strategy", ["gather", "latent"])
def test_one_token_a_rank(strategy: str) -> None:
    """A rank's own row of a mask is no row that all queries share."""
    found = cpcompile.verify(
        Chooses().double(),
        {"input_ids": torch.tensor([[3, 1, 4]])},
        world_size=3,
        dtype=torch.float64,
        strategy=strategy,
    )
    found.raise_if_wrong()
