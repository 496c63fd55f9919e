"""The masks of attention written out: one mask for the operator that means all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.bias import BiasReader, read_bias
from cpcompile.analysis.masks.expression import Boolean, Choice, Number
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.masks.recognise import hides, recognise
from cpcompile.analysis.masks.simplify import as_boolean, as_value, both, negated, shifted
from cpcompile.analysis.patterns.fills import Fill
from cpcompile.analysis.patterns.nodes import may_need_gradient
from cpcompile.analysis.patterns.scores import Masking, Scores
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten

# A score that is replaced by at most this and one to which it is added are the same number, whatever the
# score.
ABSORBING = torch.finfo(torch.bfloat16).min
INFINITE = float("-inf")


@dataclass(frozen=True, slots=True)
class Hidden:
    """Where a mask hides keys, over (batch, head, query, key), and the number that it adds there, or puts in their place."""

    where: Boolean
    value: float


@dataclass(frozen=True, slots=True)
class Masks:
    """Masks of scores that one mask can mean.

    Attributes:
        parts: they, and what each hides, None for a bias.
        is_infinite: what is hidden has weight 0, whatever the number that hides it, also in a row that sees no key.
        fill: the finite number that replaces scores in rows which it may hide whole: these have no gradient. 0 where none does.
    """

    parts: tuple[tuple[Masking, Hidden | None], ...]
    is_infinite: bool
    fill: float = 0.0


def read_masks(scores: Scores, zeroed: Sequence[Fill], reader: Reader) -> Masks | None:
    """Return the masks of scores whose weights are `zeroed` after the softmax, or None where no mask means the same.

    A finite number that hides is as good as an infinite one where each row keeps a key, or where what it hides is zeroed, unless
    a bias may hide what is left. Else it is like an addition if it absorbs what it is added to, or if nothing else is in the
    rows that it hides whole.
    """
    masks = joined(scores.masks, reader)
    if any(may_need_gradient(masking.tensor) for masking in masks):
        return None
    dtype = value_of(scores.product).dtype
    parts = tuple((masking, hidden_by(masking, dtype, reader)) for masking in masks)
    if any(masking.fill is not None and hidden is None for masking, hidden in parts):
        return None
    visible = both(*(negated(hidden.where) for _, hidden in parts if hidden is not None))
    kept = both(*(negated(where(fill.condition, fill.where, reader)) for fill in zeroed))
    if both(visible, kept) != visible:
        return None
    is_infinite = all(hidden is None or hidden.value == INFINITE for _, hidden in parts)
    is_zeroed = bool(zeroed) and kept == visible
    are_small = all(hidden is not None or is_small(masking, reader) for masking, hidden in parts)
    if is_infinite or (are_small and (is_zeroed or shows_own_token(scores.product, visible, reader))):
        return Masks(parts, is_infinite=True)
    return None if zeroed else masks_of_whole_rows(parts, reader)


def masks_of_whole_rows(parts: tuple[tuple[Masking, Hidden | None], ...], reader: Reader) -> Masks | None:
    """Return masks that hide by finite numbers, where a row may see no key and then attends to all."""
    fills = [masking for masking, _ in parts if masking.fill is not None and masking.fill != INFINITE]
    if not fills:
        return Masks(parts, is_infinite=False)
    (first, *others) = fills
    assert first.fill is not None
    can_absorb = first.fill <= ABSORBING and all(is_small(part, reader) for part, _ in parts if part is not first)
    return None if others or not (can_absorb or len(parts) == 1) else Masks(parts, is_infinite=False, fill=first.fill)


def where(condition: fx.Node, holds: bool, reader: Reader) -> Boolean:
    """Return where a condition holds, or does not, over (batch, head, query, key)."""
    value = reader.read(condition)
    assert value is not None, condition.format_node()
    found = as_boolean(shifted(value, 4 - value_of(condition).dim()))
    return found if holds else negated(found)


def hidden_by(masking: Masking, dtype: torch.dtype, reader: Reader) -> Hidden | None:
    """Return what a mask hides in scores of a dtype, or None for one that does something else."""
    found = one_number(masking, reader)
    return found if found is not None and hides(found.value, dtype) else None


def one_number(masking: Masking, reader: Reader) -> Hidden | None:
    """Return where a mask adds a number, or puts it in the place of scores; None for one that adds several."""
    if masking.fill is not None:
        return Hidden(where(masking.tensor, masking.where, reader), masking.fill)
    tensor, value = value_of(masking.tensor), reader.read(masking.tensor)
    # The operator reads a boolean as where to attend, and a model that adds one adds 1 there.
    match None if value is None else as_value(shifted(value, 4 - tensor.dim())):
        case Choice(condition, Number(number), Number(0)):
            return Hidden(condition, number * masking.factor)
        case Choice(condition, Number(0), Number(number)):
            return Hidden(negated(condition), number * masking.factor)
    return None


def joined(masks: tuple[Masking, ...], reader: Reader) -> tuple[Masking, ...]:
    """Return masks in which a number that is added just where scores were filled is a part of what fills them."""
    parts: list[Masking] = []
    for masking in masks:
        before = one_number(parts[-1], reader) if parts and parts[-1].fill is not None else None
        added = one_number(masking, reader) if before is not None and masking.fill is None else None
        if before is not None and added is not None and before.where == added.where:
            parts[-1] = replace(parts[-1], fill=before.value + added.value)
        else:
            parts.append(masking)
    return tuple(parts)


def shows_own_token(product: fx.Node, visible: Boolean, reader: Reader) -> bool:
    """Tell whether every query provably sees the key at its own place."""
    num_queries, num_keys = value_of(product).shape[-2:]
    mask = recognise(visible, reader)
    return mask is not None and mask.shows_own_token and statically_known_true(num_queries == num_keys)


def is_small(masking: Masking, reader: Reader) -> bool:
    """Tell whether a mask adds a bias that no more than scores comes near the least number."""
    if masking.fill is not None:
        return False
    biases = BiasReader(reader.gm, value_of(masking.tensor).dtype)
    return read_bias(masking.tensor, biases) is not None or not may_hide(masking.tensor)


def may_hide(bias: fx.Node) -> bool:
    """Tell whether a bias may hold a number that hides keys: one that the graph names, an input, or the logarithm of 0.

    What is computed from positions, from parameters and from tokens is as large as scores are.
    """
    seen, waiting = set[fx.Node](), [bias]
    while waiting:
        node = waiting.pop()
        if node in seen or not isinstance(value_of(node), torch.Tensor) or not value_of(node).is_floating_point():
            continue
        seen.add(node)
        example = getattr(node.meta.get("grapharg"), "example", None)
        is_given = node.op in ("placeholder", "get_attr") and not isinstance(example, torch.nn.Parameter)
        numbers = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, int | float)]
        is_large = any(hides(-abs(x), value_of(node).dtype) for x in numbers)
        if is_given or node.target is aten.log.default or (is_large and node.target is not aten.slice.Tensor):
            return True
        waiting.extend(node.all_input_nodes)
    return False


def written_mask(before: fx.Node, masks: Masks, dtype: torch.dtype) -> fx.Node | None:
    """Return one node that means all masks."""
    mask = None
    for masking, hidden in masks.parts:
        if masking.fill is None:
            new = added_mask(before, masking, hidden if masks.is_infinite else None)
        else:
            new = filled_mask(before, masking, masks.is_infinite, dtype)
        mask = new if mask is None else combined(before, mask, new)
    return mask


def added_mask(before: fx.Node, masking: Masking, hidden: Hidden | None) -> fx.Node:
    """Return a mask that is added, or where it is not if what is `hidden` has weight 0 there."""
    tensor = masking.tensor
    added = tensor if masking.factor == 1 else insert_call(before, aten.mul.Tensor, tensor, masking.factor)
    if hidden is None or hidden.value == INFINITE:
        return added
    return insert_call(before, aten.gt.Scalar, added, hidden.value / 2)


def filled_mask(before: fx.Node, masking: Masking, is_infinite: bool, dtype: torch.dtype) -> fx.Node:
    """Return where scores are not filled, or the numbers to add that mean the fill."""
    tensor = masking.tensor
    if value_of(tensor).dtype is not torch.bool:
        tensor = insert_call(before, aten.ne.Scalar, tensor, 0)
    kept = insert_call(before, aten.logical_not.default, tensor) if masking.where else tensor
    if is_infinite:
        return kept
    zero = insert_call(before, aten.new_zeros.default, tensor, [], dtype=dtype)
    return insert_call(before, aten.where.ScalarOther, kept, zero, masking.fill)


def combined(before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """Return the mask that means two."""
    is_boolean = [value_of(mask).dtype is torch.bool for mask in (a, b)]
    if all(is_boolean):
        return insert_call(before, aten.logical_and.default, a, b)
    if not any(is_boolean):
        return insert_call(before, aten.add.Tensor, a, b)
    kept, added = (a, b) if is_boolean[0] else (b, a)
    return insert_call(before, aten.where.ScalarOther, kept, added, INFINITE)
