"""Masked rows: what a model computes from the rows that a mask picks, `x[mask]`, up to where no rows are left."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.patterns.nodes import same_shape, value_numbers
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten
NONE = 0  # at::Reduction

PICKS = (aten.index.Tensor, aten.masked_select.default)
SAME = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)  # of the shape that is there
# Each row of the result from that row, finite in all derivatives where the row is 0.
BY_ROW = {
    aten.abs.default, aten.add.Tensor, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
    aten.div.Tensor, aten.gelu.default, aten.layer_norm.default, aten.linear.default, aten.mul.Tensor, aten.neg.default,
    aten.relu.default, aten.rms_norm.default, aten.sigmoid.default, aten.silu.default, aten.square.default, aten.sub.Tensor,
    aten.tanh.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
}  # fmt: skip
LOSSES_OF_LABELS = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default)
LOSSES_OF_PAIRS = (
    aten.binary_cross_entropy_with_logits.default,
    aten.huber_loss.default,
    aten.l1_loss.default,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
)
TOTALS = (aten.sum.default, aten.mean.default)
ENDS = (*LOSSES_OF_LABELS, *LOSSES_OF_PAIRS, *TOTALS, aten.index_put.default)
# What tracing says of a size that only running tells.
ASSERTS = (
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    operator.eq,
    operator.ge,
    operator.gt,
    operator.le,
    operator.lt,
)


def find_rows(graph: fx.Graph) -> list[Rows]:
    """Return the rows of each mask, as far as all that is computed of them is known."""
    numbers = value_numbers(graph)
    of_mask: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        mask = mask_of(node) if node.target in PICKS else None
        if mask is not None:
            of_mask.setdefault(numbers[mask], []).append(node)
    found = [Rows.of(picks) for picks in of_mask.values()]
    return [rows for rows in found if rows is not None]


def mask_of(node: fx.Node) -> fx.Node | None:
    """Return the mask over the first dims of `self` that picks, or is written at, rows."""
    call = Call.of(node)
    if "mask" in call:
        mask = call["mask"]
    else:
        mask, *others = call["indices"]
        mask = None if any(other is not None for other in others) else mask
    if not isinstance(mask, fx.Node) or value_of(mask).dtype != torch.bool:
        return None
    x, shape = value_of(call["self"]), value_of(mask).shape
    is_whole = "mask" not in call or len(shape) == x.dim()
    return mask if is_whole and same_shape(x.shape[: len(shape)], shape) else None


class Rows:
    """All that is computed from the rows of one mask, up to ends that no longer have them."""

    def __init__(self, picks: list[fx.Node]) -> None:
        found = mask_of(picks[0])
        assert found is not None
        self.mask, self.picks = found, picks  # of one mask: the first
        self.rows: dict[fx.Node, None] = dict.fromkeys(picks)
        self.ends: list[fx.Node] = []
        self.sizes: list[fx.Node] = []
        self.in_order: dict[fx.Node, None] = {}  # values from elsewhere with a row for each that was picked

    @classmethod
    def of(cls, picks: list[fx.Node]) -> Rows | None:
        """Return what is computed from these rows, or None where it cannot be opened."""
        found = cls(picks)
        for node in picks[0].graph.nodes:
            read = [x for x in node.all_input_nodes if x in found.rows or x in found.sizes]
            if read and node not in found.rows and not found.take(node):
                return None
        return found if found.ends else None

    def take(self, node: fx.Node) -> bool:
        """Take a node that reads rows, or how many there are; tells whether that is possible."""
        if not is_tensor(node) and (node.target is aten.sym_size.int or node.target in ASSERTS):
            self.sizes.append(node)
            return True
        if node.target is operator.getitem:  # of `broadcast_tensors`
            self.rows[node] = None
            return True
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        call = Call.of(node)
        given = {name for name, operand in call.operands() if operand in self.rows}
        if node.target in ENDS and self.is_end(call, given):
            self.ends.append(node)
            return True
        if self.is_by_row(call, given):
            self.rows[node] = None
            return True
        return False

    def is_by_row(self, call: Call, given: set[str]) -> bool:
        """Tell whether an operator computes each row from that row."""
        first = next(name for name, _ in call.operands())
        if call.target is aten.broadcast_tensors.default:
            shapes = [call.shape(name) for name, _ in call.operands()]
            return len(given) == len(shapes) and all(same_shape(shape, shapes[0]) for shape in shapes)
        if call.target in SAME:
            return same_shape(call.result.shape, call.shape("self"))
        if call.target is aten.unsqueeze.default:  # counted from the end, or of a mask of one dim
            dim, rank = int(call["dim"]), call.result.dim()
            return dim % rank != 0 and (dim < 0 or value_of(self.mask).dim() == 1)
        if call.target not in BY_ROW or first not in given:
            return False
        rank = call.result.dim()
        if "normalized_shape" in call:
            return len(call["normalized_shape"]) < rank and given == {first} and call["eps"] != 0
        if call.target is aten.linear.default:
            return rank > 1 and given == {first}
        if call.target is aten.div.Tensor and "other" in given:
            return False
        others = [operand for name, operand in call.operands() if name not in given and call.tensor(name).dim() >= rank]
        if len({call.tensor(n).dim() for n in given}) > 1 or not all(
            has_row_for_each(x, call.tensor(first)) for x in others
        ):
            return False
        self.in_order.update(dict.fromkeys(others))
        return True

    def is_end(self, call: Call, given: set[str]) -> bool:
        """Tell whether an operator takes rows together to what has none."""
        if call.target in LOSSES_OF_LABELS:
            are_labels = not call.tensor("target").is_floating_point() and len(call.shape("self")) == 2
            is_known = isinstance(call["ignore_index"], int) and call["reduction"] != NONE
            return given == {"self", "target"} and are_labels and is_known
        if call.target in LOSSES_OF_PAIRS:
            same = same_shape(call.shape("self"), call.shape("target"))
            return given == {"self", "target"} and same and call["reduction"] != NONE and not has_weights(call)
        if call.target is aten.index_put.default:
            is_same = given == {"values"} and mask_of(call.node) is not None and not call["accumulate"]
            return is_same and self.is_mine(call.node) and call.tensor("values").dtype == call.result.dtype
        return given == {"self"} and call["dtype"] is None

    def is_mine(self, node: fx.Node) -> bool:
        """Tell whether rows are written where they were picked."""
        values, written = Call.of(node)["values"], mask_of(node)
        rest = value_of(node).shape[value_of(self.mask).dim() :]
        return written is self.mask and same_shape(value_of(values).shape[1:], rest)


def has_row_for_each(node: fx.Node, rows: torch.Tensor) -> bool:
    """Tell whether a value has a row like those of `rows` for each of them, and not the same one for all."""
    value = value_of(node)
    is_alike = value.dim() == rows.dim() and same_shape(value.shape[1:], rows.shape[1:]) and value.dtype == rows.dtype
    return is_alike and not statically_known_true(value.shape[0] == 1)


def has_weights(call: Call) -> bool:
    """Tell whether a loss of pairs has weights, which may be of any shape."""
    return any(call.arguments.get(name) is not None for name in ("weight", "pos_weight"))
