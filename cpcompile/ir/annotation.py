"""Annotation: what one pass tells the next about a node, under one key of `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from cpcompile.ir.placement import FULL, Placement

_KEY = "cpcompile"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What is known of a node.

    Attributes:
        placement: how the ranks hold its value; a tuple for an operator with several results.
        strategy: how an attention will be computed.
        site: the attention node that a collective computes.
        origin: the node of the captured graph whose value this node holds, for comparison node by node.
        reason: what a gathered value is needed for.
        region: the token-local region that the node is a part of.
        is_of_layout: these are the bounds of the documents that the layout follows.
        stays_whole: every rank needs all its tokens: of a table that positions index, of what keys are made of.
        fill: what the mask of this attention puts in the place of scores in the model, in place of being added; 0 for none.
        takes_gradient: a gradient may reach this input.
        is_local: the recorded value is what one rank holds; elsewhere it is the whole.
        held: what this buffer was found to hold when it was compiled, None for nothing that is known; () if nobody looked.
    """

    placement: Placement | tuple[Placement, ...] = FULL
    strategy: str = ""
    site: str = ""
    origin: str = ""
    reason: str = ""
    region: str = ""
    is_of_layout: bool = False
    stays_whole: bool = False
    fill: float = 0.0
    takes_gradient: bool = False
    is_local: bool = False
    held: tuple[object, ...] = ()


def annotation(node: fx.Node) -> Annotation:
    """Return what is known of `node`."""
    known = node.meta.get(_KEY)
    return known if isinstance(known, Annotation) else Annotation()


def annotate(node: fx.Node, **changes: Any) -> None:
    """Record facts about `node`."""
    node.meta[_KEY] = replace(annotation(node), **changes)


def placement_of(node: fx.Node) -> Placement:
    """Return the placement of a node with one result."""
    placement = annotation(node).placement
    assert not isinstance(placement, tuple), node.format_node()
    return placement
