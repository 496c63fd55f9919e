"""Masks as predicates: read from the graph as expressions over coordinates, and recognised."""
