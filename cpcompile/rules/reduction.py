"""Operators that run over some dims: norms and softmax elsewhere than along the tokens, sums and means, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.rules.registry import Indices, Names, no_rule, rule

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # at::Reduction


def dims_of(call: Call) -> Names:
    """Return the names of the dims of `self`."""
    return tuple(f"d{i}" for i in range(len(call.shape("self"))))


def without(names: Names, dims: set[int]) -> Names:
    """Return `names` with those dims closed, because the operator mixes them."""
    return tuple(None if i in dims else name for i, name in enumerate(names))


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.argsort.default,
    aten.flip.default,
    aten.roll.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.stable,
    aten.topk.default,
    aten.glu.default,
)
def along_dim(call: Call) -> Indices:
    """[... d ...] -> [... d' ...], mixing d"""
    rank = max(len(call.shape("self")), 1)
    given: Any = call["dims"] if "dims" in call else [call["dim"]]
    if call.target is aten.roll.default and not given:  # over the flattened tensor
        given = range(rank)
    names = without(dims_of(call), {int(d) % rank for d in given})
    return Indices({"self": names}, (names,) * len(call.results))


def reduced_dims(call: Call) -> set[int]:
    """Return the dims that a reduction runs over."""
    rank = len(call.shape("self"))
    given = call.arguments.get("dim")
    if given == [] and call.target in (aten.all.dims, aten.any.dims):
        return set()
    if given is None or given == []:
        return set(range(rank))
    return {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}


def kept(call: Call) -> Names:
    """Return the dims that a reduction leaves."""
    dims, keep = reduced_dims(call), bool(call.arguments.get("keepdim"))
    return tuple(None if i in dims else name for i, name in enumerate(dims_of(call)) if keep or i not in dims)


@rule(
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.mean.default,
    aten.mean.dim,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
)
def total(call: Call) -> Indices:
    """[... d] -> [...], a partial sum when d is the tokens"""
    return Indices({"self": dims_of(call)}, (kept(call),), summed=True, padding={"self": 0.0})


@rule(
    aten.amax.default,
    aten.amin.default,
    aten.max.default,
    aten.min.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.logsumexp.default,
    aten._is_all_true.default,
    aten._is_any_true.default,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.max.dim,
    aten.min.dim,
    aten.var.default,
    aten.var.dim,
    aten.var.correction,
    aten.std.default,
    aten.std.dim,
    aten.std.correction,
    aten.var_mean.default,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.default,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.linalg_vector_norm.default,
    aten.prod.default,
    aten.prod.dim_int,
)
def reduction(call: Call) -> Indices:
    """[... d] -> [...]"""
    return Indices({"self": without(dims_of(call), reduced_dims(call))}, (kept(call),) * len(call.results))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def norm(call: Call) -> Indices:
    """[... k], [k], [k] -> [... k'], mixing k"""
    count = len(call["normalized_shape"])
    rank = len(call.shape("input"))
    names = without(tuple(f"d{i}" for i in range(rank)), set(range(rank - count, rank)))
    others = {name: (None,) * count for name, _ in call.operands() if name != "input"}
    return Indices({"input": names, **others}, (names,))


@rule(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
def loss(call: Call) -> Indices:
    """[n c ...], [n ...], [c] -> [n ...] or [], a partial sum over n

    A mean is over the labels that count on all ranks: `rewrite_reductions` divides the local sums by the
    global count.
    """
    shape = call.shape("self")
    batch = () if len(shape) == 1 else ("n",)
    rest = tuple(f"r{i}" for i in range(len(shape) - 2))
    labels = (*batch, *rest)
    has_probabilities = call.tensor("target").is_floating_point()
    if has_probabilities and call["reduction"] == _MEAN and "n" not in batch:
        raise no_rule(call, {}, "probability targets without a batch dim")
    is_reduced = call["reduction"] in (_MEAN, _SUM)
    if has_probabilities and is_reduced and call.arguments.get("label_smoothing"):  # padding rows would not count 0
        raise no_rule(call, {}, "probability targets with label smoothing; smooth the targets before the loss")
    operands: dict[str, Names] = {
        "self": (*batch, None, *rest),
        "target": (*batch, None, *rest) if has_probabilities else labels,
    }
    if call["weight"] is not None:
        operands["weight"] = (None,)
    ignored = call["ignore_index"]
    ignored = ignored.meta["val"] if isinstance(ignored, fx.Node) else ignored
    if not isinstance(ignored, int):
        raise no_rule(call, {}, f"it ignores the label {ignored}, a size that may change; use a number")
    padding = 0.0 if has_probabilities else float(ignored)
    return Indices(operands, (() if is_reduced else labels,), summed=True, padding={"target": padding})
