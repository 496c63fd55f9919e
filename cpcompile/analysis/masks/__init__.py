"""Masks as predicates: read from the graph as expressions over coordinates, and recognised.

The family modules enter their rules when they are imported: whoever has a `Reader` has all rules.
"""

from cpcompile.analysis.masks import along_dim, arithmetic, creation, indexing, logic

__all__ = ["along_dim", "arithmetic", "creation", "indexing", "logic"]
