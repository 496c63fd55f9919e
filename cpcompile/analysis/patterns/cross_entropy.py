"""Cross entropy: a loss that reads logits through a scale, a softcap and a cast alone, as other packages compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call

aten = torch.ops.aten
_VIEWS = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
}
_CASTS = {aten.to.dtype, aten._to_copy.default}
_LOG_SOFTMAX = {aten.log_softmax.int, aten._log_softmax.default}
_NLL = {aten.nll_loss.default, aten.nll_loss_nd.default}
_NONE = 0  # at::Reduction


class OtherLossError(Exception):
    """What is computed of logits is no cross entropy."""


@dataclass(slots=True)
class Logits:
    """What has been computed of logits on the way to a loss: `softcap * tanh(scale * logits)`, or `scale * logits`.

    Attributes:
        dtype: of it.
        is_log_softmax: whether it is the log-softmax of that.
    """

    dtype: torch.dtype
    scale: float = 1.0
    softcap: float = 0.0
    is_log_softmax: bool = False


@dataclass(frozen=True, slots=True)
class FoundLoss:
    """A cross entropy in the body of a loss.

    Attributes:
        node: it, in the graph of the body.
        labels, class_weights: operands, inputs of that graph.
        terms: its fields as `loss_providers.CrossEntropy` has them.
    """

    node: fx.Node
    labels: fx.Node
    class_weights: fx.Node | None
    terms: dict[str, Any]


def find_cross_entropy(graph: fx.Graph, dtype: torch.dtype, rows: Sequence[torch.Tensor]) -> FoundLoss:
    """Return the cross entropy that alone reads the first input of a graph, logits `[T, classes]` of a dtype.

    Args:
        graph: of logits, of tensors of one row a token, and of others.
        dtype: of the logits.
        rows: the values of the second.

    Raises:
        OtherLossError: something else reads them; says what.
    """
    inputs = graph.find_nodes(op="placeholder")
    node, logits = inputs[0], Logits(dtype)
    while True:
        if len(node.users) != 1:
            raise OtherLossError(f"logits are read by {_names(node)}")
        (user,) = node.users
        if user.target is aten.cross_entropy_loss.default or (user.target in _NLL and logits.is_log_softmax):
            return _found(Call.of(user), logits, dict(zip(inputs[1:], rows, strict=False)))
        _follow(user, node, logits)
        node = user


def _follow(node: fx.Node, before: fx.Node, logits: Logits) -> None:
    """Take a step from logits to what is computed of them."""
    if node.target in _VIEWS:
        return
    call = Call.of(node) if isinstance(node.target, torch._ops.OpOverload) else None
    factor = _factor(call, before) if call is not None else None
    if call is None or logits.is_log_softmax:
        raise OtherLossError(f"logits are read by {_names(before)}")
    if node.target in _CASTS and isinstance(call["dtype"], torch.dtype):
        logits.dtype = call["dtype"]
    elif node.target is aten.tanh.default and not logits.softcap:
        logits.softcap = 1.0
    elif factor is not None and logits.softcap:
        logits.softcap *= factor
    elif factor is not None:
        logits.scale *= factor
    elif node.target in _LOG_SOFTMAX and call["dim"] in (1, -1) and not _changes_dtype(call):
        logits.is_log_softmax = True
    else:
        raise OtherLossError(f"logits are read by {_names(before)}")


def _changes_dtype(call: Call) -> bool:
    return bool(call["dtype"] if "dtype" in call else call["half_to_float"])


def _factor(call: Call, before: fx.Node) -> float | None:
    """Return the number that logits are multiplied by."""
    if call.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return None
    if call["self"] is not before or not isinstance(call["other"], int | float):
        return None
    is_product = call.target in (aten.mul.Tensor, aten.mul.Scalar)
    return float(call["other"]) if is_product else 1 / float(call["other"])


def _found(call: Call, logits: Logits, rows: dict[fx.Node, torch.Tensor]) -> FoundLoss:
    labels = rows.get(call["target"])
    if labels is None or labels.dim() != 1 or labels.dtype != torch.int64:
        raise OtherLossError("labels are no int64 numbers of classes")
    scale = logits.scale
    if logits.softcap:
        scale *= logits.softcap
        scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-12) else scale
    weights = call["weight"]
    terms = {
        "loss_dtype": logits.dtype,
        "by_token": call["reduction"] == _NONE,
        "has_class_weights": weights is not None,
        "ignore_index": call["ignore_index"],
        "label_smoothing": call.arguments.get("label_smoothing", 0.0),
        "softcap": logits.softcap,
        "scale": scale,
    }
    return FoundLoss(call.node, call["target"], weights, terms)


def _names(node: fx.Node) -> str:
    """Return the operators that read a node."""
    return ", ".join(sorted({str(user.target) for user in node.users}))
