"""Labels: those that belong to another document than the token that predicts them are ignored.

before  loss = aten.cross_entropy_loss(z, aten.slice(labels, 1, 1))
after   kept = aten.masked_fill(labels, is_first, -100); loss = aten.cross_entropy_loss(z, aten.slice(kept, 1, 1))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from cpcompile.analysis.patterns.boundaries import Boundaries
from cpcompile.analysis.patterns.tables import ancestors
from cpcompile.errors import NoRule, where
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default}


def mask_labels(boundaries: Boundaries, losses: Sequence[tuple[fx.Node, int]]) -> None:
    """Let the losses ignore what is predicted across the end of a document.

    Args:
        boundaries: where documents begin and end.
        losses: the losses with how many tokens after the one that predicts it a label stands in its input: 1 where the model
            shifts its labels, 0 where the user did.

    Raises:
        NoRule: no loss ignores labels, or it is not known which labels those are.
    """
    if not losses:
        raise NoRule(
            "mask_labels=True: no loss with an ignore_index was found between tokens and labels (cross_entropy, nll_loss). Mask "
            "the labels of the first token of each document in the batch, or compute the loss with cross_entropy in the model."
        )
    for loss, shift in losses:
        call = Call.of(loss)
        labels = sources(call["target"])
        if len(labels) != 1 or value_of(labels[0]).dim() != 2 or shift not in (0, 1):
            names = ", ".join(node.name for node in labels) or "none"
            raise NoRule(
                f"mask_labels=True: the labels of this loss are not one input [B, S] that is shifted by 0 or 1 token (inputs: "
                f"{names}; shift: {shift}).\n\n{where(loss)}\n\nMask the labels in the batch."
            )
        cut(labels[0], call["target"], boundaries.is_first if shift else boundaries.is_last, call["ignore_index"])


def sources(target: fx.Node) -> list[fx.Node]:
    """Return the inputs of the graph that labels are computed from."""
    return [node for node in ancestors(target) if node.op == "placeholder"]


def cut(labels: fx.Node, target: fx.Node, is_across: fx.Node, ignored: int) -> None:
    """Put the ignored label where `is_across`, on the way from `labels` to `target`, and nowhere else."""
    way = ancestors(target)
    behind = max(is_across, labels, key=list(labels.graph.nodes).index)
    kept = insert_call(behind.next, aten.masked_fill.Scalar, labels, is_across, ignored)
    for user in list(labels.users):
        if user in way and user is not kept:
            user.replace_input_with(labels, kept)
