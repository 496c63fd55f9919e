"""The graph of backward is listed under the user's lines, with what it reads, the shapes of a rank, and the gradients."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

import cpcompile
from cpcompile.cli import app
from tests.graph.small_models import TinyLM, batch


def test_backward_is_listed_under_the_lines_of_forward() -> None:
    plan = cpcompile.explain(TinyLM(), batch(), world_size=2, strategy="ring", backward=True, memory=True)
    head, *blocks = plan.backward.split("\n\n")
    assert "tangents_1: f32[]" in head.splitlines()
    of_attention = next(block for block in blocks if block.startswith("# return F.scaled_dot_product_attention"))
    assert "cp.ring_attention_backward(" in of_attention and "small_models.py:" in of_attention
    of_product = next(block for block in blocks if "self.qkv(x)" in block)
    assert ": f32[24, 8] = aten.mm(" in of_product  # the gradient of the weight, of 2 x 4 tokens
    grads = dict(line.split(" = ") for line in blocks[-1].splitlines())
    assert grads.keys() == {f"{name}.grad" for name, _ in TinyLM().named_parameters()}
    assert all(f"{value}: f32[" in plan.backward for value in grads.values())
    assert f"{grads['head.weight.grad']}: f32[13, 8] = cp.start_sum(" in plan.backward
    assert plan.memory is not None


def test_nothing_is_listed_unasked_or_where_nothing_takes_a_gradient() -> None:
    assert cpcompile.explain(TinyLM(), batch(), world_size=2).backward == ""
    frozen = TinyLM().requires_grad_(False)
    assert cpcompile.explain(frozen, batch(), world_size=2, backward=True).backward == ""


def test_command() -> None:
    torch._dynamo.reset()
    target = "tests.graph.test_backward:small"
    result = CliRunner().invoke(app, ["explain", target, "--graph", "backward", "--no-memory", "--world-size", "2"])
    assert result.exit_code == 0, result.output
    assert "\nhead.weight.grad = start_sum" in result.output


def small() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a model and its inputs."""
    return TinyLM(), batch()
