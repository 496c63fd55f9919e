"""Looking inside: what will happen and whether it is right, without GPUs or processes.

`explain` reads the plan out of the graph of every rank; `verify` runs all ranks in lockstep, in this process, against the
untouched model and names the first node that differs. May import `compile` and below; nothing that trains imports it.
"""
