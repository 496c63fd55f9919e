"""Programs: transformers beyond those of the library of that name, each small, and written as its users write it.

A file has those of one kind; `PROGRAMS` has all by key. One that needs what is not installed is not available.
"""

from importlib import import_module

from cpcompile.zoo.programs.making import find_programs, make_program
from cpcompile.zoo.programs.registry import PROGRAMS, Program

__all__ = ["PROGRAMS", "Program", "find_programs", "make_program"]

KINDS = "decoders more_keys chunks mixers images streams science signals diffusion vision vision_language"
for kind in KINDS.split():
    import_module(f"cpcompile.zoo.programs.{kind}")
