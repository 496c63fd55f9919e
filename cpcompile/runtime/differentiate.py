"""Differentiate: every attention operator saves its inputs and outputs, and its backward is an operator of its own.

forward(q, k, v, mask, documents, key_padding, *settings) -> out, lse, *kept
backward(dout, q, k, v, mask, documents, key_padding, out, lse, *kept, *settings) -> dq, dk, dv
"""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

NUM_TENSORS = 6


def differentiate(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make `backward` the gradient of `forward`'s first output with respect to q, k and v."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        if ctx.needs_input_grad[3]:
            raise NotImplementedError(f"{forward._qualname} has no gradient for a learned score bias: detach the mask")
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[NUM_TENSORS:]

    def gradient(ctx: Any, dout: torch.Tensor, *unused: None) -> tuple[torch.Tensor | None, ...]:
        none = (None,) * (NUM_TENSORS - 3 + len(ctx.settings))
        return *backward(dout, *ctx.saved_tensors, *ctx.settings), *none

    forward.register_autograd(gradient, setup_context=keep)
