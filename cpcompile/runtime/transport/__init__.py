"""How bytes get from rank to rank: process groups, symmetric memory, and the messages of rings and all-to-alls.

In: tensors and the ranks that they go to. Out: those that came, when they are waited for. `process_group` is the only place
that touches a process group. May import `schedule` and below.
"""
