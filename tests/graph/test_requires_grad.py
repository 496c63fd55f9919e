"""`requires_grad_()` on what a model computes, and reentrant checkpoints, which ask for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from cpcompile import CPError, verify
from tests.graph.small_models import TinyLM, batch, planned

REENTRANT = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)


def require(module: nn.Module, args: Any, output: Tensor) -> None:
    """Is the hook of transformers' `enable_input_require_grads`."""
    output.requires_grad_(True)


class Layer(nn.Module):
    """Scales what it is given, by name or not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        assert x.requires_grad or not self.linear.weight.requires_grad or not torch.is_grad_enabled()
        out: Tensor = self.linear(x)
        return out if scale is None else out * scale


class Frozen(TinyLM):
    """A frozen embedding in front of a layer in a checkpoint."""

    def __init__(self, wrap: Any, returns: bool = False, by_name: bool = False) -> None:
        super().__init__()
        self.layer, self.returns, self.by_name = wrap(Layer()), returns, by_name

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        x = self.embedding(input_ids)
        y = x + (self.layer(x, scale=x.sin()) if self.by_name else self.layer(x))
        loss = self.loss(self.head(y + self.attend(y)), labels)
        return {"loss": loss, "embeddings": x} if self.returns else loss


def frozen(wrap: Any, is_required: bool = True, **options: bool) -> Frozen:
    model = Frozen(wrap, **options).double()
    model.embedding.weight.requires_grad_(False)
    if is_required:
        model.embedding.register_forward_hook(require)
    return model


@pytest.mark.parametrize("wrap", [lambda module: module, checkpoint_wrapper, REENTRANT])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_frozen_model_is_exact(wrap: Any, by_name: bool) -> None:
    found = verify(frozen(wrap, by_name=by_name), batch(13), world_size=2, dtype=torch.float64)
    assert found.tolerance < 1e-12
    found.raise_if_wrong()
    assert any("layer" in name and "weight" in name for name in found.gradient_errors)


def test_a_returned_leaf_is_refused() -> None:
    with pytest.raises(CPError, match=r"\.grad would stay empty(.|\n)*self\.embedding\(input_ids\)(.|\n)*leave it out"):
        verify(frozen(checkpoint_wrapper, returns=True), batch(13), world_size=2)


class Untouched(nn.Module):
    """Multiplies without looking at gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def test_a_reentrant_checkpoint_that_loses_gradients_is_refused() -> None:
    model = frozen(REENTRANT, is_required=False)
    model.layer = REENTRANT(Untouched().double())
    with pytest.raises(CPError, match=r"parameters get none(.|\n)*use_reentrant=False"):
        planned(model, batch(13))  # one device warns
    model.layer = checkpoint_wrapper(model.layer._checkpoint_wrapped_module)
    verify(model, batch(13), world_size=2, dtype=torch.float64).raise_if_wrong()
