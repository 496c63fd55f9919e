"""Functions with a backward of their own: ranks compute what one device computes, forward and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import cpcompile
from cpcompile import CPError
from tests.graph.small_models import TinyLM, batch

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
cp = torch.ops.cpcompile


class Gelu(Function):
    """Pointwise; saves its operand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        tanh = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return (0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)) * grad


class Norm(Function):
    """A norm with a weight, whose gradient is a sum over the tokens; takes numbers, and keeps a tensor on the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float, eps: float) -> Tensor:  # type: ignore[override]
        ctx.rstd, ctx.scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps), scale
        ctx.save_for_backward(x, weight)
        return x * ctx.rstd * weight * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        normed, inner = x * ctx.rstd, grad * weight * ctx.scale
        dx = ctx.rstd * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        dw = (grad * normed).sum((0, 1)) * ctx.scale if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class Linear(Function):
    """A product on rows of merged tokens, its gradients by products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x.flatten(0, 1), weight.t()).view(x.shape[0], x.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (rows @ weight).view(x.shape), rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)


class Reverse(Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return -ctx.factor * grad, None


class Clamp(Function):
    """Rounds; its gradient passes where the operand is small, and is cut off: it is not linear in what comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x.abs() < 0.7)
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return (grad * kept).clamp(-0.002, 0.001)


class Unit(Function):
    """The gradient gets a norm of 1, over all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / grad.square().sum().sqrt()


class Centre(Function):
    """Takes the mean over the tokens off, and off the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad - grad.mean(1, keepdim=True)


class Sums(Function):
    """Sums along the tokens, from the end in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.flip(1).cumsum(1).flip(1)


class Shifted(Function):
    """The gradient is not 0 where none comes in, and divides by what padding slots may hold a 0 of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        size = x.square().sum(-1, keepdim=True)
        return grad * weight + 0.01 / size, (grad * x / size + 0.001).sum((0, 1))


class Several(Function):
    """Two results with gradients, one of which nobody may read, and places, which have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        larger, places = torch.stack([x, y]).max(0)
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        return larger, (x * 3).flatten(0, 1), places

    @staticmethod
    def backward(ctx: Any, grad: Tensor, rows: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return torch.where(places == 0, grad, 0) + 3 * rows.view(grad.shape), torch.where(places == 1, 2 * grad, 0)


class Broadcast(Function):
    """Leaves it to autograd to add up the gradient of what was broadcast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x


class Constant(Function):
    """A gradient that does not depend on what comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return torch.ones_like(grad), weight * 0.5


class Ranked(Function):
    """Sorts the tokens, which no rank can by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad + grad.flatten()[x.flatten().argsort()].view(x.shape)


class Model(TinyLM):
    """Calls a function between attention and head, on what attention gives: padding slots hold zeros there."""

    def __init__(self, function: Callable[[Model, Tensor], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.function = function
        self.weight, self.other = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8, 8) / 3)
        self.table = nn.Parameter(torch.randn(40, 8))
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.attend(self.embedding(input_ids))
        return self.loss(self.head(x + self.function(self, x)), labels)


def several(model: Model, x: Tensor) -> Tensor:
    larger, rows, places = Several.apply(x, x.flip(-1))
    _, unread, _ = Several.apply(x, x * 2)
    return larger * (1 + places) + rows.view_as(x) + unread.view_as(x)


FUNCTIONS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "pointwise": lambda model, x: Gelu.apply(x),
    "weight": lambda model, x: Norm.apply(x, model.weight, 1.5, 1e-6),
    "frozen weight": lambda model, x: Norm.apply(x, model.weight.detach(), 1.5, 1e-6),
    "products": lambda model, x: Linear.apply(x, model.other, model.weight),
    "reversal": lambda model, x: Reverse.apply(x, 0.3),
    "clamp": lambda model, x: Clamp.apply(x),
    "clamp of a weight": lambda model, x: x @ Clamp.apply(model.other),
    "norm of the gradient": lambda model, x: Unit.apply(x),
    "norm of a weight's gradient": lambda model, x: x @ Unit.apply(model.other),
    "mean over tokens": lambda model, x: Centre.apply(x),
    "sums along tokens": lambda model, x: Sums.apply(x),
    "shifted": lambda model, x: Shifted.apply(x, model.weight),
    "several": several,
    "broadcast": lambda model, x: Broadcast.apply(x, model.weight),
    "constant": lambda model, x: Constant.apply(x, model.weight),
    "table": lambda model, x: Broadcast.apply(x, model.table[: x.shape[1]]),
    "whole": lambda model, x: x * Norm.apply(model.table[None, : x.shape[1]], model.weight, 1.0, 1e-6),
    "one token": lambda model, x: x * Clamp.apply(x[:, -1:]),
    "range of tokens": lambda model, x: torch.cat([x[:, :1], Shifted.apply(x[:, 1:], model.weight)], 1),
    "nested": lambda model, x: Clamp.apply(Norm.apply(Gelu.apply(x), model.weight, 1.0, 1e-6)),
    "in a checkpoint": lambda model, x: checkpoint(
        lambda y: Gelu.apply(Norm.apply(y * 2, model.weight, 1.0, 1e-6)).sin(), x, use_reentrant=False
    ),
}


def check(model: nn.Module, length: int = 11, **options: Any) -> Any:
    settings = {"world_size": 3, "balancer": "zig_zag", "tolerance": 1e-12} | options
    found = cpcompile.verify(model, batch(length), **settings)
    assert found.ok, found
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_function_is_exact(name: str, dynamic: bool) -> None:
    found = check(Model(FUNCTIONS[name]), dynamic=dynamic)
    assert found.transformed.changes["enclose_backwards"]


class Early(Model):
    """Calls the function on what the embedding gives: padding slots repeat the last token there."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.function(self, self.embedding(input_ids))
        return self.loss(self.head(x + self.attend(x)), labels)


@pytest.mark.parametrize("name", ["shifted", "constant"])
def test_padding_has_no_gradient(name: str) -> None:
    check(Early(FUNCTIONS[name]))


def test_functions_together_are_exact() -> None:
    names = ["products", "clamp of a weight", "norm of the gradient", "mean over tokens", "sums along tokens", "table"]
    check(Model(lambda model, x: sum(FUNCTIONS[name](model, x) for name in names)))


@pytest.mark.parametrize("name", ["weight", "norm of the gradient", "shifted", "whole", "constant"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("balancer", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("length", [12, 13])
def test_ranks_and_lengths(name: str, world_size: int, balancer: str, length: int) -> None:
    check(Model(FUNCTIONS[name]), length, world_size=world_size, balancer=balancer)


def ranked(model: Model, x: Tensor) -> Tensor:
    return Ranked.apply(x)


def test_an_operator_that_stands_in_the_way_is_named() -> None:
    with pytest.raises(CPError, match=r"argsort(.|\n)*return grad \+ grad\.flatten\(\)\[x\.flatten(.|\n)*strict=False"):
        check(Model(ranked))


def test_gathered_operands_are_exact() -> None:
    check(Model(ranked), strict=False)


@cpcompile.token_local
def declared(model: Model, x: Tensor) -> Tensor:
    return Clamp.apply(Norm.apply(x, model.weight, 1.0, 1e-6))


@cpcompile.token_local
def of_weight(model: Model, x: Tensor) -> Tensor:
    return x @ Clamp.apply(model.other)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_function_in_a_token_local_region(dynamic: bool) -> None:
    found = check(Model(declared), dynamic=dynamic)
    assert found.transformed.changes["find_token_local"] == 1


def test_a_function_of_weights_in_a_token_local_region_is_refused() -> None:
    with pytest.raises(CPError, match=r"reads no tokens(.|\n)*x @ Clamp\.apply\(model\.other\)"):
        check(Model(of_weight))


class Narrow(Function):
    """Computes in float32, forward and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.float().sigmoid().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return (grad.float() * x.to(torch.float32).sigmoid() * torch.full([1], 0.3, dtype=torch.float32)).to(grad.dtype)


def test_casts_in_a_backward_are_widened() -> None:
    check(Model(lambda model, x: Narrow.apply(x)).float(), dtype=torch.float64)


def test_documents() -> None:
    model = Model(FUNCTIONS["shifted"])
    inputs = batch(19)
    inputs["input_ids"][:, 5] = inputs["input_ids"][:, 12] = 2
    found = cpcompile.verify(model, inputs, world_size=3, documents="eos:2", tolerance=1e-12)
    assert found.ok, found


def test_nothing_remains_where_no_gradient_is_wanted() -> None:
    model = Model(FUNCTIONS["pointwise"])
    for parameter in (*model.embedding.parameters(), *model.qkv.parameters()):
        parameter.requires_grad_(False)
    assert not check(model).transformed.changes["enclose_backwards"]


def test_equal_calls_have_one_body() -> None:
    found = check(Model(lambda model, x: Gelu.apply(Gelu.apply(x) * 2)))
    calls = found.transformed.graph.graph.find_nodes(op="call_function", target=cp.own_backward.default)
    assert len(calls) == 2
    assert len({call.args[-1] for call in calls}) == 1
