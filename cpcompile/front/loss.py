"""Loss: cross entropy of a model's logits, of which each rank may hold its own tokens only."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpcompile.balance.layout import local_length
from cpcompile.errors import ConfigError
from cpcompile.front.apply import ParallelForward, axis_arguments, parallel_forward, parallel_parts
from cpcompile.front.rank_agreement import check_same_inputs

_REDUCTIONS = ("mean", "sum")


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    model: torch.nn.Module,
    *,
    shift: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    dim: int = 1,
) -> torch.Tensor:
    """Return the cross entropy of the whole batch, on every rank, from the logits as the model returned them. Collective.

    Every rank calls `backward()` on it, as with a loss that the model returns; gradients are then those of one device. Logits may
    be this rank's tokens, in any layout, or whole (`outputs="full"`, or a model without `apply`); the loss is the same. It is
    computed in float32 at least. Call it before the model is called again: the layout is that of the last call.

    Args:
        logits: `[..., tokens, classes]`, an output of the last call of the model.
        labels: int64 `[..., tokens]`, those of the whole sequence in the user's order, the same on every rank.
        model: the model that `apply` was given, or one that holds it.
        shift: the logits of a token predict the label of the next one, as in causal language models; False: its own label.
        ignore_index: labels that do not count.
        reduction: `mean` over the labels that count, of all ranks, or `sum`.
        num_items_in_batch: what a `mean` divides by instead, for batches whose gradients are accumulated.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        dim: the dim of the tokens.

    Raises:
        ConfigError: an argument that does not fit the last call; labels that are not those of the whole sequence.
        RanksDiffer: the labels differ between ranks; compared as `check_inputs` says.
    """
    if reduction not in _REDUCTIONS or (reduction == "sum" and num_items_in_batch is not None):
        raise ConfigError(
            f"reduction={reduction!r} with num_items_in_batch={num_items_in_batch}: choose 'mean', which divides by "
            "num_items_in_batch if that is given, or 'sum' without it."
        )
    at = dim % labels.dim()
    check_shapes(logits, labels, at)
    forward = parallel_forward(model) if parallel_parts(model) else None
    if forward is not None and forward.compares_labels():
        count = {} if num_items_in_batch is None else {"num_items_in_batch": torch.as_tensor(num_items_in_batch)}
        check_same_inputs({"labels": labels, **count}, forward.axis)
    is_local = forward is not None and holds_local_tokens(forward, logits, labels, at)
    if not is_local and logits.shape[at] != labels.shape[at]:
        raise ConfigError(
            f"the logits hold {logits.shape[at]} tokens along dim {at} and the labels {labels.shape[at]}, but this model is not "
            "context parallel: pass the model that cpcompile.apply was given."
        )
    if shift:
        nothing = torch.full_like(labels.narrow(at, 0, 1), ignore_index)
        labels = torch.cat([labels.narrow(at, 1, labels.shape[at] - 1), nothing], dim=at)
    num_labels = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if is_local and forward is not None:
        labels = own_labels(forward, labels, at, ignore_index)
    scores = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(
        scores.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    loss = total / num_labels if reduction == "mean" else total
    if not is_local or forward is None:
        return loss
    # Every rank returns the sum, so that each back-propagates its share, as for a loss that the model returns.
    axis = forward.axis
    whole = torch.ops.cpcompile.all_reduce(loss, axis.world_size, axis.group)
    shared: torch.Tensor = torch.ops.cpcompile.scale_gradient(whole, 1 / axis.world_size)
    return shared


def check_shapes(logits: torch.Tensor, labels: torch.Tensor, at: int) -> None:
    """Check that there is one label for the logits of each token, apart from how many tokens there are."""
    others = [size for dim, size in enumerate(logits.shape[:-1]) if dim != at]
    if labels.is_floating_point() or others != [size for dim, size in enumerate(labels.shape) if dim != at]:
        raise ConfigError(
            f"logits of shape {list(logits.shape)} need integer labels of one dim less, {list(logits.shape[:-1])} with all "
            f"tokens in dim {at}, and not {str(labels.dtype).removeprefix('torch.')}{list(labels.shape)}."
        )


def holds_local_tokens(forward: ParallelForward, logits: torch.Tensor, labels: torch.Tensor, at: int) -> bool:
    """Tell whether the logits are this rank's tokens of the last call, or whole.

    Raises:
        ConfigError: neither, or it cannot be told.
    """
    last, size, whole = forward.last, logits.shape[at], labels.shape[at]
    if whole not in last.lengths:
        raise ConfigError(
            f"the labels hold {whole} tokens along dim {at}, and the last call of the model had "
            f"{' and '.join(map(str, dict.fromkeys(last.lengths))) or 'none'}: pass the labels of the whole sequence, as for one "
            "device, right after the call that the logits are of."
        )
    slots = local_length(whole, forward.axis.world_size, forward.layout)
    alike = [output.dim is not None for output in last.outputs if len(output.shape) == logits.dim()]
    may_be_local, may_be_whole = size == slots and any(alike), size == whole and not all(alike)
    if may_be_local and may_be_whole and forward.axis.world_size > 1:
        raise ConfigError(f"{whole} tokens are too few to tell whether these logits are whole: use outputs='full'.")
    if not may_be_local and not may_be_whole:
        raise ConfigError(
            f"the logits hold {size} tokens along dim {at}, but a rank's part of {whole} tokens has {slots}: pass them as the "
            "last call of the model returned them."
        )
    return may_be_local


def own_labels(forward: ParallelForward, labels: torch.Tensor, at: int, ignore_index: int) -> torch.Tensor:
    """Return the labels of this rank's tokens, `ignore_index` in padding slots."""
    axis = axis_arguments(forward, labels.shape[at])
    mine = torch.ops.cpcompile.shard_tokens(labels, at, 1, *axis)
    filled: torch.Tensor = torch.ops.cpcompile.fill_padding(mine, at, 1, float(ignore_index), 0, 0, *axis)
    return filled
