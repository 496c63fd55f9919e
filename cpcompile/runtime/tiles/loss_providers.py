"""Loss providers: functions of other packages that compute the cross entropy of a head without having all logits in memory.

Each is written here against its own signature, as one function of hidden states `[T, features]`, a weight `[classes, features]`,
a bias, labels `[T]` and weights of classes that autograd differentiates, with what it cannot compute exactly beside it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.runtime.kernels.flash import is_installed

Tensor = torch.Tensor

OWN = "own"
OVERFLOWS = "returns gradients of the sum over all tokens in float16, which may be too large for it"
DEVICE = "cuda"  # where Liger's and Apple's kernels run


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """A cross entropy of the logits of a head.

    Attributes:
        device: the type of it.
        dtype: of hidden states and weight.
        loss_dtype: in which the loss is computed.
        by_token: whether there is a loss for each token, which something reads that weighs them; one sum otherwise.
        has_bias: whether the head has one.
        has_class_weights: whether classes have weights.
        ignore_index: the label of tokens that do not count.
        label_smoothing: as torch's.
        softcap: logits are `softcap * tanh(logits / softcap)`; 0: as they are.
        scale: what logits are multiplied by.
    """

    device: str
    dtype: torch.dtype
    loss_dtype: torch.dtype
    by_token: bool = False
    has_bias: bool = False
    has_class_weights: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0

    @property
    def reduction(self) -> str:
        """As torch calls it."""
        return "none" if self.by_token else "sum"


@dataclass(frozen=True, slots=True)
class Provider:
    """What computes cross entropies.

    Attributes:
        compute: from hidden states, weight, bias, labels and weights of classes to the loss; keywords are `chunk` and fields of
            a cross entropy.
        limits: why it cannot compute one exactly, or ''.
        rows_at_once: of how many tokens it has logits in memory, given tokens, classes, features and the chunk.
    """

    compute: Callable[..., Tensor]
    limits: Callable[[CrossEntropy], str]
    rows_at_once: Callable[[int, int, int, int], int]


def torch_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, class_weights: Tensor | None, **terms: Any
) -> Tensor:
    """Call `torch.nn.functional.linear_cross_entropy`, with the chunks that were asked for (read in torch 2.13 and 2.14)."""
    nn: Any = torch.nn  # torch 2.12 has neither
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=terms["chunk"])
    return nn.functional.linear_cross_entropy(  # type: ignore[no-any-return]
        hidden,
        weight,
        labels,
        linear_bias=bias,
        weight=class_weights,
        reduction=terms["reduction"],
        ignore_index=terms["ignore_index"],
        options=options,
    )


def _torch_limits(loss: CrossEntropy) -> str:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"is not in torch {torch.__version__} (it is from 2.13 on)"
    if loss.label_smoothing:
        return "has no label smoothing in chunks"
    if loss.softcap:
        return "has no softcap of logits"
    if loss.dtype == torch.float16:
        return OVERFLOWS
    if torch.promote_types(loss.dtype, loss.loss_dtype) != loss.dtype:
        return f"returns the loss in the dtype of hidden states, {loss.dtype}, and the model's is computed in {loss.loss_dtype}"
    return ""


def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, class_weights: Tensor | None, **terms: Any
) -> Tensor:
    """Call the function behind `LigerFusedLinearCrossEntropyLoss` (read in its sources at 00eba634).

    It computes gradients in forward, for a gradient of 1, and multiplies them in backward: exact for one sum. They are added up
    over chunks in float32.
    """
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # without a gradient of these it computes none of the weight
    of_sum = terms["ignore_index"], 0.0, terms["label_smoothing"], "sum", terms["softcap"] or None
    found = _liger().apply(hidden, weight, labels, bias, class_weights, *of_sum, False, torch.float32)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _liger() -> Any:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return module.LigerFusedLinearCrossEntropyFunction


def _liger_limits(loss: CrossEntropy) -> str:
    reason = _kernel_limits(loss, "liger_kernel", "liger-kernel", (torch.bfloat16, torch.float32))
    if not reason and "accum_dtype" not in inspect.signature(_liger().forward).parameters:
        return "is too old to add up gradients in float32 (pip install --upgrade liger-kernel)"
    if not reason and loss.by_token:
        return "multiplies gradients by one number for all tokens, and this loss weighs each token by itself"
    return reason


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, class_weights: Tensor | None, **terms: Any
) -> Tensor:
    """Call `cut_cross_entropy.linear_cross_entropy` (read in its sources at 3a798378).

    By default it leaves out blocks of small gradients and adds them up in 16 bits: `cce_exact` does neither.
    """
    given = {name: terms[name] for name in ("ignore_index", "reduction")}
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return function(  # type: ignore[no-any-return]
        hidden, weight, labels, bias=bias, softcap=terms["softcap"] or None, impl="cce_exact", **given
    )


def _cut_limits(loss: CrossEntropy) -> str:
    reason = _kernel_limits(loss, "cut_cross_entropy", "cut-cross-entropy", (torch.bfloat16,))
    if not reason and loss.label_smoothing:
        return "has no label smoothing"
    if not reason and loss.has_class_weights:
        return "has no weights of classes"
    return reason


def _kernel_limits(loss: CrossEntropy, module: str, package: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Return what two packages of Triton kernels, that compute in float32, cannot do."""
    if loss.device != DEVICE:
        return f"runs on {DEVICE}, and the model is on {loss.device}"
    if not is_installed(module):
        return f"is not installed (pip install {package})"
    if loss.dtype == torch.float16:
        return OVERFLOWS
    if loss.dtype not in dtypes or loss.loss_dtype == torch.float64:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"takes {names} and computes in float32, and here are {loss.dtype} and {loss.loss_dtype}"
    return ""


def _rows_of_liger(tokens: int, classes: int, features: int, chunk: int) -> int:
    """Return about as many as have logits of the size of all hidden states, up to a power of two."""
    rows = -(-tokens // -(-classes // features))
    return min(1 << (rows - 1).bit_length(), tokens)


PROVIDERS = {
    "torch": Provider(torch_cross_entropy, _torch_limits, lambda tokens, classes, features, chunk: min(tokens, chunk)),
    "liger": Provider(liger_cross_entropy, _liger_limits, _rows_of_liger),
    "cut_cross_entropy": Provider(cut_cross_entropy, _cut_limits, lambda *sizes: 0),
}
# What `auto` takes the first of that can: those that were measured faster than ours (benchmarks/loss.py), which can always.
BY_SPEED: tuple[str, ...] = (OWN,)


def obstacle(name: str, loss: CrossEntropy) -> str:
    """Return why a provider cannot compute a cross entropy exactly, or ''."""
    if name == OWN:
        return ""
    reason = PROVIDERS[name].limits(loss)
    return reason or ("has no scale of logits" if loss.scale != 1 else "")


def compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    provider: str,
    dtype: torch.dtype,
    **terms: Any,
) -> Tensor:
    """Return the loss of a provider, in a dtype."""
    found = PROVIDERS[provider].compute(hidden.contiguous(), weight, bias, labels, class_weights, **terms)
    return found.to(dtype)
