"""Stand-ins for liger-kernel and cut-cross-entropy, whose kernels need a GPU: their signatures and what they promise, in torch.

As the packages do: Liger's function computes gradients in forward, of the weight only where hidden states take one, and
multiplies them in backward; Apple's leaves small gradients out unless it is told not to.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile.runtime.tiles import loss_providers


class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
    """That of `liger_kernel.ops.fused_linear_cross_entropy` at 00eba634."""

    @staticmethod
    def forward(
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: Any = None,
        ce_mode: Any = None,
        chunk_mem_const: int = 1,
    ) -> tuple[Tensor, None, None, None]:
        assert reduction == "sum" and accum_dtype == torch.float32 and not lse_square_scale and _input.dim() == 2
        operands = [_input, weight, *([] if bias is None else [bias])]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(_input.requires_grad) for x in operands]
            logits = F.linear(*leaves)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            rules = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
            loss = F.cross_entropy(logits, target, ce_weight, **rules)  # type: ignore[arg-type]
            grads = torch.autograd.grad(loss, leaves) if _input.requires_grad else []
        ctx.save_for_backward(*grads)
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:  # type: ignore[override]
        of_input, of_weight, *of_bias = [grad * grad_output for grad in ctx.saved_tensors]
        return (of_input, of_weight, None, *(of_bias or [None]), *[None] * 14)[: len(ctx.needs_input_grad)]


class _Filtered(torch.autograd.Function):
    """Leaves gradients of logits out that are small."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.where(grad.abs() < ctx.eps, 0, grad), None


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor:
    """That of `cut_cross_entropy` at 3a798378, whose preset `cce_exact` is `filter_eps=None` and float32 sums."""
    assert impl in ("cce", "cce_exact") and not shift and vocab_parallel_options is None
    logits = F.linear(e, c, bias)
    if impl != "cce_exact" and filter_eps is not None:
        logits = _Filtered.apply(logits, 0.05)  # type: ignore[no-untyped-call]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have both packages found, for any device and dtype."""
    for path, found in {
        "liger_kernel.ops.fused_linear_cross_entropy": LigerFusedLinearCrossEntropyFunction,
        "cut_cross_entropy": linear_cross_entropy,
    }.items():
        module = types.ModuleType(path)
        setattr(module, found.__name__, found)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(loss_providers, "_kernel_limits", lambda *_: "")
