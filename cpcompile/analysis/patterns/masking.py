"""The masks of attention written out: one mask for the operator that means all of them."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.masks.bias import BiasReader, read_bias
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.nodes import may_need_gradient
from cpcompile.analysis.patterns.scores import Masking, Scores
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten

# A score that is replaced by at most this and one to which it is added are the same number, whatever the
# score.
ABSORBING = torch.finfo(torch.bfloat16).min


def can_mask(masks: tuple[Masking, ...], reader: Reader) -> bool:
    """Tell whether one mask means all of them: a finite fill is like an addition when it absorbs what it is added to.

    Its gradient is another one in rows that it hides whole: see `is_filled`.
    """
    if any(may_need_gradient(masking.tensor) for masking in masks):
        return False
    fills = [masking for masking in masks if masking.fill is not None and masking.fill != float("-inf")]
    others = [masking for masking in masks if masking not in fills]
    can_absorb = len(fills) == 1 and fills[0].fill is not None and fills[0].fill <= ABSORBING
    return not fills or (can_absorb and all(is_small(masking, reader) for masking in others))


def is_filled(masks: tuple[Masking, ...]) -> bool:
    """Tell whether hidden scores are replaced by a finite number, so that rows without a visible key have no gradient."""
    return any(masking.fill not in (None, float("-inf")) for masking in masks)


def is_small(masking: Masking, reader: Reader) -> bool:
    """Tell whether a mask adds slopes times positions, which no more than scores come near the least number."""
    biases = BiasReader(reader.gm, value_of(masking.tensor).dtype)
    return masking.fill is None and read_bias(masking.tensor, biases) is not None


def written_mask(before: fx.Node, scores: Scores) -> fx.Node | None:
    """Return one node that means all masks."""
    mask = None
    for masking in scores.masks:
        new = one_mask(before, masking, value_of(scores.product).dtype)
        mask = new if mask is None else combined(before, mask, new)
    return mask


def one_mask(before: fx.Node, masking: Masking, dtype: torch.dtype) -> fx.Node:
    """Return a mask as the operator takes it: a boolean that is true to attend, or a number to add."""
    if masking.fill is None:
        return masking.tensor
    kept = insert_call(before, aten.logical_not.default, masking.tensor) if masking.where else masking.tensor
    if masking.fill == float("-inf"):
        return kept
    zero = insert_call(before, aten.new_zeros.default, masking.tensor, [], dtype=dtype)
    return insert_call(before, aten.where.ScalarOther, kept, zero, masking.fill)


def combined(before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """Return the mask that means two."""
    is_boolean = [value_of(mask).dtype is torch.bool for mask in (a, b)]
    if all(is_boolean):
        return insert_call(before, aten.logical_and.default, a, b)
    if not any(is_boolean):
        return insert_call(before, aten.add.Tensor, a, b)
    kept, added = (a, b) if is_boolean[0] else (b, a)
    return insert_call(before, aten.where.ScalarOther, kept, added, float("-inf"))
