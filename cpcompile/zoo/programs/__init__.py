"""Programs: transformers beyond those of the library of that name, each small, and written as its users write it.

A file has those of one kind; `registry.PROGRAMS` has all by key. What a program needs that is not installed makes it not available.
"""

from cpcompile.zoo.programs import (
    chunks,
    decoders,
    diffusion,
    images,
    mixers,
    more_keys,
    science,
    signals,
    streams,
    vision,
)  # noqa: F401  (they register)
from cpcompile.zoo.programs.making import find_programs, make_program
from cpcompile.zoo.programs.registry import PROGRAMS, Program

__all__ = ["PROGRAMS", "Program", "find_programs", "make_program"]
