"""Placement rules, one for each operator, entered in `RULES` by the family modules."""

from cpcompile.rules import attention, convolution, dims, matrix, pointwise, ranges, reduction, scatter, tokens, views
from cpcompile.rules.registry import (
    KEEPS_OUTSIDE,
    REASONS,
    RULES,
    Decision,
    Indices,
    Local,
    Lowering,
    Rule,
    no_rule,
    register,
    rule,
)

__all__ = [
    "KEEPS_OUTSIDE",
    "REASONS",
    "RULES",
    "Decision",
    "Indices",
    "Local",
    "Lowering",
    "Rule",
    "attention",
    "convolution",
    "dims",
    "matrix",
    "no_rule",
    "pointwise",
    "ranges",
    "reduction",
    "register",
    "rule",
    "scatter",
    "tokens",
    "views",
]
