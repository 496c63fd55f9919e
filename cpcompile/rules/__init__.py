"""Placement rules, one for each operator, entered in `RULES` by the family modules."""

from cpcompile.rules import attention, dims, matrix, pointwise, reduction, views
from cpcompile.rules.registry import REASONS, RULES, Decision, Indices, Local, Rule, no_rule, register, rule

__all__ = [
    "REASONS",
    "RULES",
    "Decision",
    "Indices",
    "Local",
    "Rule",
    "attention",
    "dims",
    "matrix",
    "no_rule",
    "pointwise",
    "reduction",
    "register",
    "rule",
    "views",
]
