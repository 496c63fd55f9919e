"""Capture: the graph that the passes get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.utils.checkpoint import checkpoint

from cpcompile import CPError, verify
from cpcompile.capture.lowering import refuse_untraced_tensors
from tests.models import RotaryLM, batch

aten = torch.ops.aten


class DetachedInPlace(RotaryLM):
    """Scales its logits by a statistic that takes no part in differentiation."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(input_ids)["logits"]
        scale = logits.abs().amax(-1, keepdim=True).detach_()
        return nn.functional.cross_entropy((logits / scale).flatten(0, 1), labels.flatten())


def test_detach_in_place_becomes_detach_and_stays_exact() -> None:
    model = DetachedInPlace(num_layers=1).double()
    found = verify(model, batch(model, 31), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    targets = {node.target for node in found.transformed.original.graph.nodes}
    assert aten.detach.default in targets
    assert aten.detach_.default not in targets


def test_metadata_asserts_are_dropped() -> None:
    model = RotaryLM(num_layers=1)
    found = verify(model, batch(model, 31), world_size=2)
    assert aten._assert_tensor_metadata.default not in {n.target for n in found.transformed.original.graph.nodes}


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Rounds(RotaryLM):
    """Has a gradient of its own inside a checkpoint."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = checkpoint(lambda x: StraightThrough.apply(x * 8) / 8, self.embed(input_ids), use_reentrant=False)
        return super().forward(labels=labels, inputs_embeds=x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_backward_of_the_models_own_is_kept() -> None:
    model = Rounds(num_layers=1).double()
    found = verify(model, batch(model, 31), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    own = torch.ops.cpcompile.own_backward.default
    assert len(found.transformed.original.graph.find_nodes(op="call_function", target=own)) == 1
    for parameter in model.embed.parameters():
        parameter.requires_grad_(False)
    found = verify(model, batch(model, 31), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    assert not found.transformed.original.graph.find_nodes(op="call_function", target=own)


def test_a_tensor_that_exists_only_while_tracing_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.relu.default, (graph.get_attr("lost"),)))
    lost = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(CPError, match=r"aten.relu.default reads a tensor that cannot be followed"):
        refuse_untraced_tensors(fx.GraphModule({"lost": lost}, graph))


class MaskByVmap(RotaryLM):
    """Attends causally, and both ways inside an image; the mask is a function of two places, as transformers writes them."""

    def forward(self, input_ids: Tensor, labels: Tensor, token_type_ids: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        batch_size, length = input_ids.shape

        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if token_type_ids is None:
                return key <= query
            both = (token_type_ids[row, query] == 1) & (token_type_ids[row, key] == 1)
            return (key <= query) | both

        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            is_seen = torch.vmap(is_seen, in_dims=dims, out_dims=0)
        places = torch.arange(length)
        mask = is_seen(torch.arange(batch_size), torch.arange(1), places, places)
        x = self.embed(input_ids)
        for block in self.blocks:
            q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in block.qkv(x).split([32, 16, 16], -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + block.mlp(block.out(y.transpose(1, 2).flatten(2)))
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss}


@pytest.mark.parametrize("has_types", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_mask_made_by_vmap_is_exact(has_types: bool, dynamic: bool, world_size: int) -> None:
    model = MaskByVmap(num_layers=1).double()
    inputs = batch(model, 29)
    if has_types:
        inputs["token_type_ids"] = (torch.arange(29) % 11 < 6).long().repeat(2, 1)
    found = verify(model, inputs, world_size=world_size, dtype=torch.float64, dynamic=dynamic)
    found.raise_if_wrong()
    graph = found.transformed.original.graph
    assert all("nesting" not in str(node.target) and "batch_dim" not in str(node.target) for node in graph.nodes)
    made_by = [node.meta["stack_trace"] for node in graph.nodes if node.target is aten.le.Tensor]
    assert made_by
    assert all("return key <= query" in trace or "(key <= query) | both" in trace for trace in made_by)


class MixesByVmap(RotaryLM):
    """Weighs features by functions of one token that read weights, hold numbers, write in place and sit in a checkpoint."""

    def mix(self, x: Tensor) -> Tensor:
        def of_token(token: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            scale = torch.vmap(lambda a, b: (a * b).sin(), in_dims=(0, 0))(token, other)
            kept = torch.zeros_like(token).add_(token)
            kept.mul_(torch.tensor(0.5)).add_(0.25)
            return self.head.weight[: len(token)] @ (token * scale - token.detach()), kept

        mixed, kept = torch.vmap(torch.vmap(of_token), out_dims=(1, 0))(x, x.cos())
        return x + mixed.transpose(0, 1) + kept

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = checkpoint(self.mix, self.mix(self.embed(input_ids)), use_reentrant=False)
        return super().forward(labels=labels, inputs_embeds=x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_flow_through_vmap(dynamic: bool) -> None:
    model = MixesByVmap(num_layers=1).double()
    found = verify(model, batch(model, 31), world_size=2, dtype=torch.float64, dynamic=dynamic)
    found.raise_if_wrong()
    nodes = found.transformed.original.graph.nodes
    traces = [node.meta["stack_trace"] for node in nodes if node.target is aten.sin.default]
    assert sum("lambda a, b: (a * b).sin()" in trace for trace in traces) == 2
    assert any(
        "recompute" in node.meta for node in nodes if node.target is aten.mul_.Tensor or node.target is aten.sin.default
    )


class ScansByVmap(RotaryLM):
    """Decays over the tokens by an associative scan, whose steps are vectorised."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        x = self.embed(input_ids)
        states = (x.sigmoid(), x @ self.head.weight.T @ self.head.weight)
        _, x = associative_scan(combine, states, dim=1, combine_mode="generic")
        return super().forward(labels=labels, inputs_embeds=x)


def test_an_associative_scan_is_exact() -> None:
    model = ScansByVmap(num_layers=1).double()
    verify(model, batch(model, 21), world_size=2, dynamic=False, dtype=torch.float64).raise_if_wrong()


class DetachesInVmap(RotaryLM):
    """Takes no gradient of a part of what it vectorises."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        def scaled(token: Tensor) -> Tensor:
            with torch.no_grad():
                size = token.norm()
            return token / size + token.detach().sin()

        x = torch.vmap(torch.vmap(scaled))(self.embed(input_ids))
        return super().forward(labels=labels, inputs_embeds=x)


def test_gradients_switched_off_inside_vmap_are_refused() -> None:
    model = DetachesInVmap(num_layers=1).double()
    with pytest.raises(CPError, match=r"torch\.vmap.*gradients are switched off(.|\n)*token\.norm\(\)"):
        verify(model, batch(model, 31), world_size=2)
    model.embed.weight.requires_grad_(False)
    verify(model, batch(model, 31), world_size=2, dtype=torch.float64).raise_if_wrong()


class LearnsAtTestTime(RotaryLM):
    """Takes a step along a gradient of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        x = x - torch.func.grad(lambda y: (y.sin() * y).sum())(x)
        return super().forward(labels=labels, inputs_embeds=x)


def test_a_derivative_inside_the_model_is_refused() -> None:
    model = LearnsAtTestTime(num_layers=1)
    with pytest.raises(CPError, match=r"torch\.func\.grad(.|\n)*torch\.func\.grad\(lambda"):
        verify(model, batch(model, 31), world_size=2)
