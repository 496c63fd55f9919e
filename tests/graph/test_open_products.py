"""Einsums and baddbmm are opened into operators that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.open_products import open_products

aten = torch.ops.aten
Tensor = torch.Tensor
SIZES = {"b": 2, "h": 3, "q": 4, "k": 5, "d": 6, "g": 2, "e": 3}


def traced(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False) -> fx.GraphModule:
    mode = "symbolic" if symbolic else "fake"
    return make_fx(function, tracing_mode=mode, pre_dispatch=True)(*inputs)


def operands(*terms: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn([SIZES[x] for x in term], dtype=torch.float64, requires_grad=True) for term in terms]


def check(gm: fx.GraphModule, function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Check that all products of the graph are opened, and values and gradients are those of the function."""
    assert open_products(gm) == 1
    gm.graph.lint()
    gm.recompile()
    assert not [n for n in gm.graph.nodes if n.target in (aten.einsum.default, aten.baddbmm.default)]
    text = str(gm.graph)
    assert (open_products(gm), str(gm.graph)) == (0, text)
    outs = gm(*inputs), function(*inputs)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), inputs) for x in outs))


EQUATIONS = [
    "bhqd,bhkd->bhqk",
    "bqhd,bkhd->bhqk",
    "bkhd,bqhd->bhqk",
    "bhqk,bkhd->bqhd",
    "bkhd,bhqk->bqhd",
    "bhgqd,bhkd->bhgqk",
    "bhgqk,bhkd->bqhgd",
    "bhkd,bhgqd->bhgqk",
    "bqd,dhe->bqhe",
    "bqhe,hed->bqd",
    "bqd,kd->bqk",
    "qd,dk->kq",
    "bqd,bd->bq",
    "bd,bqd->bq",
    "bd,bd->b",
    "q,d->qd",
    "d,q->qd",
    "bq,bd->bqd",
    "bqd,bqd->bqd",
    "bqd,d->bqd",
    "qbe,qd->bed",
    "bqd,d->bq",
    "bqhe,hek->bqk",
    "bqk,bkhd->bqhd",
    "bkd,bqked->bqe",
    "bdk,bd->bk",
]


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_of_two(equation: str, symbolic: bool) -> None:
    inputs = operands(*equation.split("->")[0].split(","))
    check(
        traced(lambda a, b: torch.einsum(equation, a, b), *inputs, symbolic=symbolic),
        lambda a, b: torch.einsum(equation, a, b),
        inputs,
    )


@pytest.mark.parametrize(
    ("equation", "terms"),
    [
        ("...qd,...kd->...qk", ("bhqd", "bhkd")),
        ("... q d , ... d k -> ... q k", ("bhqd", "hdk")),
        ("...d,d->...", ("bqd", "d")),
        ("...d,dk->...k", ("bhqd", "dk")),
    ],
)
def test_ellipsis(equation: str, terms: tuple[str, str]) -> None:
    inputs = operands(*terms)
    check(traced(lambda a, b: torch.einsum(equation, a, b), *inputs), lambda a, b: torch.einsum(equation, a, b), inputs)


@pytest.mark.parametrize("equation", ["bqd->bq", "bqq->bq", "bqd,bkd,k->bqk", "bqd,kd->bq", "bqd,bkd"])
def test_other_einsums_are_left_alone(equation: str) -> None:
    inputs = operands(*equation.split("->")[0].split(","))
    gm = traced(lambda *xs: torch.einsum(equation, *xs), *inputs)
    text = str(gm.graph)
    assert (open_products(gm), str(gm.graph)) == (0, text)


def test_a_size_of_one_that_broadcasts_is_left_alone() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(1, 5, 4)
    assert open_products(traced(lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), a, b)) == 0


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, 0.25), (0.5, 2.0)])
@pytest.mark.parametrize("bias", ["bqk", "qk"])
def test_baddbmm(beta: float, alpha: float, bias: str) -> None:
    def function(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)

    inputs = operands(bias, "bqd", "bdk")
    check(traced(function, *inputs), function, inputs)


def test_baddbmm_without_its_first_operand() -> None:
    c, a, b = operands("bqk", "bqd", "bdk")
    gm = traced(lambda c, a, b: torch.baddbmm(c, a, b, beta=0), c, a, b)
    assert open_products(gm) == 1
    gm.recompile()
    torch.testing.assert_close(gm(torch.full_like(c, float("nan")), a, b), a @ b)


def test_a_product_in_another_dtype_than_its_operands() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.einsum("bqd,bkd->bqk", a, b)

    inputs = [x.detach().float() for x in operands("bqd", "bkd")]
    gm = traced(function, *inputs)
    assert open_products(gm) == 1
    products = gm.graph.find_nodes(op="call_function", target=aten.matmul.default)
    assert [node.meta["val"].dtype for node in products] == [torch.bfloat16]
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs))


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "heads first": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.5).softmax(-1), v
    ),
    "tokens first": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).mul(0.5).softmax(-1),
        v.transpose(1, 2),
    ),
    "keys first": lambda q, k, v: torch.einsum(
        "bhkd,bhqk->bhqd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).mul(0.5).softmax(-1)
    ),
    "added": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.zeros(4, 4).double(), q[0], k[0].mT, alpha=0.5).softmax(-1), v[0]
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_found_behind_products(name: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gm = traced(ATTENTIONS[name], *inputs)
    assert (open_products(gm), find_attention(gm)) == (2 if name != "added" else 1, 1)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    assert node.args[6] == 0.5
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), ATTENTIONS[name](*inputs))
