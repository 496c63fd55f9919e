"""Operators in place are replaced, and values, gradients and what inputs hold afterwards stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cpcompile import NoRule, verify
from cpcompile.capture.lowering import capture
from cpcompile.capture.writes.aliases import settled_writes, written_arguments
from cpcompile.capture.writes.functional import functional_form
from cpcompile.inspect import lockstep
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.passes import functionalise_writes
from tests import models
from tests.graph.small_models import TinyLM, batch, planned

aten = torch.ops.aten
Forward = Callable[["Cell", Tensor], Any]


class Cell(nn.Module):
    """A parameter, a buffer and a norm with running statistics around a function."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(4, 6))
        self.register_buffer("total", torch.rand(6))
        self.register_buffer("other", torch.rand(6))
        self.table = nn.Embedding(3, 6, max_norm=1.0)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def slices(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    y[:, 1:3] = x[:, :2, :1]
    y[..., 2:4] = 0.5
    y[:, 0] += y[:, 1]
    return y


def nested_views(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).contiguous()
    y[0][:, 1:3].mul_(2)
    y.transpose(0, 1)[1].unsqueeze(0).flatten(1).mul_(x.sum())
    y.permute(2, 0, 1).diagonal(0, 0, 2).mul_(3)
    y.narrow(1, 1, 2).view(x.shape[0], 2, 3, 2)[..., 0].neg_()
    return y


def views_read_later(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).contiguous()
    row, flat, same = y[:, 1], y.view(-1), y.to(y.dtype)
    before = row * 2
    y.mul_(cell.weight[0])
    row.add_(before)
    return (row * before).sum() + flat.square().sum() + same[0].sum()


def chains(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).add_(1).div_(2).sub_(0.1, alpha=2)
    y *= cell.total
    return F.relu(y.add_(-x[..., :1]), inplace=True)


def indexed(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    index = torch.tensor([0, 1, 0])
    y.index_put_((index,), x[:1].sum() * torch.ones(3, 1, 6, dtype=x.dtype), accumulate=True)
    y.index_add_(1, index, x[:, :3, :1].expand(-1, -1, 6))
    y[y > 1] = 0.5
    return y


def scattered(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    index = (x[..., :2] * 0).long()
    y.scatter_(2, index, x[..., :2] * 3)
    y.scatter_(2, index + 2, 0.25)
    return y.scatter_add_(2, index + 4, x[..., 2:])


def copied(cell: Cell, x: Tensor) -> Tensor:
    y = torch.zeros(*x.shape[:2], 6)  # float32: what is copied in is rounded
    y.copy_(cell.weight[0])
    y[:, 1].copy_(x[:, 0, :1])
    return y.double() * cell.weight[1]


def masked(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).contiguous()
    mask = torch.zeros(6, x.shape[1], dtype=torch.bool)
    mask[1:, 0] |= True
    mask[0].logical_not_()
    y.transpose(1, 2).masked_fill_(mask, -3.0)
    return y.relu() + y


def assembled(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    q = y.new_empty(*y.shape[:2], 8)
    q[..., :6] = y
    q[..., 6:] = x[..., :2]
    return q


def running_statistics(cell: Cell, x: Tensor) -> Tensor:
    y = cell.norm((x @ cell.weight).flatten(0, 1))
    with torch.no_grad():
        cell.total.mul_(0.9).add_(y.mean(0), alpha=0.1)
        cell.total[:2].clamp_(max=0.4)
    return y * cell.total


def weights_without_gradients(cell: Cell, x: Tensor) -> Tensor:
    row = cell.weight[0]
    with torch.no_grad():
        cell.weight.mul_(0.5)
        cell.weight[1].fill_(0.3)
        inside = cell.weight.square()
    cell.weight.detach()[2].zero_()
    return x @ cell.weight * row * inside.sum()


def data_written(cell: Cell, x: Tensor) -> Tensor:
    cell.weight.data.clamp_(0.2, 0.5)
    cell.weight.data[0] /= cell.weight.data.norm()
    cell.total.data.copy_(cell.weight.data[1])
    return x @ cell.weight.square() * cell.total


def reshaped_in_place(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    y.unsqueeze_(1).transpose_(1, 2)
    y.add_(1).squeeze_(2)
    return y


def inputs_written(cell: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
    part = x[:, 0]
    x.add_(cell.total[:4])
    part.mul_(2)
    cell.total.copy_(x[0, 0, 0])
    y = x.clone() @ cell.weight
    x.zero_()
    return y * cell.total.clone(), part


def filled(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).t() if x.dim() == 2 else (x @ cell.weight).movedim(0, -1)
    y[1:].fill_(2.0)
    y[:1].zero_()
    y.diagonal(0, 0, 1).fill_(x.sum())
    return y.flatten() * 2


def other_strides(cell: Cell, x: Tensor) -> Tensor:
    y = x.new_empty(6, *x.shape[:2])
    flat = y.view(-1)
    y.copy_((x @ cell.weight).permute(2, 0, 1))
    return flat * y.view(-1).cos() + (y * 2).view(-1)


def buffers_swapped(cell: Cell, x: Tensor) -> tuple[Tensor, ...]:
    kept = cell.total.clone()
    cell.total.copy_(cell.other)
    cell.other.copy_(kept)
    cell.total[1:].copy_(cell.other[:-1])
    cell.other.add_(1)
    return x @ cell.weight * cell.total, cell.total[1:], cell.other.view(-1)


def drawn(cell: Cell, x: Tensor) -> Tensor:
    y = torch.empty(x.shape[1], 6, dtype=x.dtype).uniform_() + x.new_empty(6).normal_()
    z = x @ cell.weight
    noise = (z * 1).exponential_()
    F.dropout(z, 0.5, inplace=True)
    F.dropout(z, 0.5, training=False, inplace=True)
    return (y - noise * torch.empty(6).bernoulli_(0.5)) * z


def written_to_out(cell: Cell, x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:2], 6)
    largest, place = x.new_empty(x.shape[:2]), torch.empty(x.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        torch.add(x @ cell.weight, 1, out=y)
        torch.max(y, 2, out=(largest, place))
    return (x @ cell.weight) * y + (largest + place)[..., None]


def table_of_bounded_norm(cell: Cell, x: Tensor) -> Tensor:
    return cell.table(torch.tensor([1, 2, 1])).sum(0) * (x @ cell.weight) + cell.table.weight[1]


def recurrent(cell: Cell, x: Tensor) -> Tensor:
    y, state = x @ cell.weight, torch.zeros(x.shape[0], 6, dtype=x.dtype)
    for i in range(3):
        state = state * 0.5 + y[:, i]
        y[:, i] = state
    return y


def other_dtypes(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    rounded, number = torch.zeros(6), torch.arange(6)
    rounded += y[0, 0]
    number += 1
    number *= 2
    number //= 3
    is_large = number > 2
    is_large ^= number > 5
    return y * rounded * number + is_large


def pieces(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).detach().clone()
    first, second = y.split(3, dim=-1)
    first.add_(1)
    second.chunk(2, 1)[0].mul_(2)
    y.unbind(0)[1].sub_(0.5)
    return y * (x @ cell.weight)


FUNCTIONS: dict[Forward, int] = {
    slices: 4,
    nested_views: 4,
    views_read_later: 2,
    chains: 6,
    indexed: 3,
    scattered: 3,
    copied: 2,
    masked: 4,
    assembled: 2,
    running_statistics: 4,
    weights_without_gradients: 3,
    data_written: 4,
    reshaped_in_place: 4,
    inputs_written: 4,
    filled: 3,
    other_strides: 1,
    buffers_swapped: 4,
    drawn: 6,
    written_to_out: 2,
    table_of_bounded_norm: 1,
    recurrent: 3,
    other_dtypes: 5,
    pieces: 3,
}


def compiled(model: nn.Module, edit: Callable[[fx.GraphModule], None], is_dynamic: bool = False) -> Any:
    """Return `model` compiled by its captured graph, after `edit`."""

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> fx.GraphModule:
        gm = capture(gm, examples)
        edit(gm)
        gm.graph.lint()
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=is_dynamic)


def outcome(model: nn.Module, function: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the results of `function`, the gradients of `model`, and what its state and `x` hold afterwards."""
    given = x.clone()
    torch.manual_seed(1)
    results = function(given)
    results = results if isinstance(results, tuple) else (results,)
    sum((y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in results).backward()
    found = {f"result {i}": y.detach() for i, y in enumerate(results)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found | {"x": given}


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "number"), FUNCTIONS.items(), ids=[f.__name__ for f in FUNCTIONS])
def test_replaces_writes_and_keeps_values_and_gradients(function: Forward, number: int, is_dynamic: bool) -> None:
    def edit(gm: fx.GraphModule) -> None:
        counts.append(functionalise_writes(gm))
        assert {node for node in gm.graph.nodes if written_arguments(node)} == set(settled_writes(gm))
        text = str(gm.graph)
        counts.append(functionalise_writes(gm))
        assert str(gm.graph) == text

    counts: list[int] = []
    torch.manual_seed(0)
    model, x = Cell(function).double(), torch.rand(3, 5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    expected = outcome(reference, reference, x)
    found = outcome(model, compiled(model, edit, is_dynamic), x)
    assert counts == [number, 0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_leaves_graphs_without_writes_alone() -> None:
    graphs: list[tuple[str, int, str]] = []

    def edit(gm: fx.GraphModule) -> None:
        graphs.append((str(gm.graph), functionalise_writes(gm), str(gm.graph)))

    model = models.make("llama")
    compiled(model, edit)(**models.batch(model, 9))
    ((text, number, text_after),) = graphs
    assert number == 0
    assert text == text_after


def test_results_carry_the_name_of_what_they_replace() -> None:
    """Verify compares node by node."""

    def edit(gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            annotate(node, origin=node.name)
        written.update((n.name, n.target) for n in gm.graph.nodes if written_arguments(n) and n.target not in COPIES)
        functionalise_writes(gm)
        found.update((annotation(n).origin, n) for n in gm.graph.nodes if n.op == "call_function")

    written: dict[str, Any] = {}
    found: dict[str, fx.Node] = {}
    compiled(InPlaceLM(), edit)(**batch())
    assert len(written) > 8
    for name, target in written.items():
        assert found[name].target is functional_form(target)
        assert "test_functionalise_writes.py" in found[name].meta["stack_trace"]


COPIES = (aten.copy_.default,)


class InPlaceLM(TinyLM):
    """Does in place what can be done in place."""

    def __init__(self) -> None:
        super().__init__(width=16)
        self.down, self.up = nn.Linear(16, 6), nn.Linear(6, 32)
        self.register_buffer("steps", torch.zeros(()))

    def attend(self, x: Tensor) -> Tensor:
        """Assembles queries and keys as latent attention does, and writes its mask by hand."""
        self.steps.add_(1)
        rotary = x[..., :2].unflatten(-1, (1, 2)).transpose(1, 2)
        both = self.up(self.down(x).relu_()).unflatten(-1, (2, 16)).transpose(1, 2)
        q = x.new_empty(*both.shape[:3], 10)
        k = torch.zeros_like(q)
        q[..., :8], q[..., 8:] = both[..., :8], rotary
        k[..., :8], k[..., 8:] = both[..., 8:], rotary * 2
        scores = (q @ k.transpose(-1, -2)).div_(3.0)
        positions = torch.arange(x.shape[1])
        scores.masked_fill_(positions[None, :] > positions[:, None], float("-inf"))
        return (scores.softmax(-1) @ both[..., 8:]).transpose(1, 2).flatten(-2)

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(x)
        x.mul_(0.5)[..., 1].neg_()
        x[input_ids == 3] = 0.25
        return self.head(F.relu(x, inplace=True)).clamp_(min=-1.0)


@pytest.mark.parametrize(("length", "world_size"), [(8, 2), (5, 3)])
@pytest.mark.parametrize("balancer", ["contiguous", "zig_zag"])
def test_model_in_place_is_exact(length: int, world_size: int, balancer: str) -> None:
    result = verify(InPlaceLM(), batch(length), world_size=world_size, dtype=torch.float64, balancer=balancer)
    assert result.ok, result


def test_first_difference_is_not_what_was_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and values are compared as they were when the model made them."""
    all_reduce = torch.ops.cpcompile.all_reduce.default
    monkeypatch.setitem(lockstep.COLLECTIVES, all_reduce, lambda calls: [c["x"] for c in calls])
    result = verify(InPlaceLM(), batch(), world_size=2, dtype=torch.float64)
    assert result.first_difference is not None
    assert "F.cross_entropy" in result.first_difference.place


class Remembering(TinyLM):
    """Keeps its hidden states in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(2, 8, 8))

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        self.hidden.copy_(x.detach())
        return self.head(x)


def test_refuses_tokens_written_into_a_buffer() -> None:
    with pytest.raises(NoRule, match=r"copy_(.*\n)*.*self.hidden.copy_"):
        planned(Remembering(), batch())


def resized(cell: Cell, x: Tensor) -> Tensor:
    y = x + 1
    return y.as_strided((2, 2), (1, 1)).add_(1) + y[0, :2, :2]


def cut_off(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    alone = y.detach()
    alone.mul_(cell.weight[0])
    y.add_(1)
    return alone.sum() + y


def statistics_read(cell: Cell, x: Tensor) -> Tensor:
    y = cell.norm((x @ cell.weight).flatten(0, 1))
    cell.total.add_(cell.norm.running_mean)
    return y + cell.total


def data_of_what_was_read(cell: Cell, x: Tensor) -> Tensor:
    y = x @ cell.weight
    cell.weight.data.clamp_(0.2, 0.5)
    return y @ cell.weight.mT


def data_of_what_was_made(cell: Cell, x: Tensor) -> Tensor:
    y = (x @ cell.weight).exp()
    y.data.clamp_(max=1)
    return y


def data_replaced(cell: Cell, x: Tensor) -> Tensor:
    cell.weight.data = cell.weight.data * 0.5
    return x @ cell.weight


REFUSED: dict[Forward, str] = {
    data_of_what_was_read: r"\.data of a tensor that aten.matmul.default has used before(.|\n)*clamp_(.|\n)*x @ cell.weight",
    data_of_what_was_made: r"\.data of a tensor that aten.exp.default has used before",
    data_replaced: r"puts other memory under a tensor(.|\n)*copy_",
    resized: "as_strided.default: a write through this view",
    cut_off: "given gradients in place, and then written elsewhere",
    statistics_read: "running statistics",
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_refuses_by_name(function: Forward, reason: str) -> None:
    def edit(gm: fx.GraphModule) -> None:
        with pytest.raises(NoRule, match=reason):
            functionalise_writes(gm)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(Cell(function).double(), edit)(torch.rand(3, 5, 4, dtype=torch.float64))
