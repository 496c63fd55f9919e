"""How bytes get from rank to rank: process groups, symmetric memory, and the messages of rings and all-to-alls.

`process_group` is the only place that touches a process group. May import `schedule` and `_torch`.
"""
