"""Rows that a mask picks, as experts in a loop have them: each rank picks those of its own tokens, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.errors import NoRule
from cpcompile.rules.refusals import DECLARE

WIDTH, EXPERTS, TOP = 8, 3, 2
Function = Callable[["Mixture", Tensor], Tensor]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Mixture(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.router, self.out = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])
        self.function = function

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(rows).softmax(-1).topk(TOP, -1)
        return weights, chosen

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).tanh()
        return self.out(x + self.function(self, x).view(x.shape)).pow(2).sum()


def where_of_routes(m: Mixture, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    weights, chosen = m.route(rows)
    out = torch.zeros_like(rows)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(chosen == i)
        out[token] += weights[token, nth, None] * expert(rows[token])
    return out


def mixtral(m: Mixture, x: Tensor) -> Tensor:
    rows = x.view(-1, WIDTH)
    weights, chosen = m.route(rows)
    out = torch.zeros_like(rows)
    mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for i, expert in enumerate(m.experts):
        nth, token = torch.where(mask[i])
        found = expert(rows[None, token].reshape(-1, WIDTH)) * weights[token, nth, None]
        out.index_add_(0, token, found)
    return out


def nonzero_of_rows(m: Mixture, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    weights, chosen = m.route(rows)
    out = torch.zeros_like(rows)
    for i, expert in enumerate(m.experts):
        token = (chosen == i).any(-1).nonzero().squeeze(-1)
        weight = ((chosen == i) * weights).sum(-1)
        out[token] += expert(rows.index_select(0, token)) * weight[token, None]
    return out


def scattered(m: Mixture, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    weights, chosen = m.route(rows)
    out = torch.zeros_like(rows)
    for i, expert in enumerate(m.experts):
        token, nth = (chosen == i).nonzero().unbind(1)
        found = weights[token, nth, None] * expert(rows[token])
        out = out.scatter_add(0, token[:, None].expand_as(found), found)
    return out


def of_rows_and_tokens(m: Mixture, x: Tensor) -> Tensor:
    """The mask has a dim of the batch; a table of the second place; the same row at each place of what no expert takes."""
    chosen = m.router(x).argmax(-1)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts[1:], 1):
        row, token = torch.where(chosen == i)
        out[row, token] = expert(x[row, token]) * m.router.bias[row, None]
    out[torch.where(chosen == 0)] = 0.5
    return out


def mask_with_a_gate(m: Mixture, x: Tensor) -> Tensor:
    weights, chosen = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out[chosen == i] = weights[chosen == i].unsqueeze(-1) * expert(x[chosen == i])
    return out


def mask_of_repeated_rows(m: Mixture, x: Tensor) -> Tensor:
    """DeepSeek's: each token once for each of its experts."""
    rows = x.view(-1, WIDTH)
    weights, chosen = m.route(rows)
    flat, repeated = chosen.view(-1), rows.repeat_interleave(TOP, dim=0)
    out = torch.empty_like(repeated)
    for i, expert in enumerate(m.experts):
        out[flat == i] = expert(repeated[flat == i])
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


FUNCTIONS = [
    where_of_routes,
    mixtral,
    nonzero_of_rows,
    scattered,
    of_rows_and_tokens,
    mask_with_a_gate,
    mask_of_repeated_rows,
]
SETTINGS = [(2, "zig_zag", 9, True), (3, "contiguous", 8, False), (4, "zig_zag", 11, True)]


def ids(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(16, (2, length), generator=torch.Generator().manual_seed(length))}


@pytest.mark.parametrize(("function", "at"), [(f, i % 3) for i, f in enumerate(FUNCTIONS)])
def test_exact(function: Function, at: int) -> None:
    world_size, layout, length, dynamic = SETTINGS[at]
    model = Mixture(function).double()
    options: dict[str, Any] = {"world_size": world_size, "balancer": layout, "dynamic": dynamic}
    found = cpcompile.verify(model, ids(length), dtype=torch.float64, tolerance=1e-12, **options)
    found.raise_if_wrong()
    assert not [node for node in found.transformed.graph.graph.nodes if "gather_tokens" in str(node.target)]


def places(m: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.flatten(0, 1)
    return rows, torch.where(m.route(rows)[1] == 0)[0]


def mixed_rows(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, rows[token] - rows[token].mean(0))


def sums_of_rows(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, rows[token].cumsum(0))


def neighbours(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, rows[token - 1])


def numbers_of_places(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, rows[token] * token[:, None])


def turned_round(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, rows[token].flip(0))


def rows_of_two_masks(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    other = torch.where(m.route(rows)[1] == 1)[0]
    return torch.zeros_like(rows).index_add(0, token, (rows[token] @ rows[other].mT) @ rows[other])


def dropped(m: Mixture, x: Tensor) -> Tensor:
    rows, token = places(m, x)
    return torch.zeros_like(rows).index_add(0, token, F.dropout(rows[token]))


REFUSED = [
    (mixed_rows, "aten.mean.dim mixes them"),
    (sums_of_rows, "aten.cumsum.default"),
    (neighbours, "aten.sub.Tensor computes with places"),
    (numbers_of_places, "aten.unsqueeze.default"),
    (turned_round, "aten.flip.default"),
    (rows_of_two_masks, "aten.matmul.default"),
    (dropped, "aten.dropout.default mixes them"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_what_is_not_computed_by_row_is_refused(function: Function, reason: str) -> None:
    with pytest.raises(NoRule) as error:
        cpcompile.explain(Mixture(function), ids(8), world_size=2)
    text = str(error.value)
    assert "the rows that it picks cannot be those of this rank's tokens" in text and "test_picked_rows.py:" in text
    assert text.endswith(DECLARE) and "@cpcompile.token_local" in text


def test_what_is_refused_is_gathered_if_not_strict() -> None:
    model = Mixture(mixed_rows).double()
    found = cpcompile.verify(model, ids(9), world_size=2, strict=False, dtype=torch.float64)
    found.raise_if_wrong()
    assert "gather_tokens" in found.transformed.graph.code


def test_a_mask_that_is_not_by_row_names_the_remedy() -> None:
    def ranked(m: Mixture, x: Tensor) -> Tensor:
        mask = m.router(x).argmax(-1) == 0
        return torch.zeros_like(x).masked_scatter(mask[..., None], x[mask].flip(0))

    with pytest.raises(NoRule, match=r"flip.default mixes them(.|\n)*@cpcompile.token_local"):
        cpcompile.explain(Mixture(ranked), ids(8), world_size=2)
