"""Operators on tokens that are not attention: sharding, gathering, shifting, halos, single tokens, reductions and dropout.

Each has its true adjoint. May import `transport` and `schedule`.
"""
