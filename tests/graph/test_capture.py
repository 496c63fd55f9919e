"""Capture: the graph that the passes get."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cpcompile import CPError, verify
from tests.models import RotaryLM, batch

aten = torch.ops.aten


class DetachedInPlace(RotaryLM):
    """Scales its logits by a statistic that takes no part in differentiation."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(input_ids)["logits"]
        scale = logits.abs().amax(-1, keepdim=True).detach_()
        return nn.functional.cross_entropy((logits / scale).flatten(0, 1), labels.flatten())


def test_detach_in_place_becomes_detach_and_stays_exact() -> None:
    model = DetachedInPlace().double()
    found = verify(model, batch(model, 31), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    targets = {node.target for node in found.transformed.original.graph.nodes}
    assert aten.detach.default in targets
    assert aten.detach_.default not in targets


def test_metadata_asserts_are_dropped() -> None:
    model = RotaryLM()
    found = verify(model, batch(model, 31), world_size=2)
    assert aten._assert_tensor_metadata.default not in {n.target for n in found.transformed.original.graph.nodes}


class SelectivelyCheckpointed(RotaryLM):
    """Chooses what its first block saves."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        policy = functools.partial(create_selective_checkpoint_contexts, [aten.mm.default])
        x = checkpoint(self.blocks[0], self.embed(input_ids), use_reentrant=False, context_fn=policy)
        return super().forward(labels=labels, inputs_embeds=x)


def test_selective_checkpointing_is_refused() -> None:
    model = SelectivelyCheckpointed()
    with pytest.raises(CPError, match="selective activation checkpointing"):
        verify(model, batch(model, 31), world_size=2)


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
def test_a_backward_of_the_models_own_is_refused() -> None:
    model = Rounds()
    with pytest.raises(CPError, match=r"a torch\.autograd\.Function has a backward of its own") as error:
        verify(model, batch(model, 31), world_size=2)
    assert "StraightThrough.apply(x * 8)" in str(error.value)
    for parameter in model.embed.parameters():
        parameter.requires_grad_(False)
    verify(model, batch(model, 31), world_size=2).raise_if_wrong()


class ClampsItsParameter(RotaryLM):
    """Writes to the data of a parameter, behind autograd's back."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        self.head.weight.data.clamp_(-1, 1)
        return super().forward(input_ids, labels)


@pytest.mark.parametrize("strict", [True, False])
def test_write_to_the_data_of_a_parameter_is_refused(strict: bool) -> None:
    model = ClampsItsParameter()
    with pytest.raises(CPError, match=r"cannot be followed(.|\n)*data.clamp_"):
        verify(model, batch(model, 31), world_size=2, strict=strict)
