"""Pairs of tokens: the rows of a pair stay on their rank, hidden states are gathered for the columns, and pairs are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.ir.placement import Sharded
from tests.graph.rule_checker import Case, Setting, check_push

WIDTH = 8
Function = Callable[["Paired", Tensor], Tensor]
aten = torch.ops.aten


class Paired(nn.Module):
    """Computes a number of pairs of hidden states."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out, self.norm = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 4), nn.LayerNorm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def pairs(self, x: Tensor) -> Tensor:
        return self.left(x)[:, :, None] + self.right(x)[:, None]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.function(self, self.embedding(input_ids).tanh()).pow(2).sum()


def sums(m: Paired, x: Tensor) -> Tensor:
    return m.out(m.pairs(x).tanh())


def columns_first(m: Paired, x: Tensor) -> Tensor:
    return m.out((m.left(x)[:, None] * m.right(x)[:, :, None]).tanh())


def symmetric(m: Paired, x: Tensor) -> Tensor:
    """Columns become rows where they meet rows."""
    pairs = m.out(m.pairs(x).tanh())
    return (pairs + pairs.transpose(1, 2)).softmax(2)


def average_product(m: Paired, x: Tensor) -> Tensor:
    """The correction of contact maps."""
    pairs = m.out(m.pairs(x)).sigmoid()
    both = pairs.sum(1, keepdim=True) * pairs.sum(2, keepdim=True)
    return pairs - both / pairs.sum((1, 2), keepdim=True)


def distances(m: Paired, x: Tensor) -> Tensor:
    """By hand, by a product, and by an operator of its own."""
    squares = x.pow(2).sum(-1)
    by_product = squares[:, :, None] + squares[:, None] - 2 * x @ x.mT
    return by_product + (x[:, :, None] - x[:, None]).norm(dim=-1) * torch.cdist(x, m.left(x))


def triangle_of_rows(m: Paired, x: Tensor) -> Tensor:
    pairs = m.norm(m.pairs(x))
    return m.out(m.norm(torch.einsum("bikc,bjkc->bijc", m.left(pairs).sigmoid(), m.right(pairs))) + pairs)


def triangle_of_columns(m: Paired, x: Tensor) -> Tensor:
    pairs = m.norm(m.pairs(x))
    return m.out(m.norm(torch.einsum("bkic,bkjc->bijc", m.left(pairs).sigmoid(), m.right(pairs))) + pairs)


def row_attention(m: Paired, x: Tensor) -> Tensor:
    pairs = m.pairs(x)
    mask = (x.sum(-1) > 0)[:, None, None] | (x.sum(-1) > 0)[:, :, None, None]
    return m.out(F.scaled_dot_product_attention(m.left(pairs), m.right(pairs), pairs, attn_mask=mask) + pairs)


def column_attention(m: Paired, x: Tensor) -> Tensor:
    pairs = m.pairs(x).tanh()
    turned = pairs.transpose(1, 2)
    q, k = m.left(turned), m.right(turned)
    return m.out(F.scaled_dot_product_attention(q, k, turned).transpose(1, 2) + pairs)


def bias_of_attention(m: Paired, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=m.out(m.pairs(x).tanh()).permute(0, 3, 1, 2))


def outer_product(m: Paired, x: Tensor) -> Tensor:
    product = torch.einsum("bic,bjd->bijcd", m.left(x)[..., :2], m.right(x)[..., :4])
    return m.out(product.flatten(3)).mean((1, 2))


def joined(m: Paired, x: Tensor) -> Tensor:
    tokens = x.shape[1]
    return torch.cat([x[:, :, None].expand(-1, -1, tokens, -1), x[:, None].expand(-1, tokens, -1, -1)], -1)


def relative_positions(m: Paired, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1], device=x.device)
    return m.out(m.embedding((at[:, None] - at).clamp(-3, 3) + 3) + m.pairs(x))


def masked_by_columns(m: Paired, x: Tensor) -> Tensor:
    """The mask of each row is made of columns."""
    pairs, seen = m.pairs(x), torch.cdist(x, x).detach().transpose(1, 2) < 2
    return F.scaled_dot_product_attention(x[:, None], m.left(x)[:, None], x[:, None], attn_mask=seen[:, None]) + pairs


def distogram(m: Paired, x: Tensor) -> Tensor:
    pairs = m.out(m.pairs(x).tanh())
    bins = ((x[:, :, None] - x[:, None]).pow(2).sum(-1) > 0.5).long()
    return F.cross_entropy((pairs + pairs.transpose(1, 2)).permute(0, 3, 1, 2), bins)


FUNCTIONS = [
    sums,
    columns_first,
    symmetric,
    average_product,
    distances,
    triangle_of_rows,
    triangle_of_columns,
    row_attention,
    column_attention,
    bias_of_attention,
    outer_product,
    joined,
    relative_positions,
    masked_by_columns,
    distogram,
]
SETTINGS = [(2, "zig_zag", 9, True), (3, "contiguous", 8, False), (4, "zig_zag", 11, True)]


def ids(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(16, (2, length), generator=torch.Generator().manual_seed(length))}


@pytest.mark.parametrize(("function", "at"), [(f, i % 3) for i, f in enumerate(FUNCTIONS)])
def test_exact(function: Function, at: int) -> None:
    world_size, layout, length, dynamic = SETTINGS[at]
    model = Paired(function).double()
    options = {"world_size": world_size, "balancer": layout, "dynamic": dynamic}
    cpcompile.verify(model, ids(length), dtype=torch.float64, tolerance=1e-11, **options).raise_if_wrong()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_pair_is_gathered(function: Function) -> None:
    plan = cpcompile.explain(Paired(function).double(), ids(19), world_size=2)
    assert all(value.shape.count(19) == 1 for value in plan.gathered)


SETTING = Setting(6, 4, "zig_zag")


@pytest.mark.parametrize(
    ("target", "args", "sharded"),
    [
        (aten.mul.Tensor, ((6, 1, 3), (1, 6, 3)), {"self": 0, "other": 1}),
        (aten.mul.Tensor, ((2, 6), (6, 1, 1)), {"self": 1, "other": 0}),
        (aten.where.self, ((6, 1), (1, 6), (6, 6)), {"condition": 0, "self": 1, "other": 0}),
        (aten.where.self, ((6, 1), (1, 6), (6, 6)), {"condition": 0, "self": 1, "other": 1}),
        (aten.add.Tensor, ((6, 6, 2), (6, 6, 2)), {"self": 0, "other": 1}),
        (aten.add.Tensor, ((6, 6, 2), (6, 6, 1)), {"self": 1, "other": 0}),
        (aten.matmul.default, ((2, 6, 6), (2, 6, 6)), {"self": 1, "other": 2}),
        (aten.cdist.default, ((2, 6, 3), (6, 3)), {"x1": 1, "x2": 0}),
    ],
)
def test_rules_of_operands_along_different_dims(
    target: torch._ops.OpOverload, args: tuple[tuple[int, ...], ...], sharded: dict[str, int]
) -> None:
    given = [torch.rand(shape, dtype=torch.float64) for shape in args]
    if target is aten.where.self:
        given[0] = given[0] > 0.5
    case = Case(target, tuple(given))
    assert check_push(case, SETTING, {name: Sharded(dim) for name, dim in sharded.items()})


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x[:, :, None] * x.sum(-1)[:, None, :, None],
        lambda m, x: x.sum(-1)[:, :, None, None] * x[:, None],
    ],
)
def test_what_has_fewer_bytes_is_gathered(function: Function) -> None:
    """Of rows with channels and columns without, the columns travel, whichever comes first."""
    (value,) = cpcompile.explain(Paired(function).double(), ids(19), world_size=2).gathered
    assert value.nbytes == 2 * 19 * 8
