"""Looking inside: what will happen and whether it is right, without GPUs or processes.

In: a model, its inputs and options, or a transformed graph. Out: `explain` reads the plan out of the graph of every rank;
`verify` runs all ranks in lockstep, in this process, against the untouched model and names the first node that differs. The door
has the plan of a call from here (`explanation`), and where numbers stop being finite. May import `memory` and below.
"""
