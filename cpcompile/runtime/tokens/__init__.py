"""Operators on tokens that are not attention: sharding, gathering, shifting, halos, single tokens, reductions and dropout.

In: whole values, or this rank's tokens. Out: this rank's tokens, or whole values; each operator has its true adjoint. May
import `transport` and below.
"""
